"""Runs docs/extending.md: applies each example to a scratch copy of the packages and runs the example's commands there.

The test recognises four forms on the page:

    New file `PATH`:                        the fenced block that follows becomes that file
    In `PATH`, after the line `TEXT`:       the block is inserted after the only line with this text
    In `PATH`, the line `TEXT` becomes:     the block replaces that line
    a block of `console`                    lines with `$` are run; their output must contain the lines below them
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
RUN = sorted((ROOT / "reports").glob("*_lora-or-qlora"))[-1].name
"""The committed run that the examples read: the latest of the default study."""
TOKENS = re.compile(
    r"^## (?P<title>[^\n]+)$"
    r"|^(?:New file|In) `(?P<path>[^`]+)`(?:, (?P<how>after the line|the line) `(?P<line>[^\n]+)`(?: becomes)?)?:$"
    r"|^```(?P<kind>\w*)\n(?P<block>(?s:.*?))\n?^```$",
    re.MULTILINE,
)
COUNTED = re.compile(r"^\| (?P<what>[^|]+?) +\| +(?P<files>\d+) +\|")


@dataclass
class Example:
    """One section of the page."""

    title: str
    edits: list[tuple[str, str, str, str]] = field(default_factory=list)
    """Path, how ("new", "after the line", "the line"), the line, the block."""
    commands: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def files(self) -> set[str]:
        """The existing files of the project that the example edits; files that the reader creates do not count."""
        return {path for path, *_ in self.edits if path.startswith(("harness/", "kernels_check/"))}


def read_examples() -> list[Example]:
    found: list[Example] = []
    pending: tuple[str, str, str] | None = None
    for match in TOKENS.finditer(PAGE.read_text(encoding="utf-8")):
        if match["title"]:
            found.append(Example(match["title"]))
        elif match["path"]:
            pending = match["path"], match["how"] or "new", match["line"] or ""
        elif match["kind"] == "console":
            for line in filter(None, match["block"].splitlines()):
                if line.startswith("$ "):
                    found[-1].commands.append((line.removeprefix("$ "), []))
                else:
                    found[-1].commands[-1][1].append(line)
        elif pending is not None:
            found[-1].edits.append((*pending, match["block"]))
            pending = None
    return [example for example in found if example.edits]


def apply(example: Example, folder: Path) -> None:
    """Apply the edits of an example to a copy of the packages."""
    for path, how, line, block in example.edits:
        target = folder / path
        if how == "new":
            assert not target.exists(), f"{path} exists already"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block + "\n", encoding="utf-8")
            if target.name == "pyproject.toml":
                register(tomllib.loads(block)["project"], folder)
            continue
        lines = target.read_text(encoding="utf-8").splitlines()
        places = [number for number, text_line in enumerate(lines) if text_line.strip() == line]
        assert len(places) == 1, f"{path}: the line `{line}` occurs {len(places)} times"
        (place,) = places
        lines[place : place + 1] = block.splitlines() if how == "the line" else [lines[place], *block.splitlines()]
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def register(project: dict, folder: Path) -> None:
    """Write the metadata that pip would install for a package, beside its modules."""
    metadata = folder / f"{project['name']}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        line
        for group, points in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))


LONG = ("A path of kernels_check", "A field of a variant", "A quantisation", "A measurement")
"""Examples that load torch; `make test` skips them."""


@pytest.fixture(scope="module")
def extended_copy(tmp_path_factory):
    """A copy of the packages with all examples applied, and a run for the examples to read."""
    folder = tmp_path_factory.mktemp("extended")
    for package in ("harness", "kernels_check"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("*.pyc.*"))
    shutil.copytree(ROOT / "reports" / RUN, folder / "runs" / "example")
    for example in read_examples():
        apply(example, folder)
    return folder


def param(example):
    marks = pytest.mark.selftest if example.title in LONG else ()
    return pytest.param(example, id=example.title, marks=marks)


@pytest.mark.parametrize("example", [*map(param, read_examples())])
def test_the_commands_of_an_example_print_the_shown_output(example, extended_copy):
    """The commands of an example print what the page shows."""
    assert example.commands
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(extended_copy / "harness"), str(extended_copy)]),
        "COLUMNS": "200",
        "NO_COLOR": "1",
    }
    for command, expected in example.commands:
        words = [sys.executable if word == "python" else word for word in shlex.split(command)]
        if words[0] == "lorameter":
            words[:1] = [sys.executable, "-m", "lorameter.cli"]
        done = subprocess.run(words, cwd=extended_copy, env=environment, capture_output=True, text=True, timeout=600)
        printed = done.stdout + done.stderr
        for line in expected:
            assert line.strip() in printed, f"$ {command}\n{printed}\nlacks: {line.strip()}"


def test_the_page_counts_its_own_files():
    """The table at the top of the page gives the number of project files that each example edits."""
    counted = {
        match["what"]: int(match["files"]) for line in PAGE.read_text().splitlines() if (match := COUNTED.match(line))
    }
    assert counted == {example.title: len(example.files) for example in read_examples()}
