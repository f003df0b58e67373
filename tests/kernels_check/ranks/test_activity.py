"""How a rank spends a step follows from intervals of what it does."""

from __future__ import annotations

import time

import torch
from torch.profiler import ProfilerActivity, profile

from kernels_check.ranks import activity
from kernels_check.ranks.activity import STEPS, common, length_of, share_of, united


def test_intervals_are_united_and_intersected():
    """Overlaps count once, and what two lists share is found across any number of them."""
    assert united([(3, 4), (0, 1), (0.5, 2)]) == [(0, 2), (3, 4)]
    assert common([(0, 2), (3, 5)], [(1, 4), (4.5, 9)]) == [(1, 2), (3, 4), (4.5, 5)]
    assert common([], [(0, 1)]) == []
    assert length_of([(0, 2), (3, 4)]) == 3


def test_a_step_that_exchanges_nothing_is_all_its_own():
    """Alone it waits for nobody; the steps are met for, each by itself."""
    met = []
    share = share_of(lambda: time.sleep(0.02), lambda: met.append(1))
    assert len(met) == STEPS
    assert share.exchange_s == share.exposed_s == 0
    assert 0.02 <= share.own_s <= share.step_s  # the least of the steps, and their mean


def test_a_session_without_a_kernel_of_the_card_says_nothing(monkeypatch):
    """Its steps would be all of the rank's own, whatever it had waited for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(activity, "profile", lambda activities: profile(activities=[ProfilerActivity.CPU]))
    assert share_of(lambda: torch.ones(8) @ torch.ones(8), lambda: None) is None
