"""What is fed to the model: whether packed records see each other, and how much of it is padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kernels_check.check import FLAG, SHARE, Check, Finding, Json, JudgedPath, judge_safely

if TYPE_CHECKING:
    from torch import nn

    from kernels_check.observation.isolation import IsolationSeen
    from kernels_check.observation.observe import Observation

_LEAK = "default use_cache builds a cache and skips packed detection: pass use_cache=False and no attention_mask"
_PADDED = "pack the records into full rows, or sort them by length"


def probe_isolation(model: nn.Module, batch: Mapping[str, Any]) -> Check:
    """Check that the records packed in ``batch`` are isolated, in training and in evaluation.

    Args:
        model: called as ``model(**batch)``, twice unchanged and twice perturbed per mode.
        batch: ``input_ids`` and ``position_ids``, both [rows, tokens], the latter restarting at each record; further
            entries (such as ``use_cache``) are passed on, labels are not.

    Returns:
        The check of ``packing.isolated`` against True. Parameters, modes and random numbers are left as found.
    """
    from kernels_check.observation.isolation import perturb_records

    return judge_safely("packing.isolated", True, lambda: _judge_leaks(perturb_records(model, batch)))


def judge_isolation(seen: Observation, required: Json) -> Finding:
    """Judge ``packing.isolated``."""
    return _judge_leaks(seen.isolation())


def _judge_leaks(seen: IsolationSeen) -> Finding:
    if seen.unclear is not None:
        return Finding(observed=None, status="unknown", present=seen.packed, reason=seen.unclear)
    if seen.leaks:
        return Finding(observed=False, reason="; ".join([*seen.leaks, _LEAK]))
    reason = f"{seen.records} records: perturbations changed no other logit, in train and in eval"
    return Finding(observed=True, reason=reason)


def judge_padding(seen: Observation, required: Json) -> Finding:
    """Judge ``padding.share``, a maximum."""
    padding = seen.padding
    if padding is None:
        reason = "no call of the model itself with input_ids of [rows, tokens] was seen"
        return Finding(observed=None, present=False, status="not_applicable", reason=reason)
    share = padding.padded / padding.tokens
    reason = f"{padding.padded} of {padding.tokens} positions ({share:.0%}) are padding, told by {padding.by}"
    most = float(required) if isinstance(required, int | float) else 1.0
    if padding.by.startswith("nothing"):
        return Finding(observed=None, present=False, status=None if required is None else "unknown", reason=reason)
    return Finding(
        observed=round(share, 4),
        reason=reason if share <= most else f"{reason}: {_PADDED}",
        satisfies=share <= most,
    )


PATHS: Mapping[str, JudgedPath] = {
    "packing.isolated": JudgedPath(requirement=FLAG, judge=judge_isolation, instruments=("profile",), packed=True),
    "padding.share": JudgedPath(requirement=SHARE, judge=judge_padding, rests_on=("inputs",)),
}
