"""Tests of series of records: pairing by replicate, orientation, and excluded trials."""

import pytest

from lorameter.records.record import TrialRecord
from lorameter.verdicts.series import Series, compare_series, group_trials


def record(name="a", replicate=0, status="ok", role="variant", step=0.5, **fields):
    samples = {
        "step_time_s": (step, step, step, step), "timed_loss": (4.0, 3.0, 2.0, 1.0), "turn_tokens": (64.0, 64.0),
        "turn_sequences": (4.0, 4.0), "request_time_s": (2.0, 4.0),
    }  # fmt: skip
    return TrialRecord(
        trial=f"r{replicate}-{name}", status=status, name=name, variant=name, role=role, replicate=replicate,
        position=0, interleaving="replicates", seed=0, started_unix_s=0.0, wall_time_s=1.0, samples=samples,
        values={"held_out_loss": 3.0, "new_tokens": 8.0}, **fields,
    )  # fmt: skip


def test_only_trials_that_are_ok_count():
    """An invalid trial is in no estimate and in no pair."""
    records = [record(replicate=i, status="invalid" if i == 1 else "ok") for i in range(3)]
    series = group_trials(records)["a", "variant"]
    assert len(series.records) == 3
    assert series.estimate("step_time_s").replicates == 2
    other = Series(name="b", role="variant", records=tuple(record("b", i, step=0.6) for i in range(3)))
    assert compare_series(series, other, "step_time_s").replicates == 2


def timed(name, replicate, *, share=1.0, step=0.5, **fields):
    """Return a trial of four steps that had `share` of a CPU."""
    one = record(name, replicate, step=step, **fields)
    one.samples["step_cpu_time_s"] = (share * step,) * 4
    return one


def sides(shares, *, step=0.5, slow=0.5, **fields):
    base = tuple(timed("a", i, share=left, step=step * (1 + i / 100), **fields) for i, (left, _) in enumerate(shares))
    other = tuple(
        timed("b", i, share=right, step=slow * (1 + i / 100), **fields) for i, (_, right) in enumerate(shares)
    )
    return Series(name="a", role="variant", records=base), Series(name="b", role="variant", records=other)


def test_pairs_of_disturbed_trials_are_left_out_and_counted():
    """A trial with too little CPU time is dropped with its partner, whatever their times are."""
    base, other = sides([(1, 1)] * 5 + [(0.5, 1), (1, 0.5)])
    found = compare_series(base, other, "step_time_s")
    assert found.replicates == 5
    assert "dropped 2 of 7 pairs: base flagged in 1, candidate in 1" in found.reason


def test_nothing_is_dropped_where_too_little_would_be_left():
    """All pairs are kept if fewer than five would remain."""
    found = compare_series(*sides([(0.5, 1)] * 3 + [(1, 1)] * 4), "step_time_s")
    assert found.replicates == 7
    assert "below 5: kept all" in found.reason


def test_nothing_is_dropped_where_one_side_is_disturbed_more_often():
    """Unbalanced flags could be an effect of the candidate, which may wait where the base computes."""
    found = compare_series(*sides([(1, 0.5)] * 8 + [(1, 1)] * 6), "step_time_s")
    assert found.replicates == 14
    assert "not balanced" in found.reason


@pytest.mark.parametrize(("level", "words"), [("shared-base", "turn by turn"), ("replicates", "by replicate")])
def test_the_pairing_follows_from_how_the_trials_alternated(level, words):
    """A metric of isolated trials is paired by replicate at every interleaving level."""
    base, other = sides([(1, 1)] * 3)
    for series in (base, other):
        turns = tuple(one.replaced(interleaving=level) for one in series.records)
        isolated = tuple(
            one.replaced(samples={"merged_request_time_s": (1.0, 2.0)}, values={}) for one in series.records
        )
        object.__setattr__(series, "records", (*turns, *isolated))
    assert f"paired {words}" in compare_series(base, other, "step_time_s").reason
    assert "paired by replicate" in compare_series(base, other, "merged_request_time_s").reason
    assert base.interleaving("step_time_s") == level


@pytest.mark.parametrize(("level", "pairs"), [("lockstep", 2), ("replicates", 3)])
def test_turns_are_paired_within_one_attempt(level, pairs):
    """Turns of different attempts are not paired; whole trials are paired by replicate."""

    def series(name, attempts):
        records = [record(name, replicate) for replicate in range(3)]
        changed = (one.replaced(attempt=n, interleaving=level) for one, n in zip(records, attempts, strict=True))
        return Series(name=name, role="variant", records=tuple(changed))

    assert compare_series(series("a", (0, 1, 0)), series("b", (0, 0, 0)), "step_time_s").replicates == pairs


def test_only_losses_after_the_most_steps_count():
    """A shorter training has no comparable loss."""
    records = [record("a", replicate) for replicate in range(3)]
    for one, steps in zip(records, (12.0, 8.0, 12.0), strict=True):
        one.values["training_steps"] = steps
    series = Series(name="a", role="variant", records=tuple(records))
    assert [one.replicate for one in series.measuring("held_out_loss")] == [0, 2]
    assert len(series.trials("step_time_s")) == 3
