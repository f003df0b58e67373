"""The command line, in a folder that holds a script which has steps and no model."""

from __future__ import annotations

import shutil
import sys
import venv
from pathlib import Path

import pytest

from lorameter import cli

TESTS = Path(__file__).parents[1]


@pytest.fixture
def scripted(tmp_path, monkeypatch, capsys):
    """A function that takes the words of a command; gives exit code, standard output and standard error."""
    shutil.copy(TESTS / "run" / "scripted.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAMETER_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("PYTHONPATH", f"{TESTS.parent / 'harness'}:{TESTS.parent}")

    def run(*words):
        code = cli.main(list(words))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def other_python(tmp_path):
    """An interpreter that has what the present one has, and another version of peft in front of it."""
    venv.create(tmp_path / "env")
    (packages,) = (tmp_path / "env").glob("lib/*/site-packages")
    (packages / "present.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    (packages / "peft-99.1.dist-info").mkdir()
    (packages / "peft-99.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 99.1\n")
    return str(tmp_path / "env" / "bin" / "python")
