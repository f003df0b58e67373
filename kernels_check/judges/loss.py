"""Whether every token that a step trains on weighs the same, however the batch was cut into passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kernels_check.check import FLAG, Json, JudgedPath, PathObservation, Status, name_some

if TYPE_CHECKING:
    from kernels_check.observe.loss import LossPass
    from kernels_check.observe.observation import Observation

_MEAN_OF_MEANS = (
    "a mean of means: pass num_items_in_batch, the tokens of the whole batch, to each forward, or weigh each loss by "
    "its share of them"
)
_SUM_OF_MEANS = "a sum of means, as where the loss is not divided by the number of passes, and gradients as much larger"
_NO_TOKENS = "a mean over no tokens is not a number: leave such rows out"


def judge_tokens(seen: Observation, required: Json) -> PathObservation:
    """Judge ``loss.tokens``: the tokens of all passes that feed one update weigh the same, and are no sum of means.

    What their weights add up to is said and not judged, unless it is the number of passes, each a mean: a loss may be
    scaled, as by a GradScaler, and what is multiplied hides what was not divided.
    """
    loss = seen.loss()
    if loss.unseen is not None:
        status: Status | None = None if required is None else "unknown"
        return PathObservation(observed=None, present=False, status=status, reason=loss.unseen)
    passes = loss.passes
    counts = [one.tokens for one in passes]
    positions = sum(one.positions for one in passes)
    reason = f"the loss is over {sum(counts)} of {positions} tokens"
    reason += f", in {len(passes)} passes of {name_some(map(str, counts))}" if len(passes) > 1 else ""
    sums = [[one for one in passes if one.sum == number] for number in sorted({one.sum for one in passes})]
    reason += f", for {len(sums)} updates or evaluations" if len(sums) > 1 else ""
    faults = list(dict.fromkeys(fault for together in sums for fault in _faults(together)))
    return PathObservation(observed=not faults, reason="; ".join([reason, *(faults or [_praise(sums)])]))


def _praise(sums: Sequence[Sequence[LossPass]]) -> str:
    if all(len(together) == 1 for together in sums):
        return "in one pass" if len(sums) == 1 else "each in one pass"
    totals = dict.fromkeys(f"{_total(together):.3g}" for together in sums)
    return f"each weighs the same, and all together {name_some(totals)}"


def _total(passes: Sequence[LossPass]) -> float:
    return sum(one.weight * one.tokens for one in passes)


def _faults(passes: Sequence[LossPass]) -> list[str]:
    """What is wrong with the passes that feed one update."""
    empty = [one for one in passes if not one.tokens and one.mean]
    if empty:
        return [f"{len(empty)} of {len(passes)} passes have none: {_NO_TOKENS}"]
    weights = [one.weight for one in passes if one.tokens]
    tolerance = max(one.tolerance for one in passes)
    if not weights or len(passes) == 1:
        return []
    least, most = min(weights), max(weights)
    if most - least > tolerance * max(abs(least), abs(most)):
        ratio = f"{most / least:.3g} times as much as others" if least > 0 else f"{most:.3g}, others {least:.3g}"
        return [f"some weigh {ratio}: {_MEAN_OF_MEANS}"]
    if all(one.mean for one in passes) and abs(_total(passes) - len(passes)) <= tolerance * len(passes):
        return [f"their weights add up to {len(passes)} and not to 1: {_SUM_OF_MEANS}"]
    return []


PATHS: Mapping[str, JudgedPath] = {
    "loss.tokens": JudgedPath(requirement=FLAG, judge=judge_tokens),
}
