"""An engine: a third-party feature that promises faster or smaller training, which a study judges.

title = "Liger Kernel"            # what it is called
variant = "liger"                 # the variant that has it; the reference is the one without
needs = "cuda"                    # a device without which there is nothing to measure; left out where there is none
package = "liger-kernel"          # the distribution whose version belongs to a result
flag = "{--use_liger_kernel}"     # what a training script is often given for it, in braces, for messages

[engine.proof]                    # paths of kernels_check, and what each must show where the engine runs

A promise is judged only where the engine was seen to run in the one variant and not in the other: a flag that a script
ignores would otherwise refute a promise that was not tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lorameter.errors import require, shorten
from lorameter.studies import limits

ANY = "any"
"""Proof of a path that says what there is of a thing: some of it with the engine, none without."""
LESS = "less"
"""Proof of a share: below half of what it is without the engine."""
SAFE = "not false"
"""Proof that nothing is won unfairly: refuted where the path is seen to be false, and no obstacle where it could not
see it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An engine whose promises a study judges. Raises `UsageError` for invalid fields."""

    title: str
    """Its name."""
    variant: str
    """The variant that has it."""
    proof: dict[str, Any]
    """Path of kernels_check to what it must show: true, a word, or one of "any", "less" and "not false"."""
    needs: Literal["", "cuda"] = ""
    """A device without which there is nothing to measure."""
    package: str = ""
    """Distribution whose version belongs to a result."""
    flag: str = ""
    """The usual option of a training script for it, in braces, for messages."""

    def __post_init__(self) -> None:
        require(self.title and self.variant, "[engine]: title and variant are needed. Add them.")
        for key in ("title", "package", "flag"):
            limits.check_word("[engine]", key, getattr(self, key))
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

    @property
    def example(self) -> str:
        """A script with it and without it, as one would ask for it."""
        return f"'python train.py {self.flag or '{--flag}'}'"

    def obstacle(self, device: str) -> str:
        """Why there is nothing to measure on a device ("cpu" or "cuda"); empty where there is."""
        if not self.needs or device == self.needs:
            return ""
        return f"{self.title} runs on a GPU only and this machine measures on the CPU; measure it on a machine with one"
