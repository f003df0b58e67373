"""One test for each variant and phase; `-k` selects some. Run `pytest benchmarks/ --benchmark-save=NAME`."""

import pytest


@pytest.mark.lorameter("train")
def test_train_step(replay):
    """Time of one optimizer step: forward, backward, clip, update."""
    replay()


@pytest.mark.lorameter("generate")
def test_generate_warm(replay):
    """Time of one greedy request with the trained adapter, unmerged, in a warm process."""
    replay()


@pytest.mark.lorameter("cold")
def test_cold_start(replay):
    """Time from starting an interpreter to the first completion of the trained adapter."""
    replay()
