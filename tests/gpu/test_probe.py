"""The probe of facts: what of it needs no GPU is found here, and what does is said to be skipped."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.gpu import probe
from benchmarks.gpu.probe import FACTS, NEEDS_NO_CARD, Recorded

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
