"""What commands print: one JSON document, or a report as text, Markdown, annotations of a GitHub job, a page."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels_check.terminal import print_stderr
from lorameter.errors import UsageError
from lorameter.records.store import Run
from lorameter.report.blocks import Document, Figure
from lorameter.report.figures import figures_of_run
from lorameter.report.html.page import save_html, write_html
from lorameter.report.reproduce import reproduction_steps
from lorameter.report.run_view import RunView

if TYPE_CHECKING:
    from lorameter.report.blocks import Document

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


def check_page(path: str | None, option: str = "--html") -> None:
    """Refuse, before anything is measured, a file that could not be written, by the option that named it."""
    if path is None:
        return
    folder = Path(path).absolute().parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        what = "is a folder" if Path(path).is_dir() else f"{folder} is no folder that can be written into"
        raise UsageError(f"{option} {path}: {what}. Name a file in a folder that is there.")


def save_page(
    path: str | None,
    document: Document,
    title: str,
    *,
    names: Sequence[str] = (),
    figures: Sequence[Figure] = (),
    again: str = "",
) -> None:
    """Write the page of a report where a file is named for it, and say where it is."""
    if path is None:
        return

    check_page(path)
    page = write_html(document, title=title, names=names, figures=figures, again=again)
    print_stderr(f"page: {save_html(page, path)}")


def save_run_page(path: str | None, run: Run, view: RunView, document: Document) -> None:
    """The page of a run: its report, its figures, and how to repeat it."""
    if path is None:
        return

    figures, again = figures_of_run(run, view), reproduction_steps(run)
    save_page(path, document, view.study.title, names=view.variants, figures=figures, again=again)
