"""`pytest benchmarks/ --lorameter-base=RUN`: the gate of the command line, on what this session measured.

Whatever can be refused is refused before the first trial: a base that cannot be read, that is invalid, or that was
measured on another machine, with other libraries or other variants. Hours of measuring would end in "not comparable".
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

from kernels_check.terminal import escape_control_chars
from lorameter.errors import UsageError, redact
from lorameter.records import store
from lorameter.verdicts.baselines import WORD, read_base
from lorameter.verdicts.compare import compare
from lorameter.verdicts.comparison_input import (
    ComparisonInput,
    comparison_input,
    disagreement,
    machine_differences,
    planned_side,
    variant_differences,
)
from lorameter.verdicts.gate import GateResult, Policy, judge, load_policy
from lorameter.verdicts.software import REPORTED

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

    import pytest

    from lorameter.records.store import Run
    from lorameter.studies.study import Study

OPTION = "--lorameter-base"


def load_gate(config: pytest.Config, *, measures: bool) -> SessionGate | None:
    """The gate that the options ask for; None without a base. Raises `UsageError` for options that gate nothing."""
    base, policy = config.getoption(OPTION), config.getoption("--lorameter-policy")
    if not base:
        if policy:
            raise UsageError(f"--lorameter-policy: there is no base to gate against. Add {OPTION}=RUN.")
        return None
    if not measures:
        raise UsageError(f"{OPTION}: this session measures nothing that could be judged. Leave one of the options out.")
    return SessionGate(base, load_policy(policy), store.runs_dir(config.getoption("--lorameter-runs-dir")))


class SessionGate:
    """The base of one session and the policy that judges against it."""

    def __init__(self, base: str, policy: Policy, runs: Path) -> None:
        self._name = base
        self._policy = policy
        self._runs = runs
        self._base: ComparisonInput | None = None

    def prepare(self, study: Study, facts: Mapping[str, Any], fingerprint: str) -> None:
        """Read the base and check it against what is about to be measured. What a script's process tells itself is not
        known yet, and judged at the end.

        Raises:
            UsageError: it cannot be read, is invalid, or does not agree. A baseline that nobody accepted yet is none
                of these: how else would the first one be measured? It ends as `no_baseline`.
        """
        base = self._base = read_base(self._name, self._runs, fingerprint=fingerprint, study=study.name)
        if base.broken:
            raise UsageError(f"{OPTION}: {base.broken}. Give a valid run.")
        if study.of_scripts:
            known = base.facts or {}
            facts = {**facts, **{name: known[name] for name in REPORTED if name in known}}
        session = planned_side(study, facts)
        found = machine_differences(base, session)
        for name in session.sides:
            found += variant_differences(name, base, session)
        if found:
            raise UsageError(f"{OPTION}: {base.name} is not comparable: {disagreement(found, force=False)}.")

    def judged(self, run: Run | None) -> GateResult | str:
        """The gate's result, or why there is none; no exception on the way is a pass."""
        if run is None:
            return "Gate failed: nothing was measured, so there was nothing to judge.\n"
        try:
            return self._judge(run)
        except Exception:
            text = escape_control_chars(redact(traceback.format_exc()))
            return f"Gate failed: the comparison ended in an error.\n{text}"

    def _judge(self, run: Run) -> GateResult:
        """The verdicts on a run. Variants that were not selected are not asked for."""
        base, candidate = self._base, comparison_input(run)
        if base is None or self._name == WORD:  # the run's fingerprint is the one that was measured
            base = read_base(self._name, self._runs, fingerprint=candidate.fingerprint, study=candidate.study)
        studied = frozenset(variant["name"] for variant in run.manifest.study["variants"])
        base = base.without(studied - candidate.sides.keys())
        report = compare(base, candidate, metrics=self._policy.metrics, limits_of=self._policy.limits_of)
        return judge(report, self._policy)
