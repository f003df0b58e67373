"""What was checked of each path in each variant, as a figure that is a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import cast

from kernels_check.check import Status
from lorameter.report.blocks import Tone
from lorameter.report.figure import Figure, FigureCheck, Matrix
from lorameter.verdicts.series import Series

_TONES: Mapping[Status, Tone] = {
    "fallback": "bad",
    "absent": "bad",
    "unknown": "warning",
    "not_applicable": "warning",
    "active": "good",
}
"""The colour of each status of a required path, the worst status first. Only `active` meets a requirement."""


def checks_matrix(shown: Mapping[str, Series]) -> Figure | None:
    """A row a path, a column a variant; None where nothing was checked."""
    checks = [check for series in shown.values() for record in series.records for check in record.checks]
    paths = dict.fromkeys(str(check["path"]) for check in checks)
    if not checks:
        return None
    rows = tuple((path, tuple(_evidence(series, path) for series in shown.values())) for path in paths)
    return Figure(
        title="Checks of the paths that ran",
        says="What kernels_check found of each path in each variant; a word opens its evidence.",
        drawing=Matrix(columns=tuple(shown), rows=rows),
        table=None,
    )


def _evidence(series: Series, path: str) -> FigureCheck | None:
    """All that was found of a path in a variant's trials, by the worst status."""
    found = [check for record in series.records for check in record.checks if check["path"] == path]
    if not found:
        return None
    worst = min((str(check["status"]) for check in found), key=_severity)
    observed = Counter(str(check["observed"]) for check in found if check["status"] == worst).most_common(1)[0][0]
    required = any(check["required"] is not None for check in found)
    counted = Counter(f"{check['status']}: {check['reason']}" for check in found)
    return FigureCheck(
        text=f"{worst}: {observed}" if observed not in ("", "None") else worst,
        tone=_TONES.get(cast(Status, worst), "warning") if required else "plain",
        reasons=tuple(f"{reason} ({count} of {len(found)} trials)" for reason, count in counted.most_common()),
    )


def _severity(status: str) -> int:
    """The place of a status, the worst first; a status of a newer version counts as `unknown`."""
    order = list(_TONES)
    return order.index(status if status in order else "unknown")
