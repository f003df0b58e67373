"""What was checked of each path in each variant, as a figure that is a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from harness.report.figure import Evidence, Figure, Matrix
from harness.report.table import Tone
from harness.verdicts.series import Series

_ORDER = {"inactive": 1, "unknown": 2, "active": 3, "not_applicable": 4}
"""Which status stands for the others; one that is not known here stands before all."""
_TONES: Mapping[str, Tone] = {"active": "good", "inactive": "bad"}


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


def _evidence(series: Series, path: str) -> Evidence | None:
    """All that was found of a path in a variant's trials; what is least good stands first."""
    found = [check for record in series.records for check in record.checks if check["path"] == path]
    if not found:
        return None
    order = ("inactive", "unknown", "active")
    worst = min(
        (str(check["status"]) for check in found), key=lambda status: order.index(status) if status in order else 1
    )
    observed = Counter(str(check["observed"]) for check in found if check["status"] == worst).most_common(1)[0][0]
    required = any(check["required"] is not None for check in found)
    counted = Counter(f"{check['status']}: {check['reason']}" for check in found)
    return Evidence(
        text=f"{worst}: {observed}" if observed not in ("", "None") else worst,
        tone=_TONES.get(worst, "warning") if required else "plain",
        reasons=tuple(f"{reason} ({count} of {len(found)} trials)" for reason, count in counted.most_common()),
    )
