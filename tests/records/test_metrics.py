"""Tests of the table of metrics: one entry describes a metric, and derived values are what their names say."""

import pytest

from lorameter.records.metrics import samples_of
from lorameter.records.record import TrialRecord


def record(**fields):
    samples = {
        "step_time_s": (0.5,) * 4, "timed_loss": (4.0, 3.0, 2.0, 1.0), "turn_tokens": (64.0, 64.0),
        "turn_sequences": (4.0, 4.0), "request_time_s": (2.0, 4.0),
    }  # fmt: skip
    return TrialRecord(
        trial="r0-a", status="ok", name="a", variant="a", role="variant", replicate=0,
        position=0, interleaving="replicates", seed=0, started_unix_s=0.0, wall_time_s=1.0, samples=samples,
        values={"held_out_loss": 3.0, "new_tokens": 8.0}, **fields,
    )  # fmt: skip


def test_derived_metrics_have_the_expected_values():
    """The values are tokens and sequences over the timed seconds, output tokens over each request, and the last quarter
    of the losses."""
    one = record()
    assert samples_of(one, "tokens_per_s") == (64.0,)
    assert samples_of(one, "samples_per_s") == (4.0,)
    assert samples_of(one, "output_tokens_per_s") == (4.0, 2.0)
    assert samples_of(one, "timed_loss") == (1.0,)
    longer = record()
    longer.samples.update(warmup_loss=(9.0,) * 3, remaining_loss=(0.5,))
    assert samples_of(longer, "timed_loss") == (1.0, 0.5)  # the last quarter of all eight
    assert samples_of(one, "held_out_loss") == (3.0,)
    assert samples_of(one, "cold_start_time_s") == ()


def test_energy_is_per_step_and_per_real_token():
    """Energy is divided by the steps of its period; without a counter there is no value, not zero."""
    one = record()
    assert samples_of(one, "energy_per_step_j") == ()
    one.values.update(device_energy_train_j=900.0, energy_steps=6.0, energy_tokens=3000.0)
    assert samples_of(one, "energy_per_step_j") == (150.0,)
    assert samples_of(one, "energy_per_token_j") == (0.3,)


def test_the_time_of_a_real_token_is_that_of_an_epoch():
    """Each step time is divided by the mean number of real tokens of a step, not by those of the timed steps."""
    one = record(tokens={"real_tokens": 300, "padded_tokens": 100})
    assert samples_of(record(), "time_per_real_token_s") == ()
    assert samples_of(one, "time_per_real_token_s") == pytest.approx(
        (0.5 / 24,) * 4
    )  # 32 positions a step, 3 of 4 real
    one.samples.update(turn_tokens=(60.0, 40.0), turn_padded_tokens=(4.0, 24.0))
    assert samples_of(one, "time_per_real_token_s") == pytest.approx((0.5 / 24,) * 4)
