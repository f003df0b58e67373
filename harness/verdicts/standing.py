"""How a run stands: what its controls say, which trials have no result, and whether it is valid as a whole.

Whoever asks is told the same: the report, a comparison, the gate, a baseline, a tried remedy, the pytest session.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from harness.records.metrics import PHASES, Phase, primary_metric
from harness.records.record import Notice, Role
from harness.records.store import Run
from harness.stats import Comparison
from harness.studies.study import Study
from harness.verdicts.notices import notices_of
from harness.verdicts.series import Series, compare_series, compare_to_reference, series_of, without_equivalent

Groups = Mapping[tuple[str, Role], Series]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What is said of a run before any of its numbers."""

    primary: Mapping[Phase, str]
    """The metric that variants are compared by, of each phase that was measured."""
    controls: Mapping[Phase, Comparison | None]
    """The reference against itself measured twice, by phase; None: it should have been measured and was not."""
    failures: tuple[str, ...]
    """Trials without a result, each with its reason, and trials that left no record."""
    notices: tuple[Notice, ...]
    """What a reader of the numbers must know, each once."""
    valid: bool
    """False when a trial is not ok, a line is lost, or a control is missing or came out as a difference."""


def standing_of(run: Run, study: Study) -> Standing:
    """How a run stands by the records that there are. Raises nothing for missing trials: what is not there is said."""
    groups = series_of(run.records)
    primary = {phase: primary_metric(phase, own_workloads=bool(run.manifest.own_workloads)) for phase in phases_of(run)}
    controls = {
        phase: control_of(groups, study.reference, metric, family=len(primary)) for phase, metric in primary.items()
    }
    failures = (*_failures(run), *_missing(run))
    return Standing(
        primary=primary,
        controls=controls,
        failures=failures,
        notices=notices_of(run, study, controls),
        valid=(
            not failures
            and not run.damaged_lines
            and run.manifest.status == "complete"
            and all(control is not None for control in controls.values())
            and not any(control.verdict in ("improved", "regressed") for control in controls.values() if control)
        ),
    )


def phases_of(run: Run) -> tuple[Phase, ...]:
    """What a run measured, in the order in which phases are shown."""
    return tuple(phase for phase in PHASES if phase in run.manifest.phases)


def control_of(groups: Groups, name: str, metric: str, *, family: int) -> Comparison | None:
    """The reference, by its name, against its twin; None where either has no trial."""
    reference, twin = groups.get((name, "variant")), groups.get((name, "control"))
    if reference is None or twin is None:
        return None
    return compare_series(reference, twin, metric, family=family)


def ratios_of(groups: Groups, study: Study, metric: str, control: Comparison | None) -> dict[str, Comparison]:
    """Every other variant against the reference, by name; none is equivalent where the control is not."""
    reference = groups.get((study.reference, "variant"))
    if reference is None:
        return {}
    others = [series for (name, role), series in groups.items() if role == "variant" and name != study.reference]
    order = {variant.name: place for place, variant in enumerate(study.variants)}
    others = sorted((one for one in others if one.name in order), key=lambda one: order[one.name])
    ratios = compare_to_reference(reference, others, metric)
    if control is not None and control.verdict == "equivalent":
        return ratios
    reason = "the control itself is not equivalent, so nothing here can be"
    return {name: without_equivalent(ratio, reason) for name, ratio in ratios.items()}


def _failures(run: Run) -> Iterator[str]:
    for record in run.records:
        if record.status != "ok":
            failure = record.failure
            said = f" in {failure.phase}: {failure.message}" if failure else ""
            yield f"{record.trial}: {record.status}{said} (log: {record.log})"


def _missing(run: Run) -> Iterator[str]:
    """Trials of the plan that left no record: the parent was killed, or the run is still going on."""
    known = {record.trial for record in run.records}
    missing = [trial for trial in run.manifest.order if trial not in known]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        yield f"{shown}: no record (the run is {run.state})"
