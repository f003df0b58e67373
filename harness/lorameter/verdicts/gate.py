"""Turns a comparison into pass or fail by a policy, which a team stores with its code, and manages the baseline.

inconclusive = "fail"            # or "pass"
tolerance = 0.01                 # of times and of peaks, as a fraction: 0.01 is 1 %
margin = 0.05                    # a fraction
metrics = ["step_time_s", "*peak*"]   # gated metrics; default: the primary metric of each phase and the peaks
required = ["nf4-*"]             # variants that must have been compared
losses = "agree"                 # losses of both sides of an A/B must agree; default: "any"

[[limit]]                        # for each key, the last matching limit counts
variant = "nf4-*"
metric = "cold_*"
tolerance = 0.10

A gate that passes silently is worse than none. So an unknown key is refused, a missing required variant fails, a gated
metric without measurements fails, and an inconclusive verdict fails unless the policy lets it pass.

The baseline is the accepted run for a fingerprint and a study. A run never becomes the baseline automatically: the
newest run may be the slow one, and a baseline that follows every run hides a slow-down in small steps. A user must
accept a run, and an invalid run cannot be accepted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorameter.errors import EXIT_INCONCLUSIVE, EXIT_NOT_COMPARABLE, EXIT_PASS, InvalidRunError, UsageError, require
from lorameter.measurements.metrics import is_difference_metric
from lorameter.records import codec, fileio, store
from lorameter.records.codec import NotReadableError
from lorameter.records.fileio import write_document
from lorameter.records.store import Run, is_packed
from lorameter.stats import VerdictRule
from lorameter.studies.protocol import check_fraction, check_minimum
from lorameter.studies.study_file import read_study
from lorameter.verdicts.benchmark_files import list_benchmarks, read_benchmark_json, read_benchmarks
from lorameter.verdicts.compare import (
    ComparisonInput,
    ComparisonReport,
    comparison_document,
    comparison_input,
    exit_code,
    worst_exit_code,
)
from lorameter.verdicts.series import default_limits
from lorameter.verdicts.validity import run_validity


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitRule:
    """Limits for variants and metrics that match two glob patterns; None leaves a limit unchanged."""

    variant: str = "*"
    """Pattern of variant names."""
    metric: str = "*"
    """Pattern of metrics and kinds of memory."""
    tolerance: float | None = None
    """Smallest slow-down, or growth of a peak, worth an alarm; a fraction: 0.05 is 5 %. Of a metric that is compared by
    differences, and is named here in full, in its unit."""
    margin: float | None = None
    """Two values within it count as equal; a fraction."""

    def __post_init__(self) -> None:
        where = f"limit of {self.variant!r}, {self.metric!r}"
        if is_difference_metric(self.metric):
            check_minimum(where, self, {"tolerance": 0, "margin": 0})
            return
        check_fraction(where, "tolerance", self.tolerance, zero=True)
        check_fraction(where, "margin", self.margin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The policy of a gate. Raises `UsageError` for an invalid limit."""

    inconclusive: Literal["fail", "pass"] = "fail"
    """Whether an inconclusive comparison passes or fails."""
    tolerance: float | None = None
    """Smallest slow-down, or growth of a peak, worth an alarm; a fraction; default 0.01 (1 %)."""
    margin: float | None = None
    """Two values within it count as equal; a fraction; default 0.05 (5 %)."""
    metrics: tuple[str, ...] = ()
    """Names or patterns of the gated metrics; default: the primary metric of each phase and the peaks."""
    required: tuple[str, ...] = ()
    """Patterns of variants, at least one of which must have been compared."""
    losses: Literal["any", "agree"] = "any"
    """Whether the losses of both sides of an A/B must agree."""
    limit: tuple[LimitRule, ...] = ()
    """Separate limits for some variants and metrics."""

    def __post_init__(self) -> None:
        check_fraction("policy", "tolerance", self.tolerance, zero=True)
        check_fraction("policy", "margin", self.margin)

    def limits_of(self, variant: str, metric: str) -> VerdictRule:
        """Tolerance and margin of one comparison."""
        limits = default_limits(variant, metric)
        exact = limits.tolerance == 0  # computed bytes stay exact unless a limit names them
        general = LimitRule(tolerance=None if exact else self.tolerance, margin=self.margin)
        for rule in (general, *self.limit):
            if is_difference_metric(metric) and rule.metric != metric:
                continue  # the fractions of a pattern say nothing about differences in a unit
            if fnmatch.fnmatchcase(variant, rule.variant) and fnmatch.fnmatchcase(metric, rule.metric):
                limits = dataclasses.replace(
                    limits,
                    tolerance=limits.tolerance if rule.tolerance is None else rule.tolerance,
                    margin=limits.margin if rule.margin is None else rule.margin,
                )
        return limits


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """A comparison judged by a policy."""

    report: ComparisonReport
    policy: Policy
    unmet: tuple[str, ...]
    """Requirements of the policy that the comparison does not meet."""
    exit_code: int

    @property
    def passed(self) -> bool:
        """Whether the gate passes; only exit code 0 is a pass."""
        return self.exit_code == EXIT_PASS


def read_policy(data: Mapping[str, Any]) -> Policy:
    """The policy in a manifest; the defaults if it has none."""
    return codec.from_json(Policy, data, "policy") if data else Policy()


def load_policy(path: str | None) -> Policy:
    """Read a policy file; without one, use the defaults.

    Raises:
        UsageError: the file does not exist, is not TOML, or has an invalid value; the message names file, key, value
            and remedy.
    """
    if path is None:
        return Policy()
    try:
        data = fileio.read_toml(Path(path))
    except NotReadableError as error:
        raise UsageError(f"policy {path}: {error}") from None
    return codec.from_json(Policy, data, path, strict=True)


def stored_policy(run: Run) -> Policy:
    """The policy under which an A/B run was measured; the defaults if it has none."""
    return codec.from_json(Policy, run.manifest.policy, f"run {run.manifest.run}: policy")


def judge(report: ComparisonReport, policy: Policy) -> GateResult:
    """The exit code of a comparison under a policy."""
    unmet = tuple(_unmet(report, policy))
    inconclusive = EXIT_PASS if policy.inconclusive == "pass" else EXIT_INCONCLUSIVE
    codes = [exit_code(report.comparisons, inconclusive=inconclusive), *(EXIT_NOT_COMPARABLE for _ in unmet)]
    return GateResult(report=report, policy=policy, unmet=unmet, exit_code=worst_exit_code(codes))


def _unmet(report: ComparisonReport, policy: Policy) -> Iterator[str]:
    variants = {compared.variant for compared in report.comparisons}
    metrics = {compared.metric for compared in report.comparisons}
    for key, patterns, found in (("required", policy.required, variants), ("metrics", policy.metrics, metrics)):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in found):
                yield f"{key} = {pattern!r} of the policy: nothing of that name was compared"
    if not report.comparisons:
        yield "nothing was compared"
    if policy.losses == "agree":
        for name, losses in report.losses.items():
            if losses.found != "agree":
                yield f"losses = 'agree' of the policy: {name}: {losses.found}: {losses.reason}"
        if not report.losses:
            yield "losses = 'agree' of the policy: no losses were compared, which is done in an A/B"


def gate_document(result: GateResult) -> dict[str, Any]:
    """The comparison's JSON document with the result of the gate, without its `schema`."""
    return {
        **comparison_document(result.report),
        "exit": result.exit_code,
        "passed": result.passed,
        "unmet": list(result.unmet),
        "policy": codec.to_json(result.policy),
    }


WORD = "baseline"
"""Names the accepted run of the candidate's fingerprint and study, in place of a base."""
FILE = "baselines.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """One accepted run."""

    fingerprint: str
    study: str
    run: str
    accepted_unix_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Baselines:
    """The content of the file: one baseline for each fingerprint and study."""

    schema: Literal[1] = 1
    baselines: tuple[Baseline, ...] = ()

    def find(self, fingerprint: str | None, study: str | None) -> Baseline | None:
        """The accepted run; None if there is none."""
        return next((one for one in self.baselines if (one.fingerprint, one.study) == (fingerprint, study)), None)


def read_baselines(runs: Path) -> Baselines:
    """Read the accepted runs of this runs directory. Raises `UsageError` for a damaged file."""
    path = runs / FILE
    if not fileio.is_there(path):
        return Baselines()
    try:
        data = fileio.read_json(path)
    except NotReadableError as error:
        raise UsageError(f"{path}: cannot be read: {error}. Restore it, or remove it and accept again.") from None
    return codec.from_json(Baselines, data, str(path))


@contextlib.contextmanager
def lock_baselines(runs: Path) -> Iterator[None]:
    """Hold the lock under which runs of this directory are accepted or removed, so that no baseline is removed."""
    import filelock

    with filelock.FileLock(runs / f".{FILE}.lock"):
        yield


def accept(name: str, runs: Path) -> tuple[Baseline, Baseline | None]:
    """Make a run the baseline of its fingerprint and study; returns the new baseline and the one that it replaces.

    Raises:
        UsageError: the run does not exist, is not in this runs directory, or cannot be a side of a comparison.
        InvalidRunError: the run is not completely valid.
    """
    run = store.read_run(name, runs)
    require(
        run.path.resolve().parent == runs.resolve(),
        f"run {name!r}: is outside of {runs}, where its baseline would be kept. Give --runs-dir {run.path.parent}.",
    )
    comparison_input(run)  # a baseline must be comparable
    validity = run_validity(run, read_study(run))
    if validity.invalid:
        raise InvalidRunError(
            f"run {run.path.name}: not valid, so it was not accepted: {validity.invalid}. "
            f"See `lorameter report {run.path.name}`."
        )
    accepted = Baseline(
        fingerprint=run.manifest.fingerprint,
        study=str(run.manifest.study["name"]),
        run=run.path.name,
        accepted_unix_s=time.time(),
    )
    with lock_baselines(runs):
        require(
            fileio.is_there(run.path), f"run {run.path.name}: it was removed while it was read. Accept another run."
        )
        known = read_baselines(runs)
        replaced = known.find(accepted.fingerprint, accepted.study)
        others = tuple(baseline for baseline in known.baselines if baseline != replaced)
        write_document(runs / FILE, Baselines(baselines=(*others, accepted)))
    return accepted, replaced


def read_base(name: str, runs: Path, *, fingerprint: str | None, study: str | None) -> ComparisonInput:
    """Read a base by name, or the accepted run for this fingerprint and study if the name is `baseline`.

    If no run was accepted, the side is absent, and every comparison with it has the verdict `no_baseline`.
    """
    if name != WORD:
        return read_comparand(name, runs)
    baseline = read_baselines(runs).find(fingerprint, study) if fingerprint and study else None
    if baseline is None:
        about = f"study {study!r} with fingerprint {fingerprint}" if fingerprint else "a side without a fingerprint"
        return ComparisonInput(
            name=WORD, absent=f"no run was accepted for {about} in {runs}: `lorameter accept RUN` accepts one"
        )
    try:
        return comparison_input(store.read_run(baseline.run, runs))
    except UsageError as error:
        raise UsageError(f"the accepted baseline cannot be read: {error} Accept another run.") from None


def read_comparand(name: str, runs: Path) -> ComparisonInput:
    """Read a run by id, directory or packed file, a pytest-benchmark file, or several such files by folder or pattern.

    Raises:
        UsageError: the name is none of these, or cannot be read.
    """
    if fileio.is_file(name) and not is_packed(Path(name)):
        return read_benchmark_json(Path(name))
    if not store.is_run(Path(name)) and not store.is_run(runs / name) and list_benchmarks(name):
        return read_benchmarks(name)
    return comparison_input(store.read_run(name, runs))
