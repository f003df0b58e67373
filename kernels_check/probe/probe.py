"""``python -m kernels_check probe``: which fast paths this machine runs, how exact, how fast, and why not the others.

Each path is tried on a small real layer. What counts is what was executed, not what is importable or switched on:
``python -m bitsandbytes``, ``ds_report`` and the like show the latter only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

from kernels_check.probe.result import PathReport

if TYPE_CHECKING:
    from kernels_check.probe.attempt import Try

SCHEMA = 1
EXIT_FAILED = 4
_LIBRARIES = ("torch", "transformers", "bitsandbytes", "triton", "flash-attn", "flash-attn-4", "liger-kernel")


def run(arguments: argparse.Namespace) -> int:
    """Probe, print the table or one JSON document, and return 4 if a path was inexact or claimed to run and did not."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers would look for attention kernels on the hub
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from kernels_check.probe.result import show

    device = _device()
    reports = probe(all_paths(), device, announce=lambda name: print(f"kernels_check probe: {name}", file=sys.stderr))
    found = document(reports, machine(device))
    print(json.dumps(found, indent=2, allow_nan=False)) if arguments.json else show(reports, found["machine"])
    return EXIT_FAILED if any(report.failed for report in reports) else 0


def all_paths() -> Mapping[str, Try]:
    """Every path by name, in the order of the table."""
    from kernels_check.probe import attention as probe_attention
    from kernels_check.probe import base as probe_base
    from kernels_check.probe import training as probe_training

    return {**probe_attention.TRIES, **probe_base.TRIES, **probe_training.TRIES}


def probe(
    paths: Mapping[str, Try], device: str, *, announce: Callable[[str], None] = lambda _: None
) -> list[PathReport]:
    """Try every path, each by itself: what one raises is its own reason."""
    from kernels_check.probe.attempt import one_thread, report

    reports = []
    with one_thread():
        for name, attempt in paths.items():
            announce(name)
            reports.append(report(name, attempt, device))
    return reports


def document(reports: Sequence[PathReport], machine: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON document."""
    return {
        "schema": SCHEMA,
        "machine": dict(machine),
        "failed": [report.name for report in reports if report.failed],
        "paths": [_plain(report) for report in reports],
    }


def _plain(report: PathReport) -> dict[str, Any]:
    """One report as JSON; an error that is no number becomes null, for JSON has no NaN."""
    entry = asdict(report)
    for comparison, kept in zip(entry["exactness"], report.exactness, strict=True):
        comparison["holds"] = kept.holds
        comparison["error"] = kept.error if abs(kept.error) < float("inf") else None
    return entry


def machine(device: str) -> dict[str, Any]:
    """What the answers depend on."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device,
        "name": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "versions": dict(_versions(_LIBRARIES)),
    }


def _versions(libraries: Iterable[str]) -> Iterable[tuple[str, str | None]]:
    for library in libraries:
        try:
            yield library, metadata.version(library)
        except metadata.PackageNotFoundError:
            yield library, None


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
