"""What all ranks spend on exchanges is told as shares of the steps of all, and each one's own time by its number."""

from __future__ import annotations

import pytest

from harness.trial.ranks.rank import _activity
from kernels_check.ranks.activity import Share
from kernels_check.ranks.facts import RankFacts


def facts(rank, share):
    return RankFacts(rank=rank, ranks=2, activity=share)


HALF_HIDDEN = Share(step_s=1.0, exchange_s=0.4, exposed_s=0.3, own_s=0.7)
BUSY = Share(step_s=1.0, exchange_s=0.2, exposed_s=0.15, own_s=0.9)


def test_shares_are_of_the_steps_of_all_ranks():
    """Exchanged 0.6 s of two, of which 0.45 s in the open; the rank that waits least is an eighth above the mean."""
    assert _activity([facts(0, HALF_HIDDEN), facts(1, BUSY)]) == pytest.approx({
        "rank0_own_step_time_s": 0.7, "rank1_own_step_time_s": 0.9, "communication_share": 0.3,
        "exposed_communication_share": 0.225, "communication_overlap": 0.25, "rank_imbalance": 1.125,
    })  # fmt: skip


def test_ranks_that_exchange_nothing_hide_nothing():
    """There is no overlap of it, and no share."""
    alone = Share(step_s=1.0, exchange_s=0.0, exposed_s=0.0, own_s=1.0)
    told = _activity([facts(0, alone), facts(1, alone)])
    assert "communication_overlap" not in told
    assert (told["communication_share"], told["rank_imbalance"]) == (0.0, 1.0)


@pytest.mark.parametrize("other", [None, Share(step_s=0.0, exchange_s=0.0, exposed_s=0.0, own_s=0.0)])
def test_of_ranks_of_which_one_says_nothing_nothing_is_said(other):
    """The others' times have no meaning without its."""
    assert _activity([facts(0, HALF_HIDDEN), facts(1, other)]) == {}
