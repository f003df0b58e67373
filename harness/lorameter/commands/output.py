"""Output of the commands: a result as text, Markdown, annotations of a GitHub job or JSON, and its HTML page.

The format is validated before a command starts, so that hours of measurement do not end with an error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lorameter.errors import require
from lorameter.records import codec
from lorameter.records.os_errors import translate_write_errors
from lorameter.report.blocks import Document, Span, to_line
from lorameter.report.html.page import save_html, write_html
from lorameter.report.render_markdown import SUMMARY_BYTES, to_markdown
from lorameter.report.terminal import console_for, show
from lorameter.terminal import escape_control_chars, print_stderr

ENV_SUMMARY = "GITHUB_STEP_SUMMARY"
SCHEMA = 2
"""Version of the JSON documents of all commands (docs/json.md). 1: first form. 2: numbers in addition to text."""


def choose_format(options: argparse.Namespace) -> str:
    """Return text, json, markdown or github. Raises `UsageError` if two options select different formats."""
    values = vars(options)
    formats = {
        "--json": "json" if values.get("json") else None,
        "--markdown": "markdown" if values.get("markdown") else None,
        f"--format {values.get('format')}": values.get("format"),
    }
    selected = {option: form for option, form in formats.items() if form is not None}
    require(len(set(selected.values())) <= 1, f"{' and '.join(selected)} both choose the format. Give one of them.")
    return next(iter(selected.values()), "text")


def check_output(options: argparse.Namespace) -> None:
    """Raise `UsageError` for two formats, and for a page that cannot be written."""
    if "markdown" in vars(options):  # the --format of an export refers to its file
        choose_format(options)
    check_page(vars(options).get("html"))


def check_page(path: str | None, option: str = "--html") -> None:
    """Raise `UsageError`, with the name of the option, for a page that cannot be written."""
    if path is None:
        return
    folder = Path(path).absolute().parent
    problem = "is a folder" if Path(path).is_dir() else f"{folder} is not a writable folder"
    require(
        not Path(path).is_dir() and folder.is_dir() and os.access(folder, os.W_OK),
        f"{option} {path}: {problem}. Name a file in an existing folder.",
    )


def show_result(
    options: argparse.Namespace,
    document: Document,
    data: Callable[[], dict[str, Any]],
    *,
    annotations: Callable[[], Iterable[str]] = list,
    page: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Print a result in the format of the options, and write its HTML page if one is given.

    Args:
        options: options of the command.
        document: the report for users.
        data: makes the JSON document, without its schema.
        annotations: makes the annotations of a GitHub job, one per line.
        page: makes the arguments of `write_html` for the page.
    """
    form = choose_format(options)
    if form == "json":
        print_json(data())
    elif form == "markdown":
        sys.stdout.write(to_markdown(document))
    elif form == "github":
        sys.stdout.writelines(f"{line}\n" for line in annotations())
        sys.stdout.flush()
        _add_to_summary(document)
    else:
        show(document, console_for(), verbose=vars(options).get("verbose"))
    save_page(vars(options).get("html"), document, page)


def save_page(path: str | None, document: Document, page: Callable[[], dict[str, Any]]) -> None:
    """Write the page of a report to a file, if one is given, and print its path."""
    if path is not None:
        print_stderr(f"page: {save_html(write_html(document, **page()), path)}")


def _add_to_summary(document: Document) -> None:
    """Append the report to the summary of a GitHub job. A summary that cannot be written is an error, since its reader
    would otherwise miss a failed comparison."""
    if not (summary := os.environ.get(ENV_SUMMARY)):
        return
    with (
        translate_write_errors(f"${ENV_SUMMARY} = {summary}", "Name a file, or unset it."),
        Path(summary).open("a", encoding="utf-8") as file,
    ):
        file.write(to_markdown(document, max_characters=SUMMARY_BYTES // 4))  # a character has at most four bytes


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document with its schema, without NaN, in ASCII: safe for any stream and any terminal."""
    print(json.dumps(codec.to_json({"schema": SCHEMA, **document}), allow_nan=False))


def print_result(options: argparse.Namespace, text: str, data: dict[str, Any]) -> None:
    """Print a result of a few lines of plain text, or its JSON document."""
    if options.json:
        print_json(data)
    else:
        print(escape_control_chars(text))


def print_progress(text: str) -> None:
    """Print a faint line on standard error."""
    show((to_line(Span(text=text, tone="faint"), indented=False),), console_for(stderr=True))
