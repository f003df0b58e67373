"""What the sites of a machine cost each other, from an A/A in its run: the same alone, and while others measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lorameter.records.interference import read_pairs
from lorameter.records.metrics import PRIMARY, samples_of
from lorameter.records.record import Notice
from lorameter.records.units import format_count, format_interval
from lorameter.stats import Comparison, compare_trials


def cost_of_neighbours(folder: Path) -> Comparison | None:
    """A step beside neighbours over one alone, in the run of this folder; None where that was not measured."""
    pairs = [[samples_of(record, PRIMARY["train"]) for record in both] for both in read_pairs(folder)]
    pairs = [both for both in pairs if all(both)]
    if not pairs:
        return None
    alone, beside = zip(*pairs, strict=True)
    return compare_trials(alone, beside, pairing="replicate")


def neighbour_notices(folder: Path) -> Iterator[Notice]:
    """What to know of a run in which it was measured."""
    cost = cost_of_neighbours(folder)
    if cost is None or cost.ratio is None or cost.low is None:
        return
    ratio = format_interval(cost.ratio, cost.low, cost.high, "1")
    yield Notice(
        code="node-interference",
        message=f"while the other sites measure, a step on the first takes {ratio} times as long as alone, by "
        f"{format_count(cost.replicates, 'pair')}.",
        remedy="What both sides of a ratio pay alike is not in it; absolute values are those beside neighbours.",
    )
