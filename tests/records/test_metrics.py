"""Tests of the table of metrics: one entry describes a metric, and derived values are what their names say.

Tests of formatted numbers: a common scale, and only the digits that the interval supports.

Tests of measuring time, which does not count pauses and is robust to clock changes.
"""

import pytest

from lorameter.measurements.metrics import get_samples
from lorameter.records.record import TrialRecord
from lorameter.records.store import measuring_time_s
from lorameter.records.units import (
    format_bytes,
    format_duration,
    format_interval,
    format_percent,
)


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
    assert get_samples(one, "tokens_per_s") == (64.0,)
    assert get_samples(one, "samples_per_s") == (4.0,)
    assert get_samples(one, "output_tokens_per_s") == (4.0, 2.0)
    assert get_samples(one, "timed_loss") == (1.0,)
    longer = record()
    longer.samples.update(warmup_loss=(9.0,) * 3, remaining_loss=(0.5,))
    assert get_samples(longer, "timed_loss") == (1.0, 0.5)  # the last quarter of all eight
    assert get_samples(one, "held_out_loss") == (3.0,)
    assert get_samples(one, "cold_start_time_s") == ()


def test_energy_is_per_step_and_per_real_token():
    """Energy is divided by the steps of its period; without a counter there is no value, not zero."""
    one = record()
    assert get_samples(one, "energy_per_step_j") == ()
    one.values.update(device_energy_train_j=900.0, energy_steps=6.0, energy_tokens=3000.0)
    assert get_samples(one, "energy_per_step_j") == (150.0,)
    assert get_samples(one, "energy_per_token_j") == (0.3,)


def test_the_time_of_a_real_token_is_that_of_an_epoch():
    """Each step time is divided by the mean number of real tokens of a step, not by those of the timed steps."""
    one = record(tokens={"real_tokens": 300, "padded_tokens": 100})
    assert get_samples(record(), "time_per_real_token_s") == ()
    assert get_samples(one, "time_per_real_token_s") == pytest.approx(
        (0.5 / 24,) * 4
    )  # 32 positions a step, 3 of 4 real
    one.samples.update(turn_tokens=(60.0, 40.0), turn_padded_tokens=(4.0, 24.0))
    assert get_samples(one, "time_per_real_token_s") == pytest.approx((0.5 / 24,) * 4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0.30734, 0.2951, 0.3201, "s"), "307 ms [295, 320]"),
        ((12.3456, 12.31, 12.38, "s"), "12.346 s [12.310, 12.380]"),
        ((1683.4, 1612.0, 1755.0, "1/s"), "1683/s [1612, 1755]"),
        ((4.5743, 4.551, 4.597, "1"), "4.574 [4.551, 4.597]"),
        ((0.03412, 0.0331, 0.0352, "J"), "34.1 mJ [33.1, 35.2]"),
        ((1812.0, 1790.0, 1834.0, "J"), "1.812 kJ [1.790, 1.834]"),
        ((0.412, None, None, "s"), "412 ms [no interval]"),
        ((1694.3, None, None, "1/s"), "1694/s [no interval]"),
    ],
)
def test_a_value_carries_its_interval(arguments, text):
    """The number of digits follows from two significant digits of the interval's half-width."""
    assert format_interval(*arguments) == text


def test_bytes_and_durations_have_readable_units():
    """Bytes use binary units, and long durations are in minutes."""
    assert format_bytes(637 * 2**20) == "637 MiB"
    assert format_bytes(1010 * 2**20) == "1010 MiB"
    assert format_bytes(999.7 * 2**20) == "1000 MiB"
    assert [format_duration(s) for s in (42, 185, 4320)] == ["42 s", "3 min 05 s", "1 h 12 min"]


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.012, "1.2 %"), (0.0995, "10 %"), (27.02, "2702 %"), (0.0, "0 %"), (0.3333, "33 %")]
)
def test_per_cents_have_two_digits_or_all_before_the_point(fraction, text):
    """Per cents have two significant digits, or all digits before the decimal point, and never an exponent."""
    assert format_percent(fraction) == text


def record_durations(started_unix_s, wall_time_s):
    return TrialRecord(
        trial="r0-a", status="ok", name="a", variant="v", role="variant", replicate=0, position=0, seed=0,
        interleaving="replicates", started_unix_s=started_unix_s, wall_time_s=wall_time_s,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([(100.0, 10.0), (110.0, 10.0)], 20.0),  # one after the other
        ([(100.0, 30.0), (102.0, 27.0), (101.0, 30.0)], 31.0),  # taking turns
        ([(100.0, 10.0), (99_110.0, 10.0)], 20.0),  # resumed after a day
        ([(100.0, 10.0), (5.0, 10.0)], 20.0),  # the clock was set back
        ([(100.0, 30.0), (9e8, 29.0)], 59.0),  # the clock was set forward while they took turns
        ([(0.0, 0.0), (100.0, 10.0)], 10.0),  # one that never started
        ([], 0.0),
    ],
)
def test_seconds_under_way(spans, seconds):
    """Overlapping trials count each moment once."""
    assert measuring_time_s([record_durations(*span) for span in spans]) == pytest.approx(seconds)
