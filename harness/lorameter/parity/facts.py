"""The observations of one adapter served in several ways, as stored on disk; conclusions are computed on demand."""

from __future__ import annotations

from dataclasses import dataclass

from lorameter.records.record import Notice, Served, TrialRecord
from lorameter.studies.request import ServingMode
from lorameter.studies.variant import BuiltVariant
from lorameter.studies.workload import Workload

SCHEMA = 1
DOCUMENT = "parity.json"
"""The file with the facts in a folder of logs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """All facts, without estimates.

    Attributes:
        schema: version of the file.
        study: name of the study.
        variant: variant of the adapter.
        workload: workload of the prompts.
        device: "cpu" or "cuda".
        device_name: the vendor's name of the device.
        adapter: folder of a given adapter; empty if it was trained here.
        record: the training of the adapter, with its checks; None for a given adapter.
        ways: ways in the order of serving; the first is the reference.
        served: the observations for each way.
        prompts: number of tokens of each prompt.
        notices: notices about the machine and the study, if there is no record.
    """

    schema: int = SCHEMA
    study: str
    variant: BuiltVariant
    workload: Workload
    device: str
    device_name: str
    adapter: str
    record: TrialRecord | None
    ways: tuple[ServingMode, ...]
    served: tuple[Served, ...]
    prompts: tuple[tuple[int, ...], ...]
    notices: tuple[Notice, ...] = ()

    @property
    def reference(self) -> Served:
        """The observations of the reference: the adapter unmerged, on the base on which it was trained."""
        return self.served[0]
