"""Answers of a trained adapter, one panel a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from harness.sample import Sample


def print_samples(samples: Sequence[Sample], title: str, console: Console) -> None:
    """Prompt, reference, and the model's answers before and after training."""
    console.print(Text(title, style="bold"))
    for number, sample in enumerate(samples):
        end = "ended by the model" if sample.ended else "cut at the limit"
        body = Text()
        for head, text in (
            ("prompt", sample.prompt),
            ("reference", sample.reference),
            ("before training", "not measured" if sample.untrained is None else sample.untrained),
            (f"after training, {sample.tokens} tokens, {end}", sample.trained),
        ):
            body.append(f"{head}\n", style="dim")
            body.append(f"{text.strip() or '(nothing)'}\n\n")
        body.rstrip()
        console.print(Panel(body, title=f"prompt {number}", title_align="left"))
