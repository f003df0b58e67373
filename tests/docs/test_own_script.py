"""The page on scripts of one's own: its scripts print what it says, and its commands are known."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorameter.commands.parser import build_parser

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "own-script.md"


def blocks(kind):
    """The text of each block of a kind."""
    return [part.split("\n```", 1)[0] for part in PAGE.read_text(encoding="utf-8").split(f"```{kind}\n")[1:]]


@pytest.mark.parametrize(
    "place", [pytest.param(0, id="trainer"), pytest.param(1, id="loop", marks=pytest.mark.selftest)]
)
def test_a_script_prints_what_the_page_says(tmp_path, place):
    """And leaves a run."""
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


def test_its_commands_are_known():
    """Each as it is typed."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) == 5
    for line in lines:
        program, *words = line.split()
        assert program == "lorameter"
        assert build_parser().parse_args(words).words[0] == "--"


def test_its_examples_are_there():
    """Those that the page points to."""
    names = {path.name for path in (PAGE.parent / "examples").glob("*.py")}
    assert names >= {"accelerate_loop.py", "sft_qlora.py", "torch_loop.py", "trainer_lora.py"}
