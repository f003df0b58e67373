"""Judges whether the ranks of a distributed training train one model: same base, adapter, gradients and updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from kernels_check.check import (
    FLAG,
    Json,
    JudgedPath,
    PathObservation,
    absent,
    failed,
    join_clauses,
    name_some,
    passed,
    undecided,
)

if TYPE_CHECKING:
    from kernels_check.observe.observation import Observation
    from kernels_check.observe.ranks import Gradient, RankEvidence

EXACT, ROUNDED = 1e-3, 3e-2
"""Allowed distance of the exchanged gradient from the mean of the ranks' own gradients, relative to their norm: in
float32, and in 16 bits, where sums are rounded twice. If one of two ranks is left out, the distance is half of the
norm."""


def compare_bases(ranks: Sequence[RankEvidence]) -> PathObservation:
    """Judge ``ranks.base``: every unsharded part of the base is the same on all ranks."""
    first = ranks[0]
    for one in ranks[1:]:
        differing = _find_differences(first.base, one.base)
        if differing:
            return failed(
                f"the base of rank {one.rank} is another than that of rank 0: {len(differing)} of {len(first.base)} "
                f"parts differ, {name_some(differing)}"
            )
    sharded = f"; {first.shards} are sharded, so that all ranks gather one" if first.shards else ""
    return passed(f"{len(first.base)} parts of the base are the same on {len(ranks)} ranks{sharded}")


def compare_adapters(ranks: Sequence[RankEvidence], *, steps: int | None = None) -> PathObservation:
    """Judge ``ranks.adapters``: whether trained parameters are the same on all ranks and, if the number of steps is
    known, whether each optimizer made that many updates."""
    first = ranks[0].adapter
    if not first:
        return undecided("nothing trains")
    for one in ranks[1:]:
        differing = _find_differences(first, one.adapter)
        if differing:
            return failed(
                f"after the step rank {one.rank} has another adapter than rank 0: {len(differing)} of {len(first)} "
                f"parameters differ, {name_some(differing)}. Their gradients were not exchanged, a rank left out an "
                "update, or they began differently"
            )
    for one in ranks:
        if steps is not None and one.counted not in (None, steps):
            return failed(f"the optimizer of rank {one.rank} has made {one.counted} updates in {steps} steps")
    return passed(f"{len(first)} parameters are the same on {len(ranks)} ranks after the last step")


def compare_steps(ranks: Sequence[RankEvidence]) -> PathObservation:
    """Judge ``ranks.steps``: the optimizers of all ranks have made the same number of updates."""
    for what, counts in (
        ("in the watched steps", [one.updates for one in ranks]),
        ("by the count of its optimizer", [one.counted for one in ranks]),
    ):
        if len({*counts} - {None}) > 1:
            by_rank = ", ".join(f"rank {one.rank} {count}" for one, count in zip(ranks, counts, strict=True))
            return failed(f"ranks have not made the same number of updates {what}: {by_rank}")
    if not any(one.updates for one in ranks):
        return undecided("no optimizer that holds the model's parameters stepped on any rank in what was watched")
    counted = "" if ranks[0].counted is None else f", {ranks[0].counted} since the training began"
    return passed(f"{ranks[0].updates} updates on each of {len(ranks)} ranks{counted}")


def compare_gradients(ranks: Sequence[RankEvidence]) -> PathObservation:
    """Judge ``ranks.gradients``: the optimizers received the mean of the ranks' own gradients, up to one common factor
    from clipping or a gradient scaler."""
    count, names = len(ranks), list(ranks[0].gradients)
    if idle := [str(one.rank) for one in ranks if not one.gradients]:
        return undecided(
            f"no update of rank {', '.join(idle)} was seen, so neither were the gradients that it is given"
        )
    if any(list(one.gradients) != names for one in ranks):
        return failed("the ranks do not update the same parameters")
    of = {name: [one.gradients[name] for one in ranks] for name in names}
    reached = {name: every for name, every in of.items() if any(one.size for one in every)}
    if not reached:
        return undecided("no gradient was seen before it was exchanged")
    infinite = [name for name, every in reached.items() if not all(math.isfinite(one.size) for one in every)]
    if infinite:
        return failed(f"{len(infinite)} of {len(reached)} parameters have no finite gradient: {name_some(infinite)}")
    factor = _factor([(_mean(every), found) for every in reached.values() for found in _exchanged_gradients(every)])
    wrong = [name for name, every in reached.items() if not _fits(every, factor)]
    if wrong and _is_unexchanged(reached):
        return failed(
            f"{len(reached)} of {len(names)} parameters keep each rank's own gradient, which was not exchanged: "
            f"{name_some(reached)}"
        )
    if wrong:
        return failed(f"not the mean over {count} ranks: {len(wrong)} of {len(reached)} parameters, {name_some(wrong)}")
    rounding = max(map(_tolerance, reached.values()))
    if factor > 1 + rounding:
        return failed(
            f"the sum of the ranks' gradients was divided by {count / factor:.3g} and not by their number, {count}"
        )
    if late := [name for name in names if name not in reached and any(one.exchanged for one in of[name])]:
        return undecided(
            f"{len(late)} of {len(names)} parameters have a gradient that was not seen before it was exchanged: "
            f"{name_some(late)}"
        )
    zero = f"; {len(names) - len(reached)} had a gradient of zero" if len(reached) < len(names) else ""
    scaled = f" times {factor:.3g}, as clipping or a scaler does" if factor < 1 - rounding else ""
    return passed(f"the mean over {count} ranks{scaled}, of {len(reached)} parameters{zero}")


def _compare(
    observation: Observation,
    required: Json,
    *,
    compare: Callable[[Sequence[RankEvidence]], PathObservation],
    by_tensors: bool = True,
) -> PathObservation:
    """Compare the ranks, unless a rank saw nothing or, for `by_tensors`, holds tensors that cannot be compared."""
    if not observation.ranks:
        return absent("one process trains: no process group has others")
    if problems := [f"rank {one.rank}: {one.problem}" for one in observation.ranks if one.problem]:
        return undecided(join_clauses(*problems))
    if by_tensors and any(one.flat for one in observation.ranks):
        return undecided(
            "FSDP1 and DeepSpeed's ZeRO-3 keep parameters in parts that no rank can compare: shard with fully_shard "
            "(FSDP2), or check a run with DDP"
        )
    return compare(observation.ranks)


def _find_differences(first: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return [name for name in dict.fromkeys((*first, *other)) if first.get(name) != other.get(name)]


def _mean(every: Sequence[Gradient]) -> float:
    return sum(one.own for one in every) / len(every)


def _exchanged_gradients(every: Sequence[Gradient]) -> list[float]:
    """The exchanged gradient on each rank; the parts of a sharded gradient are summed up."""
    if every[0].sharded:
        return [sum(one.exchanged for one in every)]
    return [one.exchanged for one in every]


def _factor(pairs: Sequence[tuple[float, float]]) -> float:
    """The least-squares factor from the first to the second of each pair; 0 if there is none."""
    below = sum(before**2 for before, _ in pairs)
    return sum(before * after for before, after in pairs) / below if below else 0.0


def _fits(every: Sequence[Gradient], factor: float) -> bool:
    """Whether each rank's exchanged gradient is the mean of all times the factor; false if a value is not finite."""
    size = math.sqrt(sum(one.size**2 for one in every) / len(every))
    expected, most = factor * _mean(every), factor * _tolerance(every) * size
    return factor > 0 and all(abs(found - expected) <= most for found in _exchanged_gradients(every))


def _tolerance(every: Sequence[Gradient]) -> float:
    return ROUNDED if any(one.coarse for one in every) else EXACT


def _is_unexchanged(reached: Mapping[str, Sequence[Gradient]]) -> bool:
    """Whether each rank's optimizer received the rank's own gradient, up to a factor for each rank."""
    for rank in range(len(next(iter(reached.values())))):
        own = [every[rank] for every in reached.values()]
        factor = _factor([(one.own, one.exchanged) for one in own])
        if any(
            one.sharded or abs(one.exchanged - factor * one.own) > factor * _tolerance([one]) * one.size for one in own
        ):
            return False
    return True


PATHS: Mapping[str, JudgedPath] = {
    path: JudgedPath(requirement=FLAG, judge=judge, by_modules=False, on_request=True)
    for path, judge in {
        "ranks.base": partial(_compare, compare=compare_bases),
        "ranks.adapters": partial(_compare, compare=compare_adapters),
        "ranks.gradients": partial(_compare, compare=compare_gradients),
        "ranks.steps": partial(_compare, compare=compare_steps, by_tensors=False),
    }.items()
}
