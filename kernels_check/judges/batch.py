"""What is fed to the model: whether packed records see each other, and how much of it is padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kernels_check.check import FLAG, SHARE, Check, Json, JudgedPath, PathObservation, Status, judge_safely

if TYPE_CHECKING:
    from torch import nn

    from kernels_check.observe.isolation import IsolationResult
    from kernels_check.observe.observation import Observation

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
    from kernels_check.observe.isolation import isolation_of

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
    from kernels_check.observe.inputs import describe

    padding = seen.padding()
    if padding is None or not padding.tokens:
        missing = "no call of the model itself was seen" if padding is None else padding.unseen
        return PathObservation(
            observed=None, present=False, status=None if required is None else "unknown", reason=f"{missing}"
        )
    share, most_there_is = (count / padding.tokens for count in (padding.padded, padding.padded + padding.doubtful))
    most = float(required) if isinstance(required, int | float) else 1.0
    reasons = [describe(padding), *([padding.unseen] if padding.unseen is not None else [])]
    if share > most:
        return PathObservation(observed=round(share, 4), reason="; ".join([*reasons, _PADDED]), satisfies=False)
    if padding.unseen is not None or most_there_is > most:
        status: Status | None = None if required is None else "unknown"
        return PathObservation(observed=round(share, 4), status=status, reason="; ".join(reasons))
    return PathObservation(observed=round(share, 4), reason="; ".join(reasons), satisfies=True)


PATHS: Mapping[str, JudgedPath] = {
    "packing.isolated": JudgedPath(requirement=FLAG, judge=judge_isolation, on_request=True),
    "padding.share": JudgedPath(requirement=SHARE, judge=judge_padding),
}
