"""What records a table holds, recognised by the names of its columns, and each of its rows made one of them.

A record that lacks its text would be trained on as the word "None", or end the run in a traceback long after it was
read. So each is looked at when it is read, and one that cannot serve is refused with its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorameter.errors import UsageError, shorten
from lorameter.studies.columns import DataColumns
from lorameter.trial.data.files import no_record
from lorameter.trial.data.messages import Conversation, check_text, read_conversation
from lorameter.trial.data.synthetic import Record

OPTIONAL = "context"
"""The part that a record can be without."""
_KNOWN: tuple[dict[str, str], ...] = (
    {"instruction": "instruction", "context": "context", "response": "response"},
    {"instruction": "instruction", "context": "input", "response": "output"},
    {"prompt": "prompt", "completion": "completion"},
    {"messages": "messages"},
    {"messages": "conversations"},
    {"text": "text"},
)
"""Column of each part: databricks-dolly-15k's, Alpaca's, prompts with completions, chats, ShareGPT's, plain text."""
SAID = "; ".join(", ".join(columns.values()) for columns in _KNOWN)
"""The columns that are recognised, in words."""
_NAME_THEM = 'Name them in the study: [workload] columns = { instruction = "question", response = "answer" }.'


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The column that plays each part of a record."""

    columns: dict[str, str]
    lacks: str = ""
    """The column of the part that records can be without, where they are without it."""

    @property
    def title(self) -> str:
        """In words; parts are named where the columns do not say them."""
        if self.columns in [{part: one[part] for part in self.columns if part in one} for one in _KNOWN]:
            return "/".join(self.columns.values())
        return ", ".join(f"{column} as {part}" for part, column in self.columns.items())

    @property
    def is_chat(self) -> bool:
        """Whether a record is a list of messages."""
        return "messages" in self.columns

    @property
    def has_prompt(self) -> bool:
        """Whether a record says what it answers."""
        return "text" not in self.columns

    def record(self, row: Any, place: str) -> Record | Conversation:
        """The record that a row is. Raises `UsageError` for one that is none, with its place."""
        if not isinstance(row, dict):
            raise no_record(place, row)
        for column in self.columns.values():
            if column not in row:
                raise UsageError(f"{place}: no column {_quoted(column)}. The first record has {self.title}. Mend it.")
        if self.is_chat:
            column = self.columns["messages"]
            return read_conversation(row[column], place, column)
        if self.lacks and row.get(self.lacks):
            raise UsageError(f"{place}: it has {_quoted(self.lacks)}, and the first record has none. Add it there.")
        return {
            part: "" if part == OPTIONAL and row[column] is None else check_text(row[column], f"{place}: {column}")
            for part, column in self.columns.items()
        }


def recognise(names: Sequence[str], columns: DataColumns, place: str) -> Form:
    """The form of the records of a table.

    Raises:
        UsageError: a column that is needed and not there, no form that is known, or several.
    """
    if columns.family is not None:
        return _mapped(names, columns, place)
    fitting = [one for one in _KNOWN if all(column in names for part, column in one.items() if part != OPTIONAL)]
    said = [one for one in fitting if "text" not in one]  # beside others it is them, written out
    fitting = said or fitting
    if len(fitting) > 1:
        kinds = " and as ".join("/".join(column for column in one.values() if column in names) for one in fitting)
        raise UsageError(f"{place}: its columns can be read as {kinds}. {_NAME_THEM}")
    if fitting:
        found = {part: column for part, column in fitting[0].items() if column in names}
        return Form(columns=found, lacks="" if OPTIONAL in found else fitting[0].get(OPTIONAL, ""))
    near = max(_KNOWN, key=lambda one: sum(column in names for column in one.values()))
    lacking = [column for part, column in near.items() if column not in names and part != OPTIONAL]
    if len(lacking) < sum(part != OPTIONAL for part in near):
        raise UsageError(
            f"{place}: no column {_quoted(lacking[0])}, which records of {', '.join(near.values())} need. "
            f"{_there_are(names)} {_NAME_THEM}"
        )
    raise UsageError(f"{place}: no columns that are known. {_there_are(names)} Known: {SAID}. {_NAME_THEM}")


def _mapped(names: Sequence[str], columns: DataColumns, place: str) -> Form:
    family, found = columns.family or (), {}
    for part in family:
        column = columns.given.get(part, part)
        if column in names:
            found[part] = column
        elif part != OPTIONAL or part in columns.given:
            said = f"which the study's columns name as {part}" if part in columns.given else "which they need beside it"
            raise UsageError(
                f"{place}: no column {_quoted(column)}, {said}. {_there_are(names)} Mend [workload] columns."
            )
    return Form(columns=found, lacks=OPTIONAL if OPTIONAL in family and OPTIONAL not in found else "")


def _there_are(names: Sequence[str]) -> str:
    return f"There are {shorten(', '.join(map(repr, names)), 200) or 'none'}."


def _quoted(name: str) -> str:
    return shorten(repr(name), 60)
