"""docs/data.md is executed: its files are written, and its commands print what stands below them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from lorameter.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
FILE = re.compile(r"^`(?P<name>[\w.]+)`:\n\n```\w+\n(?P<content>.*?)^```$", re.DOTALL | re.MULTILINE)
CONSOLE = re.compile(r"^```console\n(?P<lines>.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_page_says_what_is_printed(tmp_path, monkeypatch, capsys):
    """Each command, in a folder with the page's files."""
    text = PAGE.read_text(encoding="utf-8")
    for found in FILE.finditer(text):
        (tmp_path / found["name"]).write_text(found["content"], encoding="utf-8")
    lines = [line for block in CONSOLE.finditer(text) for line in block["lines"].splitlines()]
    assert sum(line.startswith("$ ") for line in lines) == 4
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    printed = ""
    for line in lines:
        if line.startswith("$ "):
            assert main([*shlex.split(line.removeprefix("$ lorameter")), "--runs-dir", "runs"]) in (0, 2)
            said = capsys.readouterr()
            printed = said.out + said.err
        else:
            assert line in printed
