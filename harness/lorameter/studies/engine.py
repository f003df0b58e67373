"""An engine: a third-party feature that promises faster or smaller training, which a study judges.

title = "Liger Kernel"            # the name in reports
variant = "liger"                 # the variant with the engine; the reference is the variant without it
needs = "cuda"                    # the required device; omit it if any device will do
package = "liger-kernel"          # the distribution whose version is stored with results
flag = "{--use_liger_kernel}"     # a typical flag of a training script, in braces, for messages

[engine.proof]                    # kernels_check paths, each with its value if the engine runs

A claim is judged only if the engine demonstrably ran in its variant and not in the reference: otherwise a flag that a
script ignores would refute a claim that was never tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lorameter.errors import require, shorten
from lorameter.studies import protocol

ANY = "any"
"""Required value of a path that reports how much of a feature is present: some with the engine, none without."""
LESS = "less"
"""Required value of a share: with the engine, less than half of its value without."""
SAFE = "not false"
"""Required value of a path that must not be false, so that a gain is not unfair; a path that could not be observed is
accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An engine whose claims a study judges. Raises `UsageError` for invalid fields."""

    title: str
    """Its name."""
    variant: str
    """The variant that uses it."""
    proof: dict[str, Any]
    """Paths of kernels_check with their required values: true, a word, or one of "any", "less" and "not false"."""
    needs: Literal["", "cuda"] = ""
    """The device that it needs; on other devices it cannot be measured."""
    package: str = ""
    """The distribution whose version is part of a result."""
    flag: str = ""
    """Its usual option in a training script, in braces; shown in messages."""

    def __post_init__(self) -> None:
        require(self.title and self.variant, "[engine]: title and variant are needed. Add them.")
        for key in ("title", "package", "flag"):
            protocol.check_word("[engine]", key, getattr(self, key))
        require(
            any(value != SAFE for value in self.proof.values()),
            "[engine.proof]: nothing would show that the engine runs. Name a path of kernels_check, as in "
            '"optimizer.fused" = true.',
        )
        for path, value in self.proof.items():
            require(
                value is True or (isinstance(value, str) and value),
                f"[engine.proof]: {shorten(path, 60)} = {shorten(repr(value), 60)}: nothing that can be seen. Use "
                f'true, a word, "{ANY}", "{LESS}" or "{SAFE}".',
            )

    def obstacle(self, device: str) -> str:
        """Why nothing can be measured on a device ("cpu" or "cuda"); empty if it can."""
        if not self.needs or device == self.needs:
            return ""
        return f"{self.title} runs on a GPU only and this machine measures on the CPU; measure it on a machine with one"
