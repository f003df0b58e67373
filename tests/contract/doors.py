"""The public interfaces that the contract tests call; the only module of these tests that names the import package."""

from __future__ import annotations

import contextlib
import html.parser
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lorameter
from lorameter.cli import main

METER_IMPORT = "from lorameter.attach import Meter"
"""The line by which a script imports the meter."""
COMMANDS = (
    "run", "ab", "calibrate", "bisect", "wrap", "doctor", "estimate", "profile", "parity", "report", "list", "model",
    "model fetch", "compare", "gate", "accept", "sample", "claims", "export", "history", "prune", "pack", "init",
    "completion",
)  # fmt: skip
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STUDY = HERE / "study.toml"
SCRIPT = HERE / "script.py"
BIN = Path(sys.executable).parent


def load(*arguments: object) -> Any:
    """Call `load` of the public API."""
    return lorameter.load(*arguments)


def load_all(*arguments: object) -> Any:
    """Call `load_all` of the public API."""
    return lorameter.load_all(*arguments)


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a call."""

    code: int
    out: str
    err: str


def call(line: str) -> int:
    """Run `lorameter LINE` in this process and return its exit code."""
    try:
        return main(shlex.split(line))
    except SystemExit as left:  # argparse exits on an error and after --help
        return int(left.code or 0)


def start(*words: str | Path, **environment: str) -> Outcome:
    """Run a program of this environment in a process, in the current folder; "python" is this interpreter."""
    command = [str(BIN / words[0]), *map(str, words[1:])]
    about = _environment() | environment
    done = subprocess.run(command, env=about, capture_output=True, text=True, check=False, timeout=600)
    return Outcome(done.returncode, done.stdout, done.stderr)


def show(columns: int, *words: str) -> str:
    """Return what a program of this environment prints on a terminal of the given width, without colours."""
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (50, columns))
    about = _environment() | {"TERM": "xterm"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        about.pop(name, None)
    command = [str(BIN / words[0]), *words[1:]]
    with subprocess.Popen(command, env=about, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        pieces = []
        with contextlib.suppress(OSError):  # reading at the end of a terminal fails on Linux
            while piece := os.read(reader, 65536):
                pieces.append(piece)
        process.wait(timeout=600)
    os.close(reader)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", b"".join(pieces).decode())


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    sources = os.pathsep.join(filter(None, [str(ROOT / "harness"), str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PATH": path, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1"}


class Page(html.parser.HTMLParser):
    """The structure of an HTML page: title, headings, ids, table cells, links and external resources."""

    HEADINGS = ("title", "h1", "h2", "h3", "h4", "summary", "caption", "figcaption")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.loaded: list[str] = []
        self._inside: list[str] = []
        self._cells: list[str] = []
        self._text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if "id" in found and "svg" not in self._inside:
            self.lines.append(f"id {found['id']}")
        if tag in ("script", "img", "link", "iframe") and (source := found.get("src") or found.get("href")):
            self.loaded.append(source)
        if tag == "svg":
            self.lines.append(f"svg {found.get('aria-label') or ''}".rstrip())
        if tag == "tr":
            self._cells = []
        if tag in (*self.HEADINGS, "th", "td", "svg", "style", "script"):
            self._inside.append(tag)
            if tag not in ("svg", "style", "script"):
                self._text = []

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr" and any(self._cells):
            self.lines.append("row " + " | ".join(self._cells))
        if not self._inside or self._inside[-1] != tag:
            return
        self._inside.pop()
        text = " ".join("".join(self._text).split())
        if tag in ("th", "td"):
            self._cells.append(text)
        elif tag in self.HEADINGS and "svg" not in self._inside:
            self.lines.append(f"{tag} {text}")

    def handle_data(self, data: str) -> None:
        if self._inside and not {"svg", "style", "script"} & set(self._inside):
            self._text.append(data)
