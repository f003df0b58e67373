"""The command that says what memory a variant will take: `estimate`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from harness.commands.options import add_options
from harness.commands.output import print_json
from harness.errors import EXIT_PASS

if TYPE_CHECKING:
    from harness.models.costs.memory import MemoryEstimate
    from harness.records.memory_account import MemoryPhase


def add_commands(commands: Any, common: Any) -> None:
    """The parser of this command; `common` adds the options that every command has."""
    estimate = commands.add_parser(
        "estimate",
        help="what memory a variant will take, by kind, without loading anything",
        description="Estimate the peak memory of a variant's training and generation on this machine, by kind.",
    )
    estimate.add_argument("variant", metavar="VARIANT", help="STUDY:NAME, or a TOML file with one variant")
    add_options(estimate.add_argument, "profile")
    estimate.add_argument("--model", metavar="M", help="another model; its shape is enough, so random:M never loads")
    estimate.add_argument("--data", metavar="FILE|ID", help="of the earlier run to set beside the estimate")
    common(estimate)
    estimate.set_defaults(command=run_estimate)


def run_estimate(options: argparse.Namespace) -> int:
    """Print the estimate, what an earlier run measured beside it, and whether it fits; or why there is none."""
    from harness.models import catalogue, shapes
    from harness.models.costs.memory import estimate_memory, stored_dtype
    from harness.records import store
    from harness.records.memory_account import MEMORY_PHASES
    from harness.run.executors import open_executor
    from harness.run.feasibility import layers_notice, memory_notices
    from harness.run.forecast import measured_peaks, process_bytes
    from harness.studies.study_file import load_variant

    executor, runs = open_executor(), store.runs_dir(options.runs_dir)
    machine = executor.machine()
    study, variant = load_variant(options.variant, profile=options.profile, device=machine.kind)
    workload = study.with_overrides(model=options.model, data=options.data).workload
    source = catalogue.resolve(workload.model)
    shape, stored = shapes.shape(source), stored_dtype(source)
    unknown = shapes.unknown_layers(shape)
    process = process_bytes(machine, runs)
    kind = "device_peak_allocated_{}_bytes" if machine.device == "cuda" else "host_peak_{}_bytes"
    estimates: dict[MemoryPhase, MemoryEstimate] = {}
    measured: dict[str, int] = {}
    for phase in MEMORY_PHASES:
        if not unknown:
            estimates[phase] = estimate_memory(
                variant, workload, shape, phase=phase, device=machine.device, stored=stored, process_bytes=process
            )
        peaks = measured_peaks(workload, machine, runs, kind.format(phase))
        if variant.id in peaks:
            measured[phase] = peaks[variant.id]
    notices = [layers_notice(workload.model, unknown)] if unknown else []
    if estimates:
        most = max(estimates.values(), key=lambda one: one.needed_bytes)
        notices += memory_notices(variant, most, machine, executor.free_bytes())
    if options.json:
        print_json(
            {
                "variant": variant.name,
                "id": variant.id,
                "model": workload.model,
                "device": machine.device,
                **{phase: _document(estimates.get(phase), measured.get(phase)) for phase in MEMORY_PHASES},
                "notices": [notice.message for notice in notices],
            }
        )
    else:
        from harness.report.estimate import describe_estimate
        from harness.report.notices import tell_notices
        from harness.report.terminal import console_for, show

        estimated = describe_estimate(variant, workload, machine, tuple(estimates.values()), measured)
        show((*estimated, *tell_notices(notices)), console_for())
    return EXIT_PASS


def _document(estimate: MemoryEstimate | None, measured: int | None) -> dict[str, Any]:
    total = None if estimate is None else estimate.total_bytes
    return {
        "kinds": {} if estimate is None else estimate.kinds,
        "beside": {} if estimate is None else estimate.beside,
        "total_bytes": total,
        "measured_bytes": measured,
        "error": None if measured is None or total is None else total / measured - 1,
    }
