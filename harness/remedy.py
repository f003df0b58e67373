"""A finding's remedy, tried: the present variant against the suggested one, measured like any two variants.

A diagnosis counts what hangs on a thing; what is won without it shows only beside its replacement. So the remedy is a
variant, the present one is the reference, and the control, the verdict and the interval are those of every study.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from harness.diagnosis import Finding
from harness.errors import UsageError
from harness.protocol import Protocol
from harness.series import compare_series, compare_to_reference, series_of, without_equivalent
from harness.stats import Comparison
from harness.store import Run
from harness.study import Study
from harness.variant import Variant

METRIC = "step_time_s"


def chosen(findings: Sequence[Finding], code: str | None) -> Finding:
    """The finding to try: the one named, or the most expensive whose remedy is a variant.

    Raises:
        UsageError: no such finding here, or its remedy is no change of the variant.
    """
    possible = [finding for finding in findings if finding.changes]
    known = ", ".join(finding.code for finding in possible) or "none"
    if code is None:
        if not possible:
            raise UsageError("--try: no finding here has a remedy that is a change of the variant.")
        return possible[0]
    finding = next((finding for finding in findings if finding.code == code), None)
    if finding is None:
        raise UsageError(f"--try {code}: not found in this profile. Can be tried: {known}.")
    if not finding.changes:
        raise UsageError(f"--try {code}: {finding.remedy} That is no change of the variant. Can be tried: {known}.")
    return finding


def study_of(study: Study, variant: Variant, finding: Finding, *, protocol: Protocol) -> Study:
    """Two variants on the study's workload: the present one, which is the reference, and the suggested one.

    Raises:
        UsageError: the change makes no variant that could run.
    """
    changes = {"name": f"without-{finding.code}", **finding.changes}
    return Study(
        name=f"try-{finding.code}",
        title=f"{variant.name} against " + ", ".join(f"{key} = {value}" for key, value in finding.changes.items()),
        workload=study.workload,
        protocol=protocol,
        variants=(variant, dataclasses.replace(variant, **changes)),
        reference=variant.name,
        allow_fallback=study.allow_fallback,
        requirements={path: value for path, value in study.requirements.items() if not _about(path, finding)},
    )


def _about(path: str, finding: Finding) -> bool:
    """Whether a requirement of the study is about what the remedy changes."""
    words = {"quantization": "base", "compute_dtype": "base", "dtype": "base", "adapter_dtype": "lora"}
    return any(path.partition(".")[0] in (words.get(key, key), key.partition("_")[0]) for key in finding.changes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What came of a remedy."""

    finding: Finding
    run: str
    interleaving: str
    comparison: Comparison | None
    """Step time of the suggested variant over that of the present one, below 1 is a gain; None where either failed."""
    control: Comparison | None
    """The present variant against itself."""
    failures: tuple[str, ...]

    @property
    def valid(self) -> bool:
        """Whether the comparison counts: every trial ok, and the control no difference."""
        control = self.control
        return (
            self.comparison is not None
            and not self.failures
            and control is not None
            and control.verdict not in ("improved", "regressed")
        )


def tried(run: Run, finding: Finding) -> Tried:
    """Judge the run of such a study."""
    groups = series_of(run.records)
    reference = str(run.manifest.study["reference"])
    base, twin = groups.get((reference, "variant")), groups.get((reference, "control"))
    others = [series for (name, role), series in groups.items() if role == "variant" and name != reference]
    control = compare_series(base, twin, METRIC) if base and twin else None
    comparison = None
    if base and others:
        comparison = compare_to_reference(base, others, METRIC).get(others[0].name)
    if comparison is not None and (control is None or control.verdict != "equivalent"):
        comparison = without_equivalent(comparison, "the control itself is not equivalent, so nothing here can be")
    failures = tuple(
        f"{record.trial}: {record.status}" + (f": {record.failure.message}" if record.failure else "")
        for record in run.records
        if record.status != "ok"
    )
    return Tried(
        finding=finding,
        run=run.manifest.run,
        interleaving=run.manifest.interleaving,
        comparison=comparison,
        control=control,
        failures=failures,
    )
