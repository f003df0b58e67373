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


def test_it_is_imported_by_another_thread_with_its_follower_and_the_watch(said):
    """All that it needs once there is a training, and the thread is gone."""
    program = """
        import sys, threading, torch
        from lorameter.attach.deferred_import import load
        print(load("wanted").here, "later" in sys.modules, "kernels_check.step_watch" in sys.modules)
        print(threading.active_count(), load("wanted") is sys.modules["wanted"])
    """
    assert said(program, wanted=WHERE, later=WHERE) == ["False", "True", "True", "1", "True"]


@pytest.mark.faults
def test_within_an_import_nobody_waits_for_the_other(said):
    """The module under way is what the one that is loaded needs: another thread would wait for its lock for ever."""
    under_way = 'from lorameter.attach.deferred_import import load; here = load("wanted").here'
    program = "import torch, under_way; print(under_way.here)"
    assert said(program, under_way=under_way, wanted=f"import under_way; {WHERE}", later="") == ["True"]


@pytest.mark.faults
@pytest.mark.parametrize("broken", ["wanted", "later"])
def test_an_error_of_the_module_is_the_callers(said, broken):
    """That of the others is told when they are needed."""
    program = """
        import torch
        from lorameter.attach.deferred_import import load
        try:
            print(load("wanted").here)
        except ZeroDivisionError:
            print("told")
    """
    modules = {"wanted": WHERE, "later": WHERE, broken: "1 / 0"}
    assert said(program, **modules) == ["told" if broken == "wanted" else "False"]


def test_what_must_be_imported_by_the_main_thread_is(said):
    """Some modules set a handler of signals, which no other thread may."""
    program = "import torch; from lorameter.attach.deferred_import import load; print(load('wanted').here)"
    handler = f"{WHERE}\nimport signal; signal.signal(signal.SIGUSR1, signal.SIG_DFL)"
    assert said(program, wanted=handler, later="") == ["True"]


def test_where_torch_is_not_there_yet_it_is_an_import_as_any(said):
    """A script that imports its meter first: nothing is there yet that could lie between its pieces."""
    program = "from lorameter.attach.deferred_import import load; print(load('wanted').here)"
    assert said(program, wanted=WHERE, later="") == ["True"]
