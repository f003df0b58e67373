"""docs/data.md is executed: its files are written, and its commands print what stands below them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
FILE = re.compile(r"^`(?P<name>[\w.]+)`:\n\n```\w+\n(?P<content>.*?)^```$", re.DOTALL | re.MULTILINE)
CONSOLE = re.compile(r"^```console\n(?P<lines>.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_page_says_what_is_printed(tmp_path):
    """Each command, in a folder with the page's files."""
    text = PAGE.read_text(encoding="utf-8")
    for found in FILE.finditer(text):
        (tmp_path / found["name"]).write_text(found["content"], encoding="utf-8")
    lines = [line for block in CONSOLE.finditer(text) for line in block["lines"].splitlines()]
    assert sum(line.startswith("$ ") for line in lines) == 5
    environment = os.environ | {"PYTHONPATH": f"{PAGE.parents[1] / 'harness'}:{PAGE.parents[1]}", "COLUMNS": "400"}
    printed = ""
    for line in lines:
        if line.startswith("$ "):
            words = shlex.split(line.removeprefix("$ lorameter"))
            done = subprocess.run(
                [sys.executable, "-m", "lorameter.cli", *words, "--runs-dir", "runs"],
                cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            printed = done.stdout + done.stderr
            assert "Traceback" not in printed
        else:
            assert line in printed
