"""Tests of whether two scripts run the same training: tokens, parameters, batches, dtypes and losses. Each message has
the values of both scripts.

Tests of the software versions that scripts report, which override the versions found before the scripts start.
"""

from __future__ import annotations

import dataclasses
import random
import types

import msgspec
import pytest

from lorameter.records.record import TrialRecord
from lorameter.studies.commands import study_of_command
from lorameter.studies.variant import ScriptVariant
from lorameter.verdicts.compare import ComparisonReport
from lorameter.verdicts.gate import Policy, judge
from lorameter.verdicts.same_training import (
    compare_losses,
    describe_threads,
    differing_versions,
    library_versions,
    pair_scripts,
    sameness_notices,
    training_facts,
)

LOSSES = (3.0, 2.7, 2.5, 2.4, 2.3, 2.2)


def record(name, replicate, *, losses=LOSSES, tokens=100.0, side="", **values):
    """Return the record of a script's trial of six steps: three untimed, two timed, and one remaining step."""
    facts = {key: values.pop(key) for key in ("loss_dtype", "trainable_dtype", "source") if key in values}
    samples = {
        "warmup_loss": losses[:3], "timed_loss": losses[3:5], "remaining_loss": losses[5:],
        "step_time_s": (1.0, 1.0), "turn_sequences": (2 * values.pop("sequences", 4.0),),
    }  # fmt: skip
    if tokens is not None:
        counts = tokens if isinstance(tokens, tuple) else (tokens,) * 6
        samples |= {
            "warmup_tokens": counts[:3],
            "step_tokens": counts[3:5],
            "remaining_tokens": counts[5:],
        }
    return TrialRecord(
        trial=f"r{replicate}-{name}-{side}", status="ok", name=name, variant="v", role="variant", replicate=replicate,
        position=0, interleaving="lockstep", side=side, seed=0, started_unix_s=0.0, wall_time_s=1.0,
        samples={key: tuple(found) for key, found in samples.items()}, tokens=facts,
        values={key: one for key, one in ({"trainable_parameters": 32.0, "accumulation": 1.0} | values).items() if one},
    )  # fmt: skip


def make_run(base, candidate, replicates=4):
    """Return a run of two variants and its study; each argument has the differing fields of its records."""
    study = study_of_command("python train.py", name="base")
    study = dataclasses.replace(study, variants=(*study.variants, ScriptVariant(name="other", command="python o.py")))
    records = [
        record(name, n, **fields) for n in range(replicates) for name, fields in (("base", base), ("other", candidate))
    ]
    return types.SimpleNamespace(manifest=types.SimpleNamespace(sides={}), records=records), study


def find_notices(base, candidate):
    return {notice.code: notice.message for notice in sameness_notices(*make_run(base, candidate))}


def compare_two(base, candidate, **more):
    return compare_losses(pair_scripts(*make_run(base, candidate, **more))["other"])


def test_scripts_that_do_the_same_have_no_notice():
    """Losses within the margin agree, and the reason has their difference."""
    nearly = tuple(loss * 1.001 for loss in LOSSES)
    assert find_notices({}, {"losses": nearly}) == {}
    found = compare_two({}, {"losses": nearly})
    assert found.found == "agree"
    expected = "3 in base and 3.003 in other in the first step, and over 6 steps 1.001 [1.001, 1.001] of the first"
    assert expected in found.reason


@pytest.mark.parametrize(
    ("candidate", "code", "expected"),
    [
        ({"tokens": 90.0}, "tokens-differ", ["100.0 real tokens in base and 90.0 in other", "4 sequences in 1 passes"]),
        (
            {"trainable_parameters": 64.0},
            "trains-other-parameters",
            ["32 parameters are trained in base", "64 parameters are trained in other"],
        ),
        (
            {"trainable_dtype": "bfloat16"},
            "trains-other-parameters",
            ["the trainable parameters are float32 in base", "bfloat16 in other"],
        ),
        (
            {"loss_dtype": "bfloat16"},
            "loss-dtype-differs",
            ["the loss is float32 in base, and the loss is bfloat16 in other"],
        ),
        (
            {"sequences": 2.0, "accumulation": 2.0},
            "batch-differs",
            ["4 sequences in 1 passes", "2 sequences in 2 passes"],
        ),
        ({"losses": (3.3, *LOSSES[1:])}, "loss-differs", ["3 in base and 3.3 in other in the first step"]),
        ({"losses": (3.0, 2.8, 2.7, 2.6, 2.5, 2.4)}, "loss-differs", ["over 6 steps 1.08"]),
    ],
)
def test_each_difference_is_a_notice_with_both_numbers(candidate, code, expected):
    """Each difference has its own notice and no other."""
    known = {"trainable_dtype": "float32", "loss_dtype": "float32"}
    found = find_notices(known, known | candidate)
    assert list(found) == [code]
    assert all(words in found[code] for words in expected), found[code]


def test_losses_on_different_tokens_are_not_compared():
    """The comparison is unknown even if the mean number of tokens is equal."""
    other = (110.0, 90.0, 110.0, 90.0, 110.0, 90.0)
    found = compare_two({}, {"tokens": other, "losses": (9.0,) * 6})
    assert (found.found, "different tokens" in found.reason) == ("unknown", True)
    assert "loss-differs" not in find_notices({}, {"tokens": other, "losses": (9.0,) * 6})


def test_a_comparison_without_enough_losses_is_unknown():
    """The comparison is unknown if losses are missing, if there is one replicate, or if the losses have no ratio.
    Without token counts the reason says that the tokens are unknown."""
    assert compare_two({"losses": ()}, {"losses": ()}).found == "unknown"
    assert compare_two({}, {}, replicates=1).found == "unknown"
    assert "no ratio" in compare_two({"losses": (-1.0,) * 6}, {"losses": (-1.0,) * 6}).reason
    assert "is unknown whether both" in compare_two({"tokens": None}, {"tokens": None, "losses": (4.0,) * 6}).reason


def make_report(found):
    return ComparisonReport(base="a", candidate="b", comparisons=(), losses=found)


def test_a_gate_can_demand_that_losses_agree():
    """An unknown or missing comparison does not meet the policy."""
    policy = Policy(losses="agree")
    met = judge(make_report({"other": compare_two({}, {})}), policy)
    assert not [line for line in met.unmet if "losses" in line]
    for found in ({"other": compare_two({}, {"losses": (4.0,) * 6})}, {"other": compare_two({}, {}, replicates=1)}, {}):
        unmet = [line for line in judge(make_report(found), policy).unmet if "losses = 'agree'" in line]
        assert len(unmet) == 1
    assert not [line for line in judge(make_report({}), Policy()).unmet if "losses" in line]


def noisy(seed, trend=0.0):
    """Return losses of 40 steps, which scatter by 0.6 % around 2 after the first; the seed stands for the batches."""
    rng = random.Random(seed)
    return tuple(2 * (1 + 0.006 * (step > 0) * rng.gauss(0, 1)) - trend * step for step in range(40))


@pytest.mark.parametrize("trend", [0.0, 0.002])
def test_losses_of_another_seed_do_not_agree(trend):
    """The comparison of other batches is unknown, although losses are within the margin and token counts are equal.
    Losses of one seed agree, also with another order of computation or another learning rate."""
    tokens = (100.0,) * 40
    base = {"losses": noisy(0, trend), "tokens": tokens}
    for seed in range(1, 6):
        other = {"losses": noisy(seed, trend), "tokens": tokens}
        assert compare_two(base, other).found == "unknown"
        assert list(find_notices(base, other)) == ["other-batches"]
    rounded = tuple(loss * (1 + 0.001 * (-1) ** step) for step, loss in enumerate(noisy(0, trend)))
    learned = tuple(loss * (1 - 0.0002 * step) for step, loss in enumerate(noisy(0, trend)))
    for same in (noisy(0, trend), rounded, learned):
        assert compare_two(base, {"losses": same, "tokens": tokens}).found == "agree"
        assert find_notices(base, {"losses": same, "tokens": tokens}) == {}


STATED = {
    "device": "cpu", "threads": 1, "python": "3.11.7", "libraries": {"torch": "2.13.0", "flash-attn": "2.8"},
    "engine": {"liger_kernel": None},
}  # fmt: skip
RECORD = TrialRecord(
    trial="r0-a", status="ok", name="a", variant="v", role="variant", replicate=0, position=0,
    interleaving="lockstep", seed=0, started_unix_s=1.0, wall_time_s=1.0,
)  # fmt: skip


def make_reporting_record(threads=None, **software):
    """Return a record whose process reports these versions; underscores replace hyphens."""
    versions = {name.replace("_", "-"): version for name, version in software.items()}
    return msgspec.structs.replace(RECORD, software=versions, values={} if threads is None else {"threads": threads})


def test_reported_versions_take_precedence():
    """Package names are normalised. A package that a script does not report is not installed for it, even if
    lorameter's own interpreter has it."""
    records = [make_reporting_record(4.0, python="3.12.1", torch="2.14.0", cuda="12.8", liger_kernel="0.8.5")]
    found = library_versions(STATED, records)
    assert found == {
        "python": "3.12.1", "torch": "2.14.0", "flash-attn": None, "liger_kernel": "0.8.5", "cuda": "12.8",
    }  # fmt: skip
    facts = training_facts(STATED, records)
    assert (facts["python"], facts["cuda"], facts["device"]) == ("3.12.1", "12.8", "cpu")
    assert facts["libraries"] == {"torch": "2.14.0", "flash-attn": None}
    assert describe_threads(STATED, records) == "4 threads"


@pytest.mark.parametrize(
    ("ours", "theirs", "differing"),
    [
        ([{"a": "1"}], [{"a": "1"}], []),
        ([{"a": "1"}], [{"a": "2"}], [("a", "1", "2")]),
        ([{"a": "1"}], [{"a": "1", "b": "3"}], [("b", "none", "3")]),
        ([{"a": "1"}, {"a": "2"}], [{"a": "1"}, {"a": "2"}], [("a", "1 or 2", "1 or 2")]),
        ([{"a": "1"}], [{}], []),
    ],
)
def test_differences_over_all_trials(ours, theirs, differing):
    """An environment may change during a run; a record without reported versions has no differences."""
    assert (
        list(
            differing_versions(
                [make_reporting_record(**one) for one in ours], [make_reporting_record(**one) for one in theirs]
            )
        )
        == differing
    )
