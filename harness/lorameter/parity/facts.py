"""What was observed of one adapter served in several ways, as it is stored; conclusions are computed on demand."""

from __future__ import annotations

from dataclasses import dataclass

from lorameter.records.parity import Served
from lorameter.records.record import Notice, TrialRecord
from lorameter.studies.request import ServingMode
from lorameter.studies.variant import BuiltVariant
from lorameter.studies.workload import Workload

SCHEMA = 1
DOCUMENT = "parity.json"
"""The file of a folder that is not a log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """All facts; nothing is an estimate.

    Attributes:
        schema: version of the file.
        study: name.
        variant: whose adapter it is.
        workload: of the prompts.
        device: "cpu" or "cuda".
        device_name: as its vendor calls it.
        adapter: folder of the adapter that was given; empty where it was trained here.
        record: the training of the adapter, with its checks; None of one that was given.
        ways: in the order in which they were served; the first is the reference.
        served: what was observed, a way each.
        prompts: tokens of each.
        notices: of the machine and the study, where there is no record.
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
        """The adapter next to the base that it was trained on."""
        return self.served[0]
