"""Turns a comparison into pass or fail by a policy, which a team stores with its code.

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
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorameter.errors import EXIT_INCONCLUSIVE, EXIT_NOT_COMPARABLE, EXIT_PASS, UsageError
from lorameter.records import codec, fileio
from lorameter.records.store import Run
from lorameter.studies.limits import check_fraction
from lorameter.verdicts.compare import ComparisonReport, document, exit_code, worst_exit_code
from lorameter.verdicts.series import ComparisonLimits, default_limits


def _checked(tolerance: float | None, margin: float | None, where: str) -> None:
    check_fraction(where, "tolerance", tolerance, zero=True)
    check_fraction(where, "margin", margin)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitRule:
    """Limits for variants and metrics that match two glob patterns; None leaves a limit unchanged."""

    variant: str = "*"
    """Pattern of variant names."""
    metric: str = "*"
    """Pattern of metrics and kinds of memory."""
    tolerance: float | None = None
    """Smallest slow-down, or growth of a peak, worth an alarm; a fraction: 0.05 is 5 %."""
    margin: float | None = None
    """Two values within it count as equal; a fraction."""

    def __post_init__(self) -> None:
        _checked(self.tolerance, self.margin, f"limit of {self.variant!r}, {self.metric!r}")

    def matches(self, variant: str, metric: str) -> bool:
        """Whether both patterns match."""
        return fnmatch.fnmatchcase(variant, self.variant) and fnmatch.fnmatchcase(metric, self.metric)


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
        _checked(self.tolerance, self.margin, "policy")

    def limits_of(self, variant: str, metric: str) -> ComparisonLimits:
        """Tolerance and margin of one comparison."""
        limits = default_limits(variant, metric)
        exact = limits.tolerance == 0  # computed bytes stay exact unless a limit names them
        general = LimitRule(tolerance=None if exact else self.tolerance, margin=self.margin)
        for rule in (general, *self.limit):
            if rule.matches(variant, metric):
                limits = ComparisonLimits(
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
    except fileio.NotReadableError as error:
        raise UsageError(f"policy {path}: {error}") from None
    return codec.from_json(Policy, data, path, strict=True)


def stored_policy(run: Run) -> Policy:
    """The policy under which an A/B run was measured; the defaults if it has none."""
    return codec.from_json(Policy, run.manifest.policy, f"run {run.manifest.run}: policy")


def judge(report: ComparisonReport, policy: Policy) -> GateResult:
    """The exit code of a comparison under a policy."""
    unmet = tuple(_unmet(report, policy))
    verdicts = exit_code(
        report.comparisons, inconclusive=EXIT_PASS if policy.inconclusive == "pass" else EXIT_INCONCLUSIVE
    )
    return GateResult(
        report=report,
        policy=policy,
        unmet=unmet,
        exit_code=worst_exit_code([verdicts, *([EXIT_NOT_COMPARABLE] if unmet else [])]),
    )


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
        **document(result.report),
        "exit": result.exit_code,
        "passed": result.passed,
        "unmet": list(result.unmet),
        "policy": codec.to_json(result.policy),
    }
