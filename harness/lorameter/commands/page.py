"""The page for a browser that a command writes beside what it prints: `--html FILE`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorameter.errors import UsageError

if TYPE_CHECKING:
    from lorameter.records.store import Run
    from lorameter.report.blocks import Document
    from lorameter.report.figure import Figure
    from lorameter.report.run_view import RunView


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
    from kernels_check.terminal import print_stderr
    from lorameter.report.html.page import save_html, write_html

    check_page(path)
    page = write_html(document, title=title, names=names, figures=figures, again=again)
    print_stderr(f"page: {save_html(page, path)}")


def save_run_page(path: str | None, run: Run, view: RunView, document: Document) -> None:
    """The page of a run: its report, its figures, and how to repeat it."""
    if path is None:
        return
    from lorameter.report.figures import figures_of_run
    from lorameter.report.reproduce import reproduction_steps

    figures, again = figures_of_run(run, view), reproduction_steps(run)
    save_page(path, document, view.title, names=view.variants, figures=figures, again=again)
