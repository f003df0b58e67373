"""Reports on a terminal in colour; in a pipe as plain text."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterator
from typing import Literal

from rich.console import Console

from lorameter.report.blocks import Collapsible, Document, Line, Section
from lorameter.report.render_rich import draw_text, render_block

PIPED_WIDTH = 200
"""Nothing may be cut where there is no terminal whose width one could ask."""


FOLDED = "--verbose shows full notices and statistics."


def console_for(file: object | None = None, *, stderr: bool = False) -> Console:
    """A console that knows whether it is a terminal. Otherwise the text is plain, and as wide as $COLUMNS says, else
    `PIPED_WIDTH`."""
    console = Console(file=file, stderr=stderr, highlight=False)  # type: ignore[arg-type]
    if not console.is_terminal:
        width = None if os.environ.get("COLUMNS", "").isdigit() else PIPED_WIDTH
        console = Console(file=file, stderr=stderr, highlight=False, width=width, no_color=True)  # type: ignore[arg-type]
    return console


def show(document: Document, console: Console, *, verbose: bool = False) -> None:
    """Print a report and repeat its verdict below it; `verbose` unfolds what is folded."""
    for block in document:
        for drawn in render_block(block, console, verbose=verbose):
            console.print(drawn)
    if not verbose and any(isinstance(block, Collapsible) for block in document):
        console.print(draw_text(FOLDED, "faint"))
    for block in _last(document):
        for drawn in render_block(block, console, verbose=verbose):
            console.print(drawn)


def _last(document: Document) -> Iterator[Section]:
    """What is repeated below a report, so that a reader of a long one need not scroll up."""
    for block in document:
        if isinstance(block, Section) and block.last:
            yield dataclasses.replace(block, blank_line_before=True)
    found = [
        block.lines if isinstance(block, Section) else [block]
        for block in document
        if isinstance(block, (Line, Section))
    ]
    if lines := tuple(line for lines in found for line in lines if line.last):
        yield Section(title="", lines=lines, blank_line_before=False)


def text_of(document: Document, *, width: int, coloured: bool, verbose: bool = False) -> str:
    """A report as the text that a terminal of that width would be sent."""
    text = io.StringIO()
    colours: Literal["auto"] | None = "auto" if coloured else None
    console = Console(file=text, force_terminal=coloured, color_system=colours, width=width, highlight=False)
    show(document, console, verbose=verbose)
    return text.getvalue()
