"""Columns of the data that a study trains on, if they have other names than those that are recognised."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lorameter.errors import UsageError, shorten

FAMILIES: tuple[tuple[str, ...], ...] = (
    ("instruction", "context", "response"),
    ("prompt", "completion"),
    ("messages",),
    ("text",),
)
"""What a record can be made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataColumns:
    """The column of each part; None for a part whose column has the same name, or that is absent.

    Raises `UsageError` for parts that make no record together.
    """

    instruction: str | None = None
    """What is asked."""
    context: str | None = None
    """What the instruction is about; the only part that a record can be without."""
    response: str | None = None
    """What is to be answered."""
    prompt: str | None = None
    """What is asked, of a record of two parts."""
    completion: str | None = None
    """What is to be answered, of a record of two parts."""
    messages: str | None = None
    """A list of messages: role and content, or from and value."""
    text: str | None = None
    """All of a record that has no parts."""

    def __post_init__(self) -> None:
        if self.given and self.family is None:
            parts = ", ".join(f"{part} = {shorten(repr(name), 60)}" for part, name in self.given.items())
            kinds = "; or ".join(", ".join(family) for family in FAMILIES)
            raise UsageError(f"columns: {parts}: parts of different records. Name those of one: {kinds}.")

    @property
    def given(self) -> dict[str, str]:
        """The parts that are named, with their columns."""
        parts = ((one.name, getattr(self, one.name)) for one in dataclasses.fields(self))
        return {part: name for part, name in parts if name is not None}

    @property
    def family(self) -> tuple[str, ...] | None:
        """The parts of the records that these columns make; None where none is named, or they make none."""
        given = set(self.given)
        return next((family for family in FAMILIES if given and given <= set(family)), None)
