"""What follows a training is loaded by a thread of its own, unless that thread would wait for this one."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHERE = "import threading; here = threading.current_thread() is threading.main_thread()"


@pytest.fixture
def said(tmp_path):
    """What a program with these modules beside it prints."""

    def run(program, **modules):
        for name, text in {"program": program, **modules}.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        command = [sys.executable, "program.py"]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={"PYTHONPATH": f"{ROOT / 'harness'}:{ROOT}", "PATH": "", "LORAMETER_FOLLOWER": "later:Follower"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return run


@pytest.mark.faults
def test_within_an_import_nobody_waits_for_the_other(said):
    """The module under way is what the one that is loaded needs: another thread would wait for its lock for ever."""
    under_way = 'from lorameter.attach.deferred_import import load; here = load("wanted").here'
    program = "import torch, under_way; print(under_way.here)"
    assert said(program, under_way=under_way, wanted=f"import under_way; {WHERE}", later="") == ["True"]
