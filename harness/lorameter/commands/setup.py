"""Commands before a measurement: `init` writes a suite, `doctor` checks the machine, `estimate` estimates the memory of
a variant and whether it fits on a GPU, and `completion` prints shell completions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lorameter.commands.output import print_result, show_result
from lorameter.commands.parser import build_parser
from lorameter.errors import EXIT_INVALID, EXIT_PASS, require
from lorameter.machine.doctor import examine, is_fit, survey
from lorameter.machine.products import make_target
from lorameter.machine.provenance import Machine
from lorameter.models import catalogue, shapes
from lorameter.models.costs.lora import missing_formula
from lorameter.models.costs.memory import PEAK_RANGES, MemoryEstimate, baseline_bytes, estimate_phases
from lorameter.models.costs.peaks import find_gpu
from lorameter.records import codec, store
from lorameter.records.os_errors import translate_write_errors
from lorameter.records.record import MEMORY_PHASES, MemoryPhase
from lorameter.report.estimate import describe_basis, describe_checks, describe_estimate, describe_fit
from lorameter.report.phrases import warn_before_run
from lorameter.run.feasibility import layers_notice, memory_notices, type_notices
from lorameter.run.forecast import measured_peaks
from lorameter.run.memory_fit import Advice, Fitter, Needs, advise, on_gpu, on_machine
from lorameter.run.workers import open_executor
from lorameter.studies.study_file import load_variant
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload

FILES = {
    "conftest.py": '''\
"""Makes this folder a lorameter suite: its tests replay one interleaved run."""

from lorameter.pytest_plugin import attach


def pytest_configure(config):
    """Attach the session that plans, measures and reports."""
    attach(config)
''',
    "test_variants.py": '''\
"""One test per variant and phase; select with `-k`. Run as `pytest benchmarks/ --benchmark-save=NAME`."""

import pytest


@pytest.mark.lorameter("train")
def test_train_step(replay):
    """Time of one optimizer step: forward, backward, clip, update."""
    replay()


@pytest.mark.lorameter("generate")
def test_generate_warm(replay):
    """Time of one greedy request with the trained adapter, unmerged, in a warm process."""
    replay()


@pytest.mark.lorameter("cold")
def test_cold_start(replay):
    """Time from starting an interpreter to the first completion of the trained adapter."""
    replay()
''',
}
"""The text of each file of a suite."""


def run_init(options: argparse.Namespace) -> int:
    """Write the files. Raises `UsageError` if one of them exists; then none is written."""
    folder: Path = options.folder
    existing = [name for name in FILES if (folder / name).exists()]
    require(
        not existing, f"init: {folder} already holds {' and '.join(existing)}. Give another folder, or remove them."
    )
    with translate_write_errors(f"init: {folder}", "Give another folder."):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in FILES.items():
            (folder / name).write_text(text)
    wrote = f"wrote {' and '.join(str(folder / name) for name in FILES)}"
    next_step = f"next: pytest {folder} --benchmark-save=NAME"
    print_result(options, f"{wrote}\n{next_step}", {"folder": str(folder), "files": list(FILES)})
    return EXIT_PASS


def run_doctor(options: argparse.Namespace) -> int:
    """Print the checks; the exit code says whether the machine can be used for measurements."""
    checks = examine(survey(store.runs_dir(options.runs_dir)))
    fit = is_fit(checks)
    show_result(options, describe_checks(checks, fit=fit), lambda: {"fit": fit, "checks": checks})
    return EXIT_PASS if fit else EXIT_INVALID


def run_completion(options: argparse.Namespace) -> int:
    """Print the completion script for a shell."""
    import shtab

    script = shtab.complete(build_parser(), shell=options.shell)
    print_result(options, script, {"shell": options.shell, "script": script})
    return EXIT_PASS


def run_estimate(options: argparse.Namespace) -> int:
    """Print the estimate, the peaks of earlier runs, and whether it fits; or why there is no estimate."""
    gpu = None if options.gpu is None else find_gpu(options.gpu)
    executor, runs = open_executor(), store.runs_dir(options.runs_dir)
    here = executor.machine()
    device = None if gpu is None else on_gpu(here, gpu)
    if device is None and options.max_batch:
        device = on_machine(here, executor.free_bytes())
    machine = here if device is None else device.machine
    study, variant = load_variant(options.variant, profile=options.profile, target=make_target(machine))
    workload = study.with_overrides(model=options.model, data=options.data).workload
    shape = shapes.shape(catalogue.resolve(workload.model))
    process, estimates, advice = baseline_bytes(here.cuda), dict[MemoryPhase, MemoryEstimate](), None
    unknown = missing_formula(variant, shape)
    notices = [layers_notice(workload.model, unknown)] if unknown else []
    if not unknown:
        phase_estimates = estimate_phases(
            variant, workload, shape, device=machine.device, repacks=machine.avx512_bf16, process_bytes=process
        )
        estimates = {one.phase: one for one in phase_estimates}
        if device is not None:
            fitter = Fitter(device=device, shape=shape, process_bytes=process)
            advice = advise(fitter, variant, workload, with_largest=options.max_batch)
    notices += type_notices([variant], machine)
    if estimates and gpu is None:
        most = max(estimates.values(), key=lambda one: one.needed_bytes)
        notices += memory_notices(variant, most, machine, executor.free_bytes())
    # Peaks of this machine's runs are those of its own device: CPU peaks say nothing about a GPU.
    measured = _measured(variant, workload, here, runs) if machine.device == here.device else {}
    profile, elsewhere = study.profile or None, gpu is not None
    document = describe_estimate(variant, workload, machine, tuple(estimates.values()), measured, elsewhere=elsewhere)
    fit = () if advice is None else describe_fit(advice, workload, profile)
    of_device = {"profile": profile, "fit": advice and _encode_fit(advice, estimates)} if device is not None else {}
    show_result(
        options,
        (*document, *fit, *warn_before_run(notices)),
        lambda: {
            "variant": variant.name,
            "id": variant.id,
            "model": workload.model,
            "device": machine.device,
            **{phase: _encode(estimates.get(phase), measured.get(phase)) for phase in MEMORY_PHASES},
            "notices": [notice.message for notice in notices],
            **of_device,
        },
    )
    return EXIT_PASS


def _measured(variant: Variant, workload: Workload, here: Machine, runs: Path) -> dict[str, int]:
    """The largest peak of earlier runs on this machine, by phase."""
    kind = "device_peak_allocated_{}_bytes" if here.device == "cuda" else "host_peak_{}_bytes"
    peaks = {phase: measured_peaks(workload, here, runs, kind.format(phase)) for phase in MEMORY_PHASES}
    return {phase: found[variant.id] for phase, found in peaks.items() if variant.id in found}


def _encode(estimate: MemoryEstimate | None, measured: int | None) -> dict[str, Any]:
    total = None if estimate is None else estimate.total_bytes
    return {
        "kinds": {} if estimate is None else estimate.kinds,
        "outside_allocator": {} if estimate is None else estimate.outside_allocator,
        "total_bytes": total,
        "measured_bytes": measured,
        "error": None if measured is None or total is None else total / measured - 1,
    }


def _encode_fit(advice: Advice, estimates: dict[MemoryPhase, MemoryEstimate]) -> dict[str, Any]:
    device, found = advice.device, codec.to_json(advice)
    about, kind = found.pop("device"), device.machine.device
    low, high = PEAK_RANGES[kind]
    return {
        **found,
        "device": {key: value for key, value in about.items() if key not in ("machine", "is_here")},
        "phases": {phase: Needs.of(estimate.needed_bytes, kind) for phase, estimate in estimates.items()},
        "spare_bytes": device.usable_bytes - advice.needs.high_bytes,
        "error": {"low": low - 1, "high": high - 1, "basis": describe_basis(kind)},
    }
