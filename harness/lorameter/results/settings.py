"""The last columns of a row: whether its trials count, the settings of their variant, and their software."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorameter.errors import InvalidRunError
from lorameter.machine.software import normal_name
from lorameter.records import codec
from lorameter.records.record import TrialRecord
from lorameter.records.store import Run
from lorameter.results.columns import OF_VARIANT, OF_WORKLOAD, VERSIONS, Values
from lorameter.studies.from_run import read_own_workloads
from lorameter.studies.script import SIDE
from lorameter.studies.study import Study
from lorameter.studies.variant import OF_4BIT, AnyVariant, ScriptVariant, Variant
from lorameter.studies.workload import identify
from lorameter.verdicts.software import facts_of
from lorameter.verdicts.validity import Fault, InvalidReason, run_validity, say_faults


class Validity:
    """Whether trials of a run count, and why they do not."""

    def __init__(self, run: Run, study: Study) -> None:
        self._faults: tuple[Fault, ...]
        try:
            self._faults = run_validity(run, study).faults
        except InvalidRunError as error:  # samples from which no control can be computed
            self._faults = (Fault(reason=InvalidReason.CONTROL_NOT_MEASURED, message=str(error)),)

    def of(self, record: TrialRecord) -> Values:
        """Values of `columns.VALIDITY` for the variant and side of a trial."""
        own = (record.name, record.side)
        found = [
            fault
            for fault in self._faults
            if not fault.variant or (record.role == "variant" and own == (fault.variant, fault.side))
        ]
        return (False, found[0].reason.value, say_faults(found)) if found else (True, None, None)


class Settings:
    """Settings of the variants of a run."""

    def __init__(self, run: Run, study: Study) -> None:
        self._run, self._study = run, study
        self._variants = {variant.name: variant for variant in study.variants}
        self._own = {} if study.of_scripts else read_own_workloads(run)
        self._known: dict[tuple[str, str], Values] = {}

    def id_of(self, record: TrialRecord) -> str:
        """The id of a trial's variant, with the workload that the variant alone has."""
        return identify(record.variant, self._own.get(record.name))

    def of(self, records: Sequence[TrialRecord]) -> Values:
        """Values of `columns.SETTINGS` for trials of one variant and side."""
        name, side = records[0].name, records[0].side
        if any(record.software for record in records):
            return self._values(name, side, records)
        if (name, side) not in self._known:
            self._known[name, side] = self._values(name, side, records)
        return self._known[name, side]

    def _values(self, name: str, side: str, records: Sequence[TrialRecord]) -> Values:
        about = self._run.manifest.sides.get(side, {})
        provenance: Mapping[str, Any] = self._run.manifest.provenance
        if own := about.get("facts"):  # an A/B of environments or revisions
            libraries = {package: own["packages"].get(normal_name(package)) for package in VERSIONS}
            provenance = {**provenance, "libraries": libraries, "git": own.get("git", {})}
        facts = facts_of(provenance, records)
        git, libraries = facts.get("git", {}), facts.get("libraries", {})
        workload = None if self._study.of_scripts else self._own.get(name, self._study.workload)
        return (
            *self._of_variant(self._variants.get(name), about),
            *(
                _plain(getattr(workload, column.name.removeprefix("workload_"), None), column.kind)
                for column in OF_WORKLOAD
            ),
            git.get("commit"),
            git.get("dirty"),
            *(libraries.get(package) for package in VERSIONS),
        )

    def _of_variant(self, variant: AnyVariant | None, side: Mapping[str, Any]) -> Values:
        if variant is None:
            return (None,) * len(OF_VARIANT)
        known: dict[str, Any] = {"method": variant.method_name}
        if isinstance(variant, ScriptVariant):
            known["command"] = side.get("spec") if side.get("kind") == SIDE else variant.command
            return tuple(known.get(column.name) for column in OF_VARIANT)
        known["peft_config"] = getattr(variant, "peft", None)
        known |= dict.fromkeys(OF_4BIT) if isinstance(variant, Variant) and not variant.is_4bit else {}
        return tuple(
            _plain(known[column.name] if column.name in known else getattr(variant, column.name, None), column.kind)
            for column in OF_VARIANT
        )


def _plain(value: Any, kind: str) -> Any:
    """A setting as a value of its column."""
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, dict):
        return codec.dumps(value) if value else None
    return float(value) if kind == "number" and value is not None else value
