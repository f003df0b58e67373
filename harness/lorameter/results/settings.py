"""How the trials of a row were set up: the settings of their variant, its workload, and the software they ran with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

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


class Settings:
    """Of one run."""

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
        facts = facts_of(self._provenance(side), records)
        git, libraries = facts.get("git", {}), facts.get("libraries", {})
        return (
            *self._of_variant(self._variants.get(name), self._run.manifest.sides.get(side, {})),
            *self._of_workload(name),
            git.get("commit"),
            git.get("dirty"),
            *(libraries.get(package) for package in VERSIONS),
        )

    def _provenance(self, side: str) -> Mapping[str, Any]:
        """The provenance of the run, with the software of a side that has its own."""
        own = self._run.manifest.sides.get(side, {}).get("facts")
        if not own:
            return self._run.manifest.provenance
        libraries = {name: own["packages"].get(normal_name(name)) for name in VERSIONS}
        return {**self._run.manifest.provenance, "libraries": libraries, "git": own.get("git", {})}

    def _of_variant(self, variant: AnyVariant | None, side: Mapping[str, Any]) -> Values:
        if variant is None:
            return (None,) * len(OF_VARIANT)
        if isinstance(variant, ScriptVariant):
            command = side.get("spec") if side.get("kind") == SIDE else variant.command
            known = {"command": command, "method": variant.method_name}
            return tuple(known.get(column.name) for column in OF_VARIANT)
        unread = OF_4BIT if isinstance(variant, Variant) and not variant.is_4bit else ()
        known = {"method": variant.method_name, "peft_config": getattr(variant, "peft", None)}
        return tuple(
            None
            if column.name in unread
            else _plain(known.get(column.name, getattr(variant, column.name, None)), column.kind)
            for column in OF_VARIANT
        )

    def _of_workload(self, name: str) -> Values:
        if self._study.of_scripts:
            return (None,) * len(OF_WORKLOAD)
        fields = dataclasses.asdict(self._own.get(name, self._study.workload))
        return tuple(_plain(fields[column.name.removeprefix("workload_")], column.kind) for column in OF_WORKLOAD)


def _plain(value: Any, kind: str) -> Any:
    """A setting as a value of its column."""
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, dict):
        return codec.dumps(value) if value else None
    return float(value) if kind == "number" and value is not None else value
