"""Tests of the commands and options in `--help`."""

import re

import pytest

from tests.contract import doors
from tests.contract.doors import COMMANDS
from tests.contract.expected import check_text

NO_JSON = ("wrap", "model")
"""wrap leaves standard output to the command, and model only has subcommands."""


def test_the_commands(lorameter, monkeypatch):
    """`lorameter --help` lists exactly these commands."""
    monkeypatch.setenv("COLUMNS", "80")
    outcome = lorameter("--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert re.findall(r"^    ([a-z]+)", outcome.out, re.M) == [name for name in COMMANDS if " " not in name]
    check_text("help/lorameter.txt", outcome.out, ignore_space=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_a_command(command, lorameter, monkeypatch):
    """Help exits with 0 and names every option; all commands but two have --json and --runs-dir."""
    monkeypatch.setenv("COLUMNS", "80")
    outcome = lorameter(f"{command} --help")
    assert (outcome.code, outcome.err) == (0, "")
    assert ("--json" in outcome.out) == (command not in NO_JSON)
    check_text(f"help/{command.replace(' ', '-')}.txt", outcome.out, ignore_space=True)


def test_the_version(lorameter):
    """The output is one line with the name of the program."""
    outcome = lorameter("--version")
    assert (outcome.code, outcome.err) == (0, "")
    assert re.fullmatch(r"lorameter \S+\n", outcome.out)


@pytest.mark.parametrize("command", ["", "run", "list"])
def test_help_imports_nothing_heavy(command):
    """The console script runs in a new interpreter."""
    outcome = doors.start("lorameter", *command.split(), "--help", PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rpartition("|")[2].strip() for line in outcome.err.splitlines()}
    assert outcome.code == 0
    assert "argparse" in imported
    assert not {"torch", "numpy", "pandas", "scipy", "rich", "pytest", "psutil"} & imported


@pytest.mark.parametrize("command", ["", "probe", "trace", "selftest"])
def test_the_options_of_kernels_check(command, kernels_check, monkeypatch):
    """`python -m kernels_check COMMAND --help` exits with 0."""
    monkeypatch.setenv("COLUMNS", "80")
    outcome = kernels_check(f"{command} --help")
    assert (outcome.code, outcome.err) == (0, "")
    check_text(f"help/kernels_check-{command or 'main'}.txt", outcome.out, ignore_space=True)
