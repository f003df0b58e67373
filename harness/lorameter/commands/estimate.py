"""The command that says what memory a variant will take, and whether a GPU holds it: `estimate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lorameter.commands.output import print_json
from lorameter.errors import EXIT_PASS
from lorameter.machine.provenance import Machine
from lorameter.models import catalogue, shapes
from lorameter.models.costs.cards import find_card
from lorameter.models.costs.lora import uncounted
from lorameter.models.costs.memory import PEAK_RANGES, MemoryEstimate, birth_bytes, estimate_phases
from lorameter.records import store
from lorameter.records.memory_account import MEMORY_PHASES, MemoryPhase
from lorameter.report.estimate import describe_basis, describe_estimate, describe_fit
from lorameter.report.notices import warn_before_run
from lorameter.report.terminal import console_for, show
from lorameter.run.feasibility import layers_notice, memory_notices, type_notices
from lorameter.run.forecast import measured_peaks
from lorameter.run.memory_fit import Advice, Fitter, Needs, advise, on_card, on_machine
from lorameter.run.workers import open_executor
from lorameter.studies.study_file import load_variant
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload


def run_estimate(options: argparse.Namespace) -> int:
    """Print the estimate, what an earlier run measured beside it, and whether it fits; or why there is none."""
    card = None if options.gpu is None else find_card(options.gpu)
    executor, runs = open_executor(), store.runs_dir(options.runs_dir)
    here = executor.machine()
    device = None if card is None else on_card(here, card)
    if device is None and options.max_batch:
        device = on_machine(here, executor.free_bytes())
    machine = here if device is None else device.machine
    study, variant = load_variant(options.variant, profile=options.profile, device=machine.kind)
    workload = study.with_overrides(model=options.model, data=options.data).workload
    source = catalogue.resolve(workload.model)
    shape = shapes.shape(source)
    unknown = uncounted(variant, shape)
    process = birth_bytes(here.cuda)
    found = (
        []
        if unknown
        else estimate_phases(
            variant, workload, shape, device=machine.device, repacks=machine.avx512_bf16, process_bytes=process
        )
    )
    estimates = {one.phase: one for one in found}
    # Peaks of this machine's runs are of its own device: those of a CPU say nothing of a GPU.
    measured = _measured(variant, workload, here, runs) if machine.device == here.device else {}
    advice = None
    if device is not None and not unknown:
        fitter = Fitter(device=device, shape=shape, process_bytes=process)
        advice = advise(fitter, variant, workload, with_largest=options.max_batch)
    notices = [layers_notice(workload.model, unknown)] if unknown else []
    notices += type_notices(variant, machine)
    if estimates and card is None:
        most = max(estimates.values(), key=lambda one: one.needed_bytes)
        notices += memory_notices(variant, most, machine, executor.free_bytes())
    profile = study.profile or None
    if options.json:
        about = {"variant": variant.name, "id": variant.id, "model": workload.model, "device": machine.device}
        phases: dict[str, Any] = {
            phase: _document(estimates.get(phase), measured.get(phase)) for phase in MEMORY_PHASES
        }
        asked = {"profile": profile, "fit": advice and _fit_document(advice, estimates)} if device is not None else {}
        print_json({**about, **phases, "notices": [notice.message for notice in notices], **asked})
        return EXIT_PASS

    estimated = describe_estimate(
        variant, workload, machine, tuple(estimates.values()), measured, elsewhere=card is not None
    )
    fit = () if advice is None else describe_fit(advice, workload, profile)
    show((*estimated, *fit, *warn_before_run(notices)), console_for())
    return EXIT_PASS


def _measured(variant: Variant, workload: Workload, here: Machine, runs: Path) -> dict[str, int]:
    """The largest peak of earlier runs on this machine, by phase."""
    kind = "device_peak_allocated_{}_bytes" if here.device == "cuda" else "host_peak_{}_bytes"
    peaks = {phase: measured_peaks(workload, here, runs, kind.format(phase)) for phase in MEMORY_PHASES}
    return {phase: found[variant.id] for phase, found in peaks.items() if variant.id in found}


def _document(estimate: MemoryEstimate | None, measured: int | None) -> dict[str, Any]:
    total = None if estimate is None else estimate.total_bytes
    return {
        "kinds": {} if estimate is None else estimate.kinds,
        "beside": {} if estimate is None else estimate.beside,
        "total_bytes": total,
        "measured_bytes": measured,
        "error": None if measured is None or total is None else total / measured - 1,
    }


def _fit_document(advice: Advice, estimates: dict[MemoryPhase, MemoryEstimate]) -> dict[str, Any]:
    device = advice.device
    low, high = PEAK_RANGES[device.machine.device]
    return {
        "device": {
            "name": device.name,
            "total_bytes": device.total_bytes,
            "usable_bytes": device.usable_bytes,
            "source": device.source,
            "assumed": device.assumed,
        },
        "status": advice.status,
        "needs": advice.needs,
        "phases": {
            phase: Needs.of(estimate.needed_bytes, device.machine.device) for phase, estimate in estimates.items()
        },
        "spare_bytes": device.usable_bytes - advice.needs.high_bytes,
        "error": {"low": low - 1, "high": high - 1, "basis": describe_basis(device.machine.device)},
        "options": advice.options,
        "skipped": advice.skipped,
        "turn": advice.turn,
        "largest": advice.largest,
    }
