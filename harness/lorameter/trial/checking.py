"""What a trial's step must show, and what the record holds of it.

The check watches two untimed steps that the training takes anyway: the update of the first step, and the whole second
step. Two are needed to see that an update is kept and that both factors of an adapter learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import kernels_check
from kernels_check.check import Check
from lorameter.records import codec
from lorameter.records.record import PartialRecord, judge_required
from lorameter.studies.request import TrialRequest
from lorameter.trial.building.build import TrainableModel
from lorameter.trial.building.requirements import requirements_of
from lorameter.trial.data.stream import Batch


def wanted_of(request: TrialRequest, trainee: TrainableModel, packed: Batch | None) -> dict[str, Any]:
    """Requirements by path; `packed` is what the isolation of records is probed with."""
    shapes = tuple(parameter.numel() for parameter in trainee.parameters)
    return requirements_of(request.variant, shapes, packed=packed is not None) | request.requirements


def watch_of(request: TrialRequest, trainee: TrainableModel, packed: Batch | None) -> kernels_check.Watch | None:
    """What watches the first two steps of a trial; None where it is checked in steps of its own: where they compile, or
    several ranks take them."""
    if request.variant.compile or request.workload.ranks > 1:
        return None
    return kernels_check.watch(trainee.model, wanted_of(request, trainee, packed))


def with_probe(checks: Sequence[Check], probed: Check) -> list[Check]:
    """The checks of a step, one of which was probed by forward passes as well; a fault that the step shows stays."""
    return [
        probed if check.path == probed.path and check.status in ("active", "unknown") else check for check in checks
    ]


def judge_checks(fragment: PartialRecord, checks: Sequence[Check], request: TrialRequest) -> PartialRecord:
    """The fragment that holds the checks, invalid where a required path is not active."""
    judged: Mapping[str, Any] = {check.path: check.required for check in checks if check.required is not None}
    return judge_required(fragment, judged, name=request.variant.name, allow_fallback=request.allow_fallback)


def as_data(checks: Sequence[Check]) -> tuple[dict[str, Any], ...]:
    """The checks as a record holds them."""
    return tuple(codec.to_json(check) for check in checks)
