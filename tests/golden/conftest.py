"""Golden tests: what users and other programs rely on, held byte for byte while everything behind the doors may move.

Only doors are called: `harness.cli:main`, `python -m kernels_check`, and pytest with the plugin. What they answer is
kept under expected/, one file a command line, and is renewed by `LORAMETER_GOLDEN=write pytest tests/golden` and by
nothing else: a file that is missing is a failure. Adding a case is adding its command line to a table.

Text is compared as it is; it shows few digits. Floats in JSON are kept with 10 significant digits and count as equal
where they differ by no more than one unit of the last, because the last bits depend on the CPU.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXPECTED = HERE / "expected"
CONSTRUCTED = ("runs", "damaged", "files", "profiles")
DIGITS = 10
ENVIRONMENT = {"TZ": "UTC", "COLUMNS": "160", "LINES": "50", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1", "TERM": "dumb"}
REMOVED = (
    "FORCE_COLOR CLICOLOR_FORCE PY_COLORS TTY_COMPATIBLE TTY_INTERACTIVE JUPYTER_COLUMNS CI GITHUB_ACTIONS "
    "BUILD_NUMBER GITHUB_STEP_SUMMARY LORAMETER_RUNS PYTEST_ADDOPTS PYTEST_XDIST_WORKER PYTHONWARNINGS"
).split()


@dataclass(frozen=True)
class Outcome:
    """What a door answered."""

    code: int
    out: str
    err: str = ""


def load(name: str) -> ModuleType:
    """A helper of this folder; tests are imported by path, so it has no package."""
    spec = importlib.util.spec_from_file_location(f"golden_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(folder: Path) -> Path:
    """A folder to stand in, with copies of all constructed files and of the reports' runs."""
    for name in CONSTRUCTED:
        shutil.copytree(HERE / name, folder / name)
    for report in sorted((ROOT / "reports").glob("2*/manifest.json")):
        shutil.copytree(report.parent, folder / "reports" / report.parent.name)
    return folder


@pytest.fixture(scope="session")
def filled(tmp_path_factory):
    """The folder that commands stand in which write nothing."""
    return fill(tmp_path_factory.mktemp("golden"))


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A folder of this test alone, for commands that write."""
    monkeypatch.chdir(fill(tmp_path / "own"))
    return Path.cwd()


@pytest.fixture(autouse=True)
def settled(filled, monkeypatch, tmp_path):
    """Paths are relative, the clock shows UTC, and neither a terminal nor a CI is there."""
    for name in REMOVED:
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LORAMETER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(filled)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def lorameter(capsys) -> Callable[[str], Outcome]:
    """The command line, in this process."""

    def called(line: str) -> Outcome:
        from harness.cli import main

        capsys.readouterr()
        try:
            code = main(shlex.split(line))
        except SystemExit as left:  # argparse's own way to refuse
            code = int(left.code or 0)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return called


@pytest.fixture
def kernels_check(capsys, monkeypatch) -> Callable[[str], Outcome]:
    """`python -m kernels_check`, in this process."""

    def called(line: str) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["kernels_check", *shlex.split(line)])
        with pytest.raises(SystemExit) as left:
            runpy.run_module("kernels_check", run_name="__main__")
        out, err = capsys.readouterr()
        return Outcome(int(left.value.code or 0), out, err)

    return called


@pytest.fixture
def suite_of_benchmarks(filled) -> Callable[..., Outcome]:
    """`pytest benchmarks/` in a process of its own, with the code of this checkout."""

    def called(*options: str) -> Outcome:
        words = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), "-p", "no:cacheprovider", *options]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(words, cwd=filled, env=environment, capture_output=True, text=True, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return called


@pytest.fixture
def internals() -> ModuleType:
    """The one helper that knows names behind the doors."""
    return load("internals")


@pytest.fixture
def holds() -> Callable[[str, Outcome], None]:
    """Compares what a command line answered with what is kept of it, or renews that where it is asked for."""

    def held(line: str, outcome: Outcome) -> None:
        assert outcome.code != 70, f"a defect is not kept: {outcome.err}"
        as_json = "--json" in line or "--format json" in line
        target = EXPECTED / f"{file_name(line)}.{'json' if as_json else 'txt'}"
        kept = _kept(target)
        found = _document(line, outcome, kept) if as_json else _text(line, outcome)
        if os.environ.get("LORAMETER_GOLDEN") == "write":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(found, encoding="utf-8")
            return
        assert kept is not None, f"{target} is missing. LORAMETER_GOLDEN=write writes it; found:\n{found}"
        if found != kept:
            lines = difflib.unified_diff(kept.splitlines(), found.splitlines(), "kept", "found", lineterm="", n=2)
            pytest.fail(f"{line!r} answers otherwise than {target}:\n" + "\n".join(list(lines)[:200]), pytrace=False)

    return held


def file_name(line: str) -> str:
    """Folder and name of what is kept of a command line: its first word, and the others."""
    first, *rest = shlex.split(line.replace(" --runs-dir runs", "").replace(" --json", ""))
    words = "_".join(word.removeprefix("--") for word in rest)
    return f"{first}/{re.sub(r'[^A-Za-z0-9.=_-]+', '-', words) or first}"


def _kept(target: Path) -> str | None:
    return target.read_text(encoding="utf-8") if target.is_file() else None


def _text(line: str, outcome: Outcome) -> str:
    parts = [f"$ {line}", f"exit code {outcome.code}", "--- stdout", outcome.out.rstrip("\n")]
    return "\n".join([*parts, "--- stderr", outcome.err.rstrip("\n")]) + "\n"


def _document(line: str, outcome: Outcome, kept: str | None) -> str:
    read = json.loads(outcome.out, parse_constant=_refused) if outcome.out else None
    found = {"command": line, "exit_code": outcome.code, "stderr": outcome.err.splitlines(), "document": read}
    before = json.loads(kept) if kept is not None else None
    return json.dumps(agreed(found, before), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _refused(word: str) -> Any:
    raise AssertionError(f"{word} is no JSON")


def agreed(found: Any, kept: Any) -> Any:
    """What was found, with floats rounded, and those that are equal as far as counts written as they are kept."""
    if isinstance(found, dict):
        others = kept if isinstance(kept, dict) else {}
        return {key: agreed(value, others.get(key)) for key, value in found.items()}
    if isinstance(found, list):
        others = kept if isinstance(kept, list) and len(kept) == len(found) else [None] * len(found)
        return [agreed(value, other) for value, other in zip(found, others, strict=True)]
    if isinstance(found, float) and math.isfinite(found):
        one = 10.0 ** (1 - DIGITS)
        same = isinstance(kept, float) and math.isclose(found, kept, rel_tol=one, abs_tol=1e-13)
        return kept if same else float(f"{found:.{DIGITS}g}")
    return found
