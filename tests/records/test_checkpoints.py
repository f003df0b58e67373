"""How often what is measured is saved before it is whole."""

import pytest

from lorameter.records.checkpoints import checkpoint_is_due


@pytest.mark.parametrize(
    ("now", "saved", "due"),
    [(29.0, 0.0, False), (30.0, 0.0, True), (1000.0, 901.0, False), (1000.0, 900.0, True)],
    ids=["too soon", "after half a minute", "less than a tenth", "a tenth"],
)
def test_saving_takes_a_small_share_of_the_time(now, saved, due):
    """Of what was measured since the beginning."""
    assert checkpoint_is_due(now, begun_s=0.0, saved_s=saved) is due
