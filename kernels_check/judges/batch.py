"""What is fed to the model: whether packed records see each other, and how much of it is padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kernels_check.check import FLAG, SHARE, Check, Json, JudgedPath, PathObservation, Status, judge_safely, name_some

if TYPE_CHECKING:
    from torch import nn

    from kernels_check.observe.observation import Observation
    from kernels_check.observe.padding import IsolationResult, PaddingSeen

_LEAK = (
    "positions tell records apart only without a cache, which is the default, and without a mask of two dimensions: "
    "pass use_cache=False and no attention_mask, or a mask of blocks to a model whose mask knows no positions (OPT)"
)
_PADDED = "pack the records into full rows, or sort them by length"


def probe_isolation(model: nn.Module, batch: Mapping[str, Any]) -> Check:
    """Check that the records packed in ``batch`` are isolated, in training and in evaluation.

    Args:
        model: called as ``model(**batch)``, three times a mode, see ``isolation``.
        batch: ``input_ids`` of [rows, tokens], and ``position_ids`` that restart at each record, or whatever else
            tells the model its records (see ``records``); further entries (such as ``use_cache``) are passed on, labels
            only where the model does not run without.

    Returns:
        The check of ``packing.isolated`` against True. Parameters, modes and random numbers are left as found.
    """
    from kernels_check.isolation import isolation_of

    return judge_safely("packing.isolated", True, lambda: _judge_leaks(isolation_of(model, [], batch)))


def judge_isolation(seen: Observation, required: Json) -> PathObservation:
    """Judge ``packing.isolated``: by forwards that changed records, else by what the model was given."""
    return _judge_leaks(seen.isolation())


def _judge_leaks(seen: IsolationResult) -> PathObservation:
    if seen.leaks:
        return PathObservation(observed=False, reason="; ".join([*seen.leaks, _LEAK]))
    if seen.unclear is not None:
        return PathObservation(observed=None, status="unknown", present=seen.packed, reason=seen.unclear)
    return PathObservation(observed=True, reason=f"{seen.records} records: {seen.proof}")


def judge_padding(seen: Observation, required: Json) -> PathObservation:
    """Judge ``padding.share``, a maximum: by what is surely padding it must not be exceeded, nor by what may be."""
    padding = seen.padding()
    if padding is None or not padding.tokens:
        missing = "no call of the model itself was seen" if padding is None else padding.unseen
        return PathObservation(
            observed=None, present=False, status=None if required is None else "unknown", reason=f"{missing}"
        )
    share, most_there_is = (count / padding.tokens for count in (padding.padded, padding.padded + padding.doubtful))
    most = float(required) if isinstance(required, int | float) else 1.0
    reasons = [_describe(padding), *([padding.unseen] if padding.unseen is not None else [])]
    if share > most:
        return PathObservation(observed=round(share, 4), reason="; ".join([*reasons, _PADDED]), satisfies=False)
    if padding.unseen is not None or most_there_is > most:
        status: Status | None = None if required is None else "unknown"
        return PathObservation(observed=round(share, 4), status=status, reason="; ".join(reasons))
    return PathObservation(observed=round(share, 4), reason="; ".join(reasons), satisfies=True)


def _describe(padding: PaddingSeen) -> str:
    """Both numbers, what showed it, and the calls where they differ."""
    share = padding.padded / padding.tokens if padding.tokens else 0.0
    by = f", shown by {' and '.join(padding.by)}" if padding.by else ""
    text = f"{padding.padded} of {padding.tokens} positions ({share:.0%}) are padding{by}"
    if len(set(padding.by_call)) > 1:
        text += f" (by call: {name_some(f'{padded} of {total}' for padded, total in padding.by_call)})"
    if padding.doubtful:
        text += (
            f"; {padding.doubtful} more at the ends of records repeat one token, or are one that pads, and nothing "
            "says whether they are text"
        )
    return text


PATHS: Mapping[str, JudgedPath] = {
    "packing.isolated": JudgedPath(requirement=FLAG, judge=judge_isolation, on_request=True),
    "padding.share": JudgedPath(requirement=SHARE, judge=judge_padding),
}
