"""What `--dry-run` of `run` and `ab` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorameter.commands.output import print_json
from lorameter.errors import EXIT_PASS

if TYPE_CHECKING:
    from lorameter.machine.provenance import Machine
    from lorameter.records.record import Notice
    from lorameter.run.plan import Plan


def show_plan(plan: Plan, machine: Machine, notices: Sequence[Notice], runs: Path, *, as_json: bool) -> int:
    """Print a plan and what it is expected to take, as text or as one JSON document."""
    from lorameter.run.feasibility import NOT_HERE
    from lorameter.run.forecast import Forecast, forecast
    from lorameter.run.forecast_time import TimeForecast
    from lorameter.studies.data_source import SYNTHETIC
    from lorameter.studies.script import OWN
    from lorameter.studies.workload import LOSSES
    from lorameter.trial.data.records import describe_data

    expected = forecast(plan, machine, runs)
    if any(notice.code == NOT_HERE for notice in notices):  # what it would take on another machine is not known here
        why = "it cannot be measured on this machine"
        took = TimeForecast(time_s=None, basis=why)
        expected = Forecast(time=took, memory_bytes=None, disk_bytes=expected.disk_bytes, unknown=why)
    workload = plan.study.workload
    own = workload.data in (SYNTHETIC, OWN)
    data = None if own else f"{describe_data(workload)}; {LOSSES[workload.loss]}"
    if as_json:
        print_json(
            {
                "order": [slot.trial for slot in plan.slots],
                "interleaving": plan.interleaving,
                "why": plan.why,
                "seed": plan.study.protocol.seed,
                "time_s": expected.time.time_s,
                "time_basis": expected.time.basis,
                "replicates": expected.time.replicates,
                "skipped": list(expected.time.skipped),
                "half_width": expected.time.half_width,
                "noise_basis": expected.time.noise,
                "time_for_3_percent_s": expected.time.sought_width_s,
                "memory_bytes": expected.memory_bytes,
                "disk_bytes": expected.disk_bytes,
                **({"unknown": expected.unknown} if expected.unknown else {}),
                **({"data": data} if data else {}),
            }
        )
        return EXIT_PASS
    from lorameter.report.estimate import describe_plan
    from lorameter.report.terminal import console_for, show

    show(describe_plan(plan, expected, machine, notices, data), console_for())
    return EXIT_PASS
