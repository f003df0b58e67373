"""The pages for tasks are executed: commands print what stands below them, and whatever can be typed is known."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from lorameter.cli import main
from lorameter.commands.parser import build_parser
from tests.constructed import RUNS

ROOT = Path(__file__).parents[2]
PAGES = tuple(
    ROOT / "docs" / f"{name}.md"
    for name in (
        "tutorial",
        "measure-my-model",
        "compare-versions",
        "read-a-verdict",
        "when-not-to-trust",
        "parity",
        "troubleshooting",
    )
)
FILE = re.compile(r"^`(?P<name>[\w.-]+)`:\n\n```\w+\n(?P<content>.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?P<path>[\w./-]+)\)")
WITHOUT_OUTPUT = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("concepts", "checks", "study")))
"""Pages whose commands are only parsed."""
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page, kind):
    """The text of each block of a kind."""
    return [part.split("\n```", 1)[0] for part in page.read_text(encoding="utf-8").split(f"```{kind}\n")[1:]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in which one stands, with the constructed runs that the pages name."""
    runs = tmp_path / ".lorameter" / "runs"
    shutil.copytree(RUNS, runs)
    for study in (ROOT / "docs" / "examples").glob("*.toml"):
        shutil.copy(study, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("LORAMETER_RUNS", raising=False)
    return tmp_path


@each_page
def test_commands_print_what_stands_below_them(page, folder, capsys):
    """In order, each line of the page in one of what was printed."""
    for found in FILE.finditer(page.read_text(encoding="utf-8")):
        (folder / found["name"]).write_text(found["content"], encoding="utf-8")
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    assert lines
    printed = ""
    for line in lines:
        if line.startswith("$ lorameter "):
            assert main(shlex.split(line)[2:]) != 70
            said = capsys.readouterr()
            printed = " ".join((said.out + said.err).split())
        else:
            assert " ".join(line.split()) in printed, line


every_page = pytest.mark.parametrize("page", [*PAGES, *WITHOUT_OUTPUT], ids=lambda page: page.stem)


@every_page
def test_what_can_be_typed_is_known(page):
    """Every line of a shell is a command with options that there are."""
    for line in (line for block in blocks(page, "sh") for line in block.splitlines()):
        words = shlex.split(line)
        assert words[0] == "lorameter"
        build_parser().parse_args(words[1:])


@every_page
def test_links_lead_to_pages(page):
    """Each relative link is a file of the project."""
    for found in LINK.finditer(page.read_text(encoding="utf-8")):
        assert (page.parent / found["path"]).exists(), found["path"]


def test_messages_of_the_troubleshooting_are_said_by_the_program():
    """Each of its fragments stands in a source file, or it would help nobody."""
    page = PAGES[-1].read_text(encoding="utf-8")
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for room in ("harness", "kernels_check")
        for path in (ROOT / room).rglob("*.py")
    )
    joined = re.sub(r'"\n\s+f?"', "", sources).lower()
    for cell in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE):
        for words in re.findall("`([^`]+)`", cell):
            assert words.lower() in joined, words
