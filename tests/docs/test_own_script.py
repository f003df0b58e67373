"""Tests that the scripts of docs/own-script.md print the lines below them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "own-script.md"


def blocks(kind):
    """Return the text of each block of a kind."""
    return [part.split("\n```", 1)[0] for part in PAGE.read_text(encoding="utf-8").split(f"```{kind}\n")[1:]]


@pytest.mark.parametrize(
    "place", [pytest.param(0, id="trainer", marks=pytest.mark.selftest), pytest.param(1, id="loop")]
)
def test_a_script_prints_the_output_on_the_page(tmp_path, place):
    """The script also leaves a run."""
    (tmp_path / "train.py").write_text(blocks("python")[place])
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'harness'}:{ROOT}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "train.py"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    printed = [line.strip() for line in done.stdout.splitlines()]
    assert not [line for line in blocks("text")[place].splitlines() if line not in printed], (done.stdout, done.stderr)
    assert list((tmp_path / ".lorameter" / "runs").glob("*/manifest.json"))
