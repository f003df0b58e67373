"""The parts of a cold start: what quantises is told apart from what reads, the first forward pass from the rest."""

import time

import bitsandbytes.functional as bnb
import pytest
import torch

from harness.trial.inference import waterfall as inference
from harness.trial.inference.waterfall import Waterfall


@pytest.fixture
def clock(monkeypatch):
    """Time that passes where a test says so."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_quantising_is_told_apart_from_reading(clock, monkeypatch):
    """bitsandbytes' own functions are timed, one inside of another once, and are its own again afterwards."""
    inner = bnb.quantize_blockwise

    def slow(*args, **given):
        clock[0] += 2.0
        return inner(*args, **given)

    monkeypatch.setattr(bnb, "quantize_blockwise", slow)
    before = bnb.quantize_4bit
    waterfall = Waterfall()
    with waterfall.loading("cpu"):
        assert bnb.quantize_4bit is not before
        bnb.quantize_4bit(torch.randn(64, 64), compress_statistics=True, quant_type="nf4")
    assert (bnb.quantize_4bit, bnb.quantize_blockwise) == (before, slow)
    values = waterfall.values(base_s=5.0, first_token_s=1.0)
    assert (values["cold_quantise_time_s"], values["cold_read_time_s"]) == (2.0, 3.0)
    less = waterfall.values(base_s=1.5, first_token_s=1.0)  # of several threads at once
    assert (less["cold_quantise_time_s"], less["cold_read_time_s"]) == (1.5, 0.0)


def test_the_base_is_read_when_the_device_has_it(monkeypatch):
    """The wait belongs to the waterfall: a start that is measured goes on as a user's does."""
    waited = []
    monkeypatch.setattr(inference, "synchronize", waited.append)
    with Waterfall().loading("cuda"):
        assert waited == []
    assert waited == ["cuda"]


def test_the_first_forward_pass_is_told_apart(clock, monkeypatch):
    """From when a request is asked to the model, through it once; later passes add nothing, and no hook stays."""

    class Model(torch.nn.Module):
        def forward(self):
            clock[0] += 0.25

    model, waterfall = Model(), Waterfall()
    with waterfall.answering(model, "cpu"):
        clock[0] += 0.125
        model()
        model()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    values = waterfall.values(base_s=1.0, first_token_s=0.5)
    assert (values["cold_before_first_forward_s"], values["cold_first_forward_time_s"]) == (0.125, 0.25)
