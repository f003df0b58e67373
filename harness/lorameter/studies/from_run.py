"""The study of a stored run, and the workloads of variants' own: how every reader of a run gets them.

A run of a newer schema may say of its study what this version does not know (`lorameter.records.forward_compat`). A
claim that it does not know how to judge, or that speaks of such a thing, is left out with the others: the numbers can
be read all the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lorameter.errors import UsageError
from lorameter.records import codec
from lorameter.records.forward_compat import Left, read_known
from lorameter.records.store import Run
from lorameter.studies.protocol import Protocol
from lorameter.studies.study import Study
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload

_REPLACED = {"workload": Workload, "protocol": Protocol, "controls": Variant}
_OF_VARIANTS = ("claims", "engine")


def read_study(run: Run) -> Study:
    """The study that a run measured. Raises `UsageError` for one that cannot be."""
    if run.newer is None:
        return codec.from_json(Study, run.manifest.study, f"run {run.manifest.run}")
    return _known_study(run, {})


def read_own_workloads(run: Run) -> dict[str, Workload]:
    """The workloads of variants that were not measured on the study's, by name. Raises `UsageError` likewise."""
    return _own_workloads(run, {})


def read_workload_of(run: Run, name: str) -> Workload:
    """What one variant was measured on. Raises `UsageError` likewise."""
    return read_own_workloads(run).get(name) or read_study(run).workload


def list_unread(run: Run) -> tuple[str, ...]:
    """What this version does not know of a run of a newer schema, by dotted names; () of any other."""
    if run.newer is None:
        return ()
    left: Left = {}
    _known_study(run, left)
    _own_workloads(run, left)
    return (*run.newer.unread, *left)


def _known_study(run: Run, left: Left) -> Study:
    data, where = _without_unknown_keys(run.manifest.study, left), "manifest.json, study"
    try:
        return read_known(Study, data, where, left)
    except UsageError as error:
        if not any(data.get(key) for key in _OF_VARIANTS):
            raise
        without = {key: value for key, value in data.items() if key not in _OF_VARIANTS}
        study = read_known(Study, without, where, left)
        left[f"{where}, claims ({str(error).rstrip('.')})"] = None
        return study


def _without_unknown_keys(study: Mapping[str, Any], left: Left) -> dict[str, Any]:
    """What a profile or an option has replaced, named by a field, is held to fields that there are."""
    replaced = study.get("replaced")
    if not isinstance(replaced, Mapping):
        return dict(study)
    known = {f"{section}.{field.name}" for section, owner in _REPLACED.items() for field in dataclasses.fields(owner)}
    left.update((f"manifest.json, study, replaced, {key}", None) for key in replaced if key not in known)
    return {**study, "replaced": {key: value for key, value in replaced.items() if key in known}}


def _own_workloads(run: Run, left: Left) -> dict[str, Workload]:
    own, where = run.manifest.own_workloads, f"run {run.manifest.run}"
    if run.newer is None:
        return codec.from_json(dict[str, Workload], own, where)
    place = "manifest.json, own_workloads"
    return {name: read_known(Workload, one, f"{place}, {name}", left) for name, one in own.items()}
