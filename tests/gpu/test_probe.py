"""The probe of facts: what of it needs no card is found here, and what does is said to be skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import probe
from benchmarks.gpu.probe import FACTS, NEEDS_NO_CARD, Recorded

ROOT = Path(__file__).parents[2]
HOST, KERNEL = Recorded("cudaDeviceSynchronize", 0.1, False), Recorded("nvjet_tst", 0.1, True)


@pytest.fixture(scope="module")
def found():
    """What the probe says where torch sees no card, by fact."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.probe"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {told.pop("fact"): told for told in map(json.loads, done.stdout.splitlines())}


def test_every_fact_is_said_or_skipped_with_the_reason(found):
    """Those that need a card are none without one, and none of them is an error."""
    assert list(found) == [look.__name__ for look in FACTS]
    skipped = {name for name, told in found.items() if told.get("skipped", "").startswith("no CUDA device")}
    assert skipped == {look.__name__ for look in FACTS} - set(NEEDS_NO_CARD)


def test_a_zygote_has_one_thread_and_so_has_its_child(found):
    """Before the fork and right after it; the child computes, and NVML tells it something or says why not."""
    told = found["zygote"]
    child = told["child"]
    assert told["refuses_to_fork"] is None
    assert len(told["threads"]) == len(child["threads"]) == 1
    assert len(child["threads_with_device"]) >= 1
    assert (child["device"], child["sum"]) == ("cpu", 8.0)
    assert child.get("nvml") or all(child["missing"].values())


@pytest.mark.parametrize(("sessions", "kept"), [([[HOST], [HOST, KERNEL]], 1), ([[KERNEL]], 0), ([[HOST], []], 1)])
def test_a_session_without_a_kernel_is_recorded_once_more(monkeypatch, sessions, kept):
    """Most facts are recorded on each other's heels; what the second has is taken, and there is no third."""
    left = list(sessions)
    monkeypatch.setattr(probe, "_session", lambda call: left.pop(0))
    assert probe.recorded(lambda: None) is sessions[kept]
    assert not left
