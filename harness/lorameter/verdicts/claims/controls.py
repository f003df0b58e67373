"""What the control allows a claim to say: the reference against itself, metric by metric.

If the reference differs from itself in a metric, or in the one that stands for its phase, nothing is asserted on that
metric. If it is not equivalent to itself, no equality is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorameter.errors import InvalidRunError
from lorameter.records.metrics import METRICS, PHASES, PRIMARY
from lorameter.records.units import format_ratio
from lorameter.stats import Comparison
from lorameter.studies.claim import ClaimPart
from lorameter.studies.study import Study
from lorameter.verdicts.claims.questions import spoken
from lorameter.verdicts.series import Groups, control_of, is_difference

Controls = Mapping[str, Comparison | None]
"""By metric, the reference against itself; None where it was not measured."""


def controls_of(groups: Groups, study: Study, phases: Sequence[str]) -> Controls:
    """The primary metric of each phase as the report of the run has it, then every other metric that is claimed.

    Either group shares an error rate of 5 %, so identical code seldom fails.
    """
    primaries = [PRIMARY[phase] for phase in PHASES if phase in phases]
    claimed = dict.fromkeys(name for claim in study.claims for part in claim.parts for name in metrics_of(part))
    others = [name for name in claimed if name in METRICS and name not in primaries]
    return {
        name: _against_itself(groups, study.reference, name, len(family))
        for family in (primaries, others)
        for name in family
    }


def _against_itself(groups: Groups, reference: str, metric: str, family: int) -> Comparison | None:
    try:
        return control_of(groups, reference, metric, family=family)
    except InvalidRunError:  # values without a logarithm have no ratio, and what is claimed of them is not judged
        return None


def metrics_of(part: ClaimPart) -> tuple[str, ...]:
    """The metrics that a part is about."""
    return tuple(part.metrics) or (part.metric,)


def failed(control: Comparison | None) -> bool:
    """Whether the reference differs from itself."""
    return control is not None and is_difference(control)


def doubt(part: ClaimPart, controls: Controls) -> str:
    """Why nothing may be asserted of a part; empty where it may."""
    for metric in metrics_of(part):
        for name in dict.fromkeys((metric, PRIMARY[METRICS[metric].phase])):
            found = controls.get(name)
            if found is not None and failed(found):
                ratio = format_ratio(found.ratio, found.low, found.high)
                return f"the control differs from itself in {spoken(name)}, ×{ratio}, so the claim is not judged"
    return ""


def doubt_of_equality(part: ClaimPart, controls: Controls) -> str:
    """Why no equality may be asserted of a part; empty where it may."""
    for metric in metrics_of(part):
        found = controls.get(metric)
        if found is None or found.verdict != "equivalent":
            return f"the control is not equivalent to itself in {spoken(metric)}, so nothing is called equal"
    return ""
