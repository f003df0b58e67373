"""The probe of facts: what of it needs no GPU is found here, and what does is said to be skipped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import probe
from benchmarks.gpu.probe import FACTS, NEEDS_NO_CARD, Recorded
from lorameter.run.workers.local import worker_environment

ROOT = Path(__file__).parents[2]
HOST, KERNEL = Recorded("cudaDeviceSynchronize", 0.1, False), Recorded("nvjet_tst", 0.1, True)


def test_every_fact_that_needs_a_card_is_skipped_with_the_reason(monkeypatch, capsys):
    """Without one, and none of them is an error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    needing = [name for look in FACTS if (name := look.__name__) not in NEEDS_NO_CARD]
    assert probe.main(needing) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["fact"] for one in told] == needing
    assert all(one["skipped"].startswith("no CUDA device") for one in told)


def test_a_zygote_has_one_thread_and_so_has_its_child():
    """Before the fork and right after it; the child computes, and NVML tells it something or says why not."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.forked"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**worker_environment(1), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT / 'harness'}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
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
