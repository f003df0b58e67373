"""Tests that the probe skips the facts that need a GPU, with the reason."""

from __future__ import annotations

import json

import torch

from benchmarks.gpu import probe
from benchmarks.gpu.probe import FACTS, NEEDS_NO_GPU


def test_every_fact_that_needs_a_gpu_is_skipped_with_the_reason(monkeypatch, capsys):
    """Without a GPU, skipped facts are not errors."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    needing = [name for look in FACTS if (name := look.__name__) not in NEEDS_NO_GPU]
    assert probe.main(needing) == 0
    facts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["fact"] for one in facts] == needing
    assert all(one["skipped"].startswith("no CUDA device") for one in facts)
