"""What commands print: one JSON document, or what a gate made of a comparison in one of four formats."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError

if TYPE_CHECKING:
    from harness.verdicts.gate import GateResult


FORMATS = ("text", "json", "markdown", "github")
ENV_SUMMARY = "GITHUB_STEP_SUMMARY"


def show_gate(result: GateResult, form: str) -> None:
    """Print what the gate made of a comparison: as text, Markdown, or annotations of a GitHub job with its summary."""
    from harness.report.gate import describe_gate, gate_annotations, gate_markdown
    from harness.report.terminal import console_for, show

    if form == "text":
        show(describe_gate(result), console_for())
    elif form == "markdown":
        sys.stdout.write(gate_markdown(result))
    else:
        sys.stdout.write(gate_annotations(result))
        sys.stdout.flush()
        if summary := os.environ.get(ENV_SUMMARY):
            try:
                with open(_append_to(summary), "a", encoding="utf-8") as file:
                    file.write(gate_markdown(result))
            except OSError as error:  # whoever looks at the summary alone would see no failure: this is no pass
                raise UsageError(
                    f"${ENV_SUMMARY} = {summary}: cannot be written: {error.strerror}. Name a file, or unset it."
                ) from None


def _append_to(path: str) -> int:
    """A descriptor of a file that grows; a pipe that nobody reads is refused, and not waited for."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def print_json(document: dict[str, Any]) -> None:
    """One JSON document with its schema, without NaN, in ASCII: any stream holds it, and no terminal obeys it."""
    from harness.records import codec

    print(json.dumps(codec.to_json({"schema": 1, **document}), allow_nan=False))
