"""From records to series: derived metrics, pairing by replicate, orientation."""

import pytest

from harness.record import TrialRecord
from harness.series import Series, compare_series, samples_of, series_of, without_equivalent
from harness.stats import compare_trials


def record(name="a", replicate=0, status="ok", role="variant", step=0.5, **fields):
    samples = {
        "step_time_s": (step, step, step, step), "train_loss": (4.0, 3.0, 2.0, 1.0), "turn_real_tokens": (64.0, 64.0),
        "turn_sequences": (4.0, 4.0), "request_time_s": (2.0, 4.0),
    }  # fmt: skip
    return TrialRecord(
        trial=f"r{replicate}-{name}", status=status, name=name, variant=name, role=role, replicate=replicate,
        position=0, interleaving="replicates", seed=0, started_unix_s=0.0, wall_time_s=1.0, samples=samples,
        values={"held_out_loss": 3.0, "new_tokens": 8.0}, **fields,
    )  # fmt: skip


def test_derived_metrics_are_what_their_names_say():
    """Tokens and sequences over the timed seconds, output tokens over each request, the last quarter of the losses."""
    one = record()
    assert samples_of(one, "tokens_per_s") == (64.0,)
    assert samples_of(one, "samples_per_s") == (4.0,)
    assert samples_of(one, "output_tokens_per_s") == (4.0, 2.0)
    assert samples_of(one, "train_loss") == (1.0,)
    longer = record()
    longer.samples.update(warmup_loss=(9.0,) * 3, catch_up_loss=(0.5,))
    assert samples_of(longer, "train_loss") == (1.0, 0.5)  # the last quarter of all eight
    assert samples_of(one, "held_out_loss") == (3.0,)
    assert samples_of(one, "cold_start_time_s") == ()


def test_an_unknown_metric_is_an_error():
    """A typo must not read as "not measured"."""
    with pytest.raises(KeyError):
        samples_of(record(), "step_time")


def test_only_trials_that_are_ok_count():
    """An invalid trial is in no estimate and in no pair."""
    records = [record(replicate=i, status="invalid" if i == 1 else "ok") for i in range(3)]
    series = series_of(records)["a", "variant"]
    assert len(series.records) == 3
    assert series.estimate("step_time_s").replicates == 2
    other = Series(name="b", role="variant", records=tuple(record("b", i, step=0.6) for i in range(3)))
    assert compare_series(series, other, "step_time_s").replicates == 2


def test_no_common_replicate_is_no_comparison():
    """Pairs need both sides."""
    one = Series(name="a", role="variant", records=(record("a", 0),))
    other = Series(name="b", role="variant", records=(record("b", 1),))
    assert compare_series(one, other, "step_time_s") is None


def test_above_one_is_worse_whatever_the_direction():
    """Half the throughput and twice the time have the same ratio."""
    base = Series(name="a", role="variant", records=tuple(record("a", i, step=0.5) for i in range(3)))
    slow = Series(name="b", role="variant", records=tuple(record("b", i, step=1.0) for i in range(3)))
    for metric in ("step_time_s", "tokens_per_s"):
        comparison = compare_series(base, slow, metric)
        assert comparison.ratio == pytest.approx(2.0)
        assert comparison.verdict == "regressed"


def test_series_are_ordered_by_replicate():
    """Whatever order they ran in."""
    records = [record(replicate=i) for i in (2, 0, 1)]
    assert [r.replicate for r in series_of(records)["a", "variant"].records] == [0, 1, 2]


def test_equality_can_be_withheld():
    """Only the verdict `equivalent` changes, with the reason why."""
    equal = compare_trials([[1.0]] * 5, [[1.0]] * 5, pairing="replicate")
    assert equal.verdict == "equivalent"
    withheld = without_equivalent(equal, "the control does not bear it out")
    assert (withheld.verdict, withheld.reason) == ("inconclusive", "the control does not bear it out")
    slower = compare_trials([[1.0]] * 5, [[2.0]] * 5, pairing="replicate")
    assert without_equivalent(slower, "x") is slower
