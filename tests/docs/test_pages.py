"""Executes the pages: commands print the lines below them, studies can be loaded, and all commands are known."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from lorameter.cli import main
from lorameter.commands.parser import build_parser
from lorameter.studies.study_file import load_study
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
        "data",
        "troubleshooting",
    )
)
FILE = re.compile(r"^`(?P<name>[\w.-]+)`:\n\n```\w+\n(?P<content>.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?P<path>[\w./-]+)\)")
PARSED = ("concepts", "checks", "study", "engines", "machines", "own-script", "own-script-ab")
WITHOUT_OUTPUT = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in PARSED))
"""Pages whose commands are parsed and not run."""
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page, kind):
    """Return the text of each block of a kind."""
    return [part.split("\n```", 1)[0] for part in page.read_text(encoding="utf-8").split(f"```{kind}\n")[1:]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the constructed runs that the pages name."""
    runs = tmp_path / ".lorameter" / "runs"
    shutil.copytree(RUNS, runs)
    for study in (ROOT / "docs" / "examples").glob("*.toml"):
        shutil.copy(study, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("LORAMETER_RUNS", raising=False)
    return tmp_path


@each_page
def test_commands_print_the_lines_below_them(page, folder, capsys):
    """Each line of the page is, in order, in the output of the command above it."""
    for found in FILE.finditer(page.read_text(encoding="utf-8")):
        (folder / found["name"]).write_text(found["content"], encoding="utf-8")
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    assert lines
    printed = ""
    for line in lines:
        if line.startswith("$ lorameter "):
            assert main(shlex.split(line)[2:]) != 70
            output = capsys.readouterr()
            printed = " ".join((output.out + output.err).split())
        else:
            assert " ".join(line.split()) in printed, line


@pytest.mark.parametrize("name", ["machines", "own-script-ab"])
def test_every_study_can_be_loaded(name, tmp_path):
    """Each TOML block of a page can be loaded; a single table is completed by a variant."""
    for text in blocks(ROOT / "docs" / f"{name}.md", "toml"):
        path = tmp_path / "study.toml"
        path.write_text(text if "[[variant]]" in text else f'{text}\n[[variant]]\nname = "plain"\n', encoding="utf-8")
        load_study(str(path))


every_page = pytest.mark.parametrize("page", [*PAGES, *WITHOUT_OUTPUT], ids=lambda page: page.stem)


@every_page
def test_every_command_is_known(page):
    """The parser accepts every line of a shell block."""
    for line in (line for block in blocks(page, "sh") for line in block.splitlines()):
        program, *words = shlex.split(line, comments=True)
        assert program in ("lorameter", "pip", "pytest")
        if program == "lorameter":
            build_parser().parse_args(words)


@every_page
def test_links_lead_to_pages(page):
    """Each relative link is a file of the project."""
    for found in LINK.finditer(page.read_text(encoding="utf-8")):
        assert (page.parent / found["path"]).exists(), found["path"]


def test_messages_of_the_troubleshooting_are_those_of_the_program():
    """Each quoted fragment is in a source file."""
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
