"""What commands print: one JSON document, or a report as text, as Markdown, or as the annotations of a GitHub job."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lorameter.errors import UsageError

if TYPE_CHECKING:
    from lorameter.report.blocks import Document


FORMATS = ("text", "json", "markdown", "github")
ENV_SUMMARY = "GITHUB_STEP_SUMMARY"
SCHEMA = 2
"""Version of the JSON documents of all commands (docs/json.md). 1: first form. 2: numbers beside what was text only."""


def form_of(options: argparse.Namespace) -> str:
    """The format that the options ask for. Raises `UsageError` where they ask for two."""
    form = getattr(options, "format", None)
    if getattr(options, "markdown", False):
        if form not in (None, "markdown") or options.json:
            other = "--json" if options.json else f"--format {form}"
            raise UsageError(f"--markdown and {other} both choose the format. Give one of them.")
        return "markdown"
    if options.json and form not in (None, "json"):
        raise UsageError(f"--json and --format {form} both choose the format. Give one of them.")
    return "json" if options.json else form or "text"


def show_document(
    document: Document, form: str, *, annotations: Callable[[], str] = lambda: "", verbose: bool = False
) -> None:
    """Print a report: as text, as Markdown, or as annotations of a GitHub job with its summary."""
    from lorameter.records.os_errors import translate_write_errors
    from lorameter.report.render_markdown import SUMMARY_BYTES, markdown_of
    from lorameter.report.terminal import console_for, show

    if form == "text":
        show(document, console_for(), verbose=verbose)
    elif form == "markdown":
        sys.stdout.write(markdown_of(document))
    else:
        sys.stdout.write(annotations())
        sys.stdout.flush()
        if summary := os.environ.get(ENV_SUMMARY):
            text = markdown_of(document, most=SUMMARY_BYTES // 4)
            # Whoever looks at the summary alone would see no failure, so to lose it is no pass.
            with (
                translate_write_errors(f"${ENV_SUMMARY} = {summary}", "Name a file, or unset it."),
                open(_append_to(summary), "a", encoding="utf-8") as file,
            ):
                file.write(text)


def _append_to(path: str) -> int:
    """A descriptor of a file that grows; a pipe that nobody reads is refused, and not waited for."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def print_json(document: dict[str, Any]) -> None:
    """One JSON document with its schema, without NaN, in ASCII: any stream holds it, and no terminal obeys it."""
    from lorameter.records import codec

    print(json.dumps(codec.to_json({"schema": SCHEMA, **document}), allow_nan=False))
