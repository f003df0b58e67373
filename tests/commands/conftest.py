"""A fixture that runs the command line in a folder with a script that has steps but no model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lorameter import cli

TESTS = Path(__file__).parents[1]


@pytest.fixture
def scripted(tmp_path, monkeypatch, capsys):
    """A function that runs a command and returns exit code, standard output and standard error."""
    shutil.copy(TESTS / "run" / "scripted.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAMETER_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("PYTHONPATH", f"{TESTS.parent / 'harness'}:{TESTS.parent}")

    def run(*words):
        code = cli.main(list(words))
        output = capsys.readouterr()
        return code, output.out, output.err

    return run
