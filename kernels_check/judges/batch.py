"""Judges the inputs of the model: isolation of packed records, the share of padding, and the tokens in the loss.

Every training token must have the same weight, however the batch is split into passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kernels_check.check import (
    FLAG,
    SHARE,
    Json,
    JudgedPath,
    PathObservation,
    Status,
    absent,
    join_clauses,
    name_some,
    undecided,
)

if TYPE_CHECKING:
    from kernels_check.observe.loss import LossPass
    from kernels_check.observe.observation import Observation
    from kernels_check.observe.padding import PaddingRecord

_PADDED = "pack the records into full rows, or sort them by length"


def judge_isolation(observation: Observation, required: Json) -> PathObservation:
    """Judge ``packing.isolated`` by forward passes of the step's own packed calls."""
    return observation.isolation


def judge_padding(observation: Observation, required: Json) -> PathObservation:
    """Judge ``padding.share``, a maximum: neither certain padding alone nor with possible padding may exceed it."""
    padding = observation.padding
    if padding is None or not padding.tokens:
        missing = "no call of the model itself was seen" if padding is None else padding.unseen
        known = required is None or observation.untouched
        status: Status | None = None if known else "unknown"
        return PathObservation(observed=None, present=False, status=status, satisfies=False, reason=f"{missing}")
    share, largest_share = (count / padding.tokens for count in (padding.padded, padding.padded + padding.doubtful))
    maximum = float(required) if isinstance(required, int | float) else 1.0
    exceeds = share > maximum
    is_open = not exceeds and (padding.unseen is not None or largest_share > maximum)
    return PathObservation(
        observed=round(share, 4),
        reason=join_clauses(_describe(padding), padding.unseen, _PADDED if exceeds else ""),
        status="unknown" if is_open and required is not None else None,
        satisfies=not exceeds,
    )


_MEAN_OF_MEANS = (
    "a mean of means: pass num_items_in_batch, the tokens of the whole batch, to each forward, or weigh each loss by "
    "its share of them"
)
_SUM_OF_MEANS = (
    "a sum of means, as if the loss is not divided by the number of passes: gradients are larger by that factor"
)
_NO_TOKENS = "a mean over no tokens is not a number: leave such rows out"


def judge_tokens(observation: Observation, required: Json) -> PathObservation:
    """Judge ``loss.tokens``: the tokens of all passes of one update have the same weight, and the loss is not a sum of
    means.

    The sum of the weights is only reported, unless it equals the number of passes, each of which is a mean: a loss may
    be scaled, for example by a GradScaler, which hides a missing division.
    """
    if observation.loss.unseen is not None:
        return (
            absent(observation.loss.unseen) if required is None else undecided(observation.loss.unseen, present=False)
        )
    passes = observation.loss.passes
    counts = [one.tokens for one in passes]
    sums = [[one for one in passes if one.sum == number] for number in sorted({one.sum for one in passes})]
    reason = f"the loss is over {sum(counts)} of {sum(one.positions for one in passes)} tokens"
    reason += f", in {len(passes)} passes of {name_some(map(str, counts))}" if len(passes) > 1 else ""
    reason += f", for {len(sums)} updates or evaluations" if len(sums) > 1 else ""
    faults = dict.fromkeys(fault for group in sums if (fault := _find_fault(group)) is not None)
    return PathObservation(observed=not faults, reason=join_clauses(reason, *(faults or [_describe_weights(sums)])))


def _describe_weights(sums: Sequence[Sequence[LossPass]]) -> str:
    """A description of the weights of a correct loss."""
    if all(len(group) == 1 for group in sums):
        return "in one pass" if len(sums) == 1 else "each in one pass"
    totals = dict.fromkeys(f"{_total(group):.3g}" for group in sums)
    return f"all tokens have the same weight; the weights sum to {name_some(totals)}"


def _total(passes: Sequence[LossPass]) -> float:
    return sum(one.weight * one.tokens for one in passes)


def _find_fault(passes: Sequence[LossPass]) -> str | None:
    """The fault of the passes of one update; None if they are correct."""
    empty = [one for one in passes if not one.tokens and one.mean]
    if empty:
        return f"{len(empty)} of {len(passes)} passes have none: {_NO_TOKENS}"
    weights = [one.weight for one in passes if one.tokens]
    tolerance = max(one.tolerance for one in passes)
    if not weights or len(passes) == 1:
        return None
    least, most = min(weights), max(weights)
    if most - least > tolerance * max(abs(least), abs(most)):
        ratio = f"{most / least:.3g} times as much as others" if least > 0 else f"{most:.3g}, others {least:.3g}"
        return f"some weigh {ratio}: {_MEAN_OF_MEANS}"
    if all(one.mean for one in passes) and abs(_total(passes) - len(passes)) <= tolerance * len(passes):
        return f"their weights add up to {len(passes)} and not to 1: {_SUM_OF_MEANS}"
    return None


def _describe(padding: PaddingRecord) -> str:
    """Padded and all positions, the evidence, and the counts by call if they differ."""
    by = f", shown by {' and '.join(sorted(padding.by))}" if padding.by else ""
    text = f"{padding.padded} of {padding.tokens} positions ({padding.padded / padding.tokens:.0%}) are padding{by}"
    if len(set(padding.by_call)) > 1:
        text += f" (by call: {name_some(f'{padded} of {total}' for padded, total in padding.by_call)})"
    if padding.doubtful:
        text += (
            f"; {padding.doubtful} more at the ends of records repeat one token or are padding tokens, and nothing "
            "shows whether they are text"
        )
    return text


PATHS: Mapping[str, JudgedPath] = {
    "packing.isolated": JudgedPath(requirement=FLAG, judge=judge_isolation, on_request=True),
    "padding.share": JudgedPath(requirement=SHARE, judge=judge_padding),
    "loss.tokens": JudgedPath(requirement=FLAG, judge=judge_tokens),
}
