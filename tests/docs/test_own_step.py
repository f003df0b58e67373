"""Tests that the code of docs/own_step.md prints the lines on the page."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "own_step.md"
MARK = "-- the next block --"


def blocks():
    """Return each code block with the lines that it prints, if there are any."""
    found, lines = [], iter(PAGE.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line in ("```python", "```text"):
            block = []
            for inner in lines:
                if inner == "```":
                    break
                block.append(inner)
            if line == "```python":
                found.append(("\n".join(block), []))
            else:
                found[-1][1].extend(block)
    return found


@pytest.mark.selftest
def test_the_page_prints_its_output():
    """All code runs in one separate process, since Accelerate keeps a state for each process."""
    shown = blocks()
    assert sum(bool(printed) for _, printed in shown) >= 4
    script = f"\nprint({MARK!r})\n".join(code for code, _ in shown)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'harness'}:{ROOT}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    printed = [part.strip().splitlines() for part in done.stdout.split(MARK)]
    for (code, expected), lines in zip(shown, printed, strict=True):
        assert not [line for line in expected if line not in lines], (code, lines)


@pytest.mark.selftest
def test_the_script_of_several_ranks_prints_its_output(tmp_path):
    """The script runs under torchrun as on the page: the check at the end finds a fault that the first check cannot
    see."""
    page = PAGE.read_text(encoding="utf-8")
    assert "(examples/ddp.py)" in page
    (expected,) = re.findall(r"^```console\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    shutil.copy(ROOT / "docs" / "examples" / "ddp.py", tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ddp.py"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'harness'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        launcher, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("ranks.")] == expected.splitlines()
