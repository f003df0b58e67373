"""Tests of the wheel, installed outside the source tree: commands work, and other projects are unaffected."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REPORT = next(ROOT.glob("reports/2*/manifest.json")).parent


def run(*words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTEST_ADDOPTS"}}
    return subprocess.run(
        list(map(str, words)), cwd=cwd, env=environment | variables, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment with the wheel, which is built from the sdist, and the dependencies that are
    installed here."""
    built = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "uv", "build", "--quiet", "--out-dir", built, ROOT, cwd=built)
    assert done.returncode == 0, done.stderr
    (distribution,) = built.glob("*.whl")
    folder = tmp_path_factory.mktemp("environment") / "venv"
    done = run(sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    python = folder / "bin" / "python"
    install = ("-m", "uv", "pip", "install", "--quiet", "--no-deps", "--python", python, distribution)
    done = run(sys.executable, *install, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    return python


def test_the_installed_package_is_imported_and_reads_runs(python, tmp_path):
    """`import lorameter`, `python -m lorameter` and the console script work without the source tree."""
    code = "import lorameter as found, kernels_check; print(found.__file__, found.load.__name__, found.Meter.__name__)"
    imported = run(python, "-c", code, cwd=tmp_path)
    assert imported.stdout.split()[1:] == ["load", "Meter"], imported.stderr
    assert Path(imported.stdout.split()[0]).is_relative_to(python.parents[1])
    report = run(python.parent / "lorameter", "report", REPORT, cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    assert "qlora" in report.stdout or "alpha" in report.stdout
    listed = run(python, "-m", "lorameter", "list", "studies", cwd=tmp_path)
    assert "lora-or-qlora" in listed.stdout


@pytest.mark.parametrize("variables", [{}, {"PYTHONPATH": "."}], ids=["pytest", "pythonpath-pytest"])
def test_a_project_with_its_own_harness_is_unaffected(variables, python, tmp_path):
    """The plugin loads in a project with its own packages `harness` and `tests`, and the project imports its own."""
    for name, text in {
        "harness/__init__.py": "ANSWER = 42\n",
        "tests/__init__.py": "",
        "tests/test_answer.py": "import harness\n\n\ndef test_answer():\n    assert harness.ANSWER == 42\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    script = "import sys, pytest; sys.path.pop(0); sys.exit(pytest.main())"
    done = run(python, "-c", script, cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_init_makes_a_suite_that_pytest_collects(python, tmp_path):
    """`lorameter init` creates a benchmark suite without a clone of this repository."""
    done = run(python, "-m", "lorameter", "init", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    collected = run(python, "-m", "pytest", "benchmarks", "--collect-only", "-q", cwd=tmp_path)
    assert collected.returncode == 0, collected.stdout + collected.stderr
    assert "test_train_step[lora-r16]" in collected.stdout
    again = run(python, "-m", "lorameter", "init", cwd=tmp_path)
    assert again.returncode == 2
    assert "already holds conftest.py and test_variants.py" in again.stderr
