"""Tests of claims along a workload field: other batches and other models."""

from __future__ import annotations

import pytest

from lorameter.verdicts.claims import judge_claims

SIZES = {"b4": {"batch_size": 4}, "other": {"model": "random:smollm2-135m"}}


def part_of(run):
    """Return the only part of the only claim."""
    ((result,),) = [claim.parts for claim in judge_claims(run).claims]
    return result


@pytest.mark.parametrize(
    ("part", "factors", "verdict"),
    [
        ({"rule": "trend-up", "axis": "workload.batch_size"}, {"b4": 1.8}, "supported"),
        ({"rule": "trend-up", "axis": "workload.batch_size"}, {}, "refuted"),
        ({"rule": "lowest", "axis": "workload.model", "levels": ("tiny-llama",)}, {"other": 2.0}, "supported"),
        (
            {"rule": "costs-at-most", "axis": "workload.batch_size", "levels": (2.0, 4.0), "by": 0.5},
            {"b4": 1.8},
            "refuted",
        ),
    ],
)
def test_a_field_of_the_workload_is_an_axis(make_run, claim, small_study, part, factors, verdict):
    """The claim is judged by the variants that differ from the reference in this field only."""
    sizes = SIZES | {"b4": {"batch_size": 2 * small_study.workload.batch_size}}
    names = {2.0: float(small_study.workload.batch_size), 4.0: 2.0 * small_study.workload.batch_size}
    if part["axis"] == "workload.batch_size" and "levels" in part:
        part = part | {"levels": tuple(names[level] for level in part["levels"])}
    if part["axis"] == "workload.model":
        part = part | {"levels": (small_study.workload.model,)}
    assert part_of(make_run([claim(part)], factors, workloads=sizes)).verdict == verdict


@pytest.mark.parametrize("metric", ["held_out_loss", "timed_loss"])
@pytest.mark.parametrize(
    "own",
    [
        {"model": "random:smollm2-135m"},
        {"prompt_format": "write-instruction"},
        {"loss": "answer"},
        {"sequence_length": 64},
        {"layout": "padded"},
    ],
)
def test_losses_of_other_tokens_are_not_compared(make_run, claim, small_study, own, metric):
    """The claim is not judged, also where the same number of sequences holds more or fewer records."""
    ((key, value),) = own.items()
    assert getattr(small_study.workload, key) != value
    level = float(value) if isinstance(value, int) else value
    part = claim(rule="lowest", axis=f"workload.{key}", levels=(level,), metric=metric)
    found = part_of(make_run([part], {"other": 0.5}, workloads={"other": own}))
    assert found.verdict == "not judged"
    assert "other tokens" in found.reason
