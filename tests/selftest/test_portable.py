"""The tests run as other CPUs would run them: what is counted, what is kept, and what is not called passed."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def portable(program):
    return program("portable")


@pytest.fixture
def root(tmp_path):
    """A repository whose tests pass, fail, are skipped and break in their fixture, by what they find around them."""
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "test_own.py").write_text(
        "import os, pytest\n"
        "def test_planted(): assert os.environ['PLANTED'] == '1'\n"
        "def test_other(): assert os.environ['PLANTED'] == '2', 'not here'\n"
        "def test_left(): pytest.skip('no such device')\n"
        "@pytest.fixture\ndef broken(): raise ValueError('in its fixture')\n"
        "def test_broken(broken): pass\n"
    )
    for words in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    return tmp_path


def test_what_became_of_each_test_is_counted(portable, root, monkeypatch):
    """Passed, failed with why, skipped; and only in surroundings that are in force."""
    monkeypatch.setattr(portable, "OPTIONS", ("-p", "no:lorameter", "-p", "no:hypothesispytest"))
    setting = portable.Setting(name="one", variables=(("PLANTED", "1"),), tests=("test_own.py",))
    found = portable.try_setting(setting, root)
    assert (found.passed, found.failed, found.skipped, found.reason, found.good) == (1, 2, 1, "", False)
    other, broken = sorted(found.broken, reverse=True)
    assert "test_other: AssertionError: not here" in other
    assert "in its fixture" in broken
    lacking = portable.Setting(name="none", probe="assert False, 'no such registers'", tests=("test_own.py",))
    assert portable.try_setting(lacking, root).reason == (
        "not in force on this machine: AssertionError: no such registers"
    )
    nothing = portable.try_setting(portable.Setting(name="empty", tests=("no_such_file.py",)), root)
    assert (nothing.reason.startswith("pytest ended with 4"), nothing.good) == (True, False)


def test_what_was_found_on_other_files_is_not_taken_over(portable, root, tmp_path):
    """Another byte in any file is another state; a half line at the end, of an end by force, is none."""
    file, files = tmp_path / "kept.jsonl", portable.hash_of_files(root)
    portable.Kept(file, files).add("one", 1, portable.Found(passed=3, broken=("a: why",)))
    with file.open("a") as more:
        more.write('{"files": ')
    again = portable.Kept(file, files)
    assert again.found == {("one", 1): portable.Found(passed=3, broken=("a: why",))}
    again.add("one", 2, portable.Found(reason="no"))
    assert set(portable.Kept(file, files).found) == {("one", 1), ("one", 2)}
    (root / "test_own.py").write_text("def test_planted(): pass\n")
    assert portable.hash_of_files(root) != files
    assert not portable.Kept(file, portable.hash_of_files(root)).found


def test_all_runs_must_have_been_made(portable, capsys):
    """A run that failed, was not in force, came to no end or was never made is no pass."""
    setting = portable.Setting(name="one", rounds=2)
    kept = portable.Kept(None, "")
    kept.add("one", 1, portable.Found(passed=5, took_s=90))
    assert portable.report(kept, [setting]) == 1
    assert "one, 2                   not run yet" in capsys.readouterr().out
    for bad in (portable.Found(passed=5, failed=1, broken=("a: why",)), portable.Found(), portable.Found(reason="no")):
        kept.add("one", 2, bad)
        assert portable.report(kept, [setting]) == 1
    kept.add("one", 2, portable.Found(passed=5, took_s=120))
    capsys.readouterr()
    assert portable.report(kept, [setting]) == 0
    assert "2 of 2 runs were made and passed" in capsys.readouterr().out


def test_busy_loops_are_there_and_end(portable):
    """As many as were asked for, and none afterwards."""
    with portable.busy(2):
        running = [child for child in psutil.Process().children() if str(os.getpid()) in child.cmdline()]
        assert len(running) == 2
    assert not any(child.is_running() for child in running)


@pytest.mark.parametrize(("asks", "answer"), [("has_avx512bf16", "[False] behind"), ("has_avx", "AttributeError")])
def test_bitsandbytes_sees_a_cpu_without_bfloat16_registers(portable, tmp_path, monkeypatch, asks, answer):
    """In a child process, before any other module has asked; what stood behind on the path runs as well, and a library
    that asks by another name is not taken for planted. That the real one is, each run asks before its tests."""
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("from bitsandbytes import nn\n")
    (tmp_path / "bitsandbytes" / "functional.py").write_text(f"def {asks}(): return True\n")
    (tmp_path / "bitsandbytes" / "nn.py").write_text(
        f"from bitsandbytes.functional import {asks} as asked\nANSWERS = [asked()]\n"
    )
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.BEHIND = 'behind'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (setting,) = (one for one in portable.SETTINGS if one.name == "AVX2")
    done = subprocess.run(
        [sys.executable, "-c", "import bitsandbytes.nn as nn; print(nn.ANSWERS, BEHIND)"],
        env=portable.environment_of(setting), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer in done.stdout + done.stderr


def test_the_selection_is_that_of_make_test(portable):
    """What is run three times is what a developer runs."""
    assert f"pytest {' '.join(portable.TESTS + portable.OPTIONS)}\n" in (ROOT / "Makefile").read_text()
    assert {setting.tests for setting in portable.SETTINGS} == {portable.TESTS}
