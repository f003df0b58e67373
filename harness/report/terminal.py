"""Reports on a terminal in colour; piped, as plain and complete text."""

from __future__ import annotations

import io
from typing import Literal

from rich.console import Console

from harness.report.drawing import draw_block, draw_text
from harness.report.table import Document, Fold

PIPED_WIDTH = 200
"""Nothing may be cut where there is no terminal whose width one could ask."""


FOLDED = "Notices and statistics stand in full with --verbose."


def console_for(file: object | None = None, *, stderr: bool = False) -> Console:
    """A console that knows whether it is a terminal; without one it is wide, plain and complete."""
    console = Console(file=file, stderr=stderr, highlight=False)  # type: ignore[arg-type]
    if not console.is_terminal:
        console = Console(file=file, stderr=stderr, highlight=False, width=PIPED_WIDTH, no_color=True)  # type: ignore[arg-type]
    return console


def show(document: Document, console: Console, *, verbose: bool = False) -> None:
    """Print a report; `verbose` says in full what is said in a line, and so does what is no terminal."""
    verbose = verbose or not console.is_terminal
    for block in document:
        for drawn in draw_block(block, console, verbose=verbose):
            console.print(drawn)
    if not verbose and any(isinstance(block, Fold) for block in document):
        console.print(draw_text(FOLDED, "faint"))


def text_of(document: Document, *, width: int, coloured: bool, verbose: bool = False) -> str:
    """A report as the text that a terminal of that width would be sent."""
    text = io.StringIO()
    colours: Literal["auto"] | None = "auto" if coloured else None
    console = Console(file=text, force_terminal=True, color_system=colours, width=width, highlight=False)
    show(document, console, verbose=verbose)
    return text.getvalue()
