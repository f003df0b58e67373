"""What must really run, judged by the checks of a watched step: of a trial, of a script, of a training under way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lorameter.records.record import Failure, Notice, PartialRecord


def lacking(checks: Iterable[Mapping[str, Any]], required: Mapping[str, Any]) -> Failure | None:
    """The failure of a step that lacks a required path; what nobody watched is no pass. None where it has all.

    Args:
        checks: as data, of the paths that were judged.
        required: values by path.
    """
    seen = {str(check["path"]): check for check in checks}
    failed = {
        path: value for path, value in required.items() if path not in seen or seen[path].get("status") != "active"
    }
    if not failed:
        return None
    unseen = "no row of the watched step is about it" if seen else "no step was watched"
    said = "; ".join(
        f"{path}: required {value!r}, {seen[path].get('reason') if path in seen else unseen}"
        for path, value in failed.items()
    )
    kind = "RequiredPathNotSeen" if seen.keys().isdisjoint(failed) else "RequiredPathNotActive"
    return Failure(phase="verify", kind=kind, message=said)


def judge_required(
    fragment: PartialRecord, required: Mapping[str, Any], *, name: str, allow_fallback: bool
) -> PartialRecord:
    """The fragment of a verified trial: invalid where it lacks what is required, or with a notice where that is
    allowed."""
    failure = lacking(fragment.checks, required)
    if failure is None:
        return fragment
    if not allow_fallback:
        return fragment.failed("invalid", failure)
    return fragment.with_notice(
        Notice(
            code="fallback-allowed",
            message=f"{name}: measured although not what is required: {failure.message}",
            remedy="Rank it under what really ran, or set allow_fallback = false in the study.",
        )
    )
