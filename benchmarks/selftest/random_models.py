"""Tests of kernels_check on random models and on transformers families: each check is compared with the truth.

    python benchmarks/selftest/random_models.py [--many N] [--first SEED] [--families NAME ... | all | none]

Models and steps are drawn at random, and their truth is known from the draw (`drawn_models.py`, `drawn_steps.py`). Each
is verified against drawn requirements, true ones and others. Faults are:

- wrong: a requirement that does not hold is active;
- false alarm: a requirement that holds is not active, or has no check;
- raised: the check raised an exception;
- restored: the state of the run afterwards, or its next losses, differ from those of an unverified twin.

Families are verified against an independent oracle (`oracle.py`).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import logging
import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import oracle
import torch
from drawn_models import SHARES, Truth
from drawn_steps import DrawnRun
from shared import report_violations, print_origin

import kernels_check

CANDIDATES: dict[str, tuple[Any, ...]] = {
    "attention.backend": ("flash", "math", "eager", "fused", "efficient"),
    "attention.dtype": ("float32", "bfloat16"),
    "attention.mask": ("none", "causal", "explicit"),
    "packing.isolated": (True, False),
    "padding.share": (0.0,),
    "base.bits": (4, 8, 16, 32),
    "base.quant_type": ("nf4", "fp4", "int8", "none"),
    "base.double_quant": (True, False),
    "base.compute_dtype": ("float32", "bfloat16"),
    "base.frozen": (True, False),
    "base.gemm_path": ("dequantize", "fused"),
    "peft.attached": (True, False),
    "peft.learning": (True, False),
    "peft.dtype": ("float32", "bfloat16"),
    "peft.dropout": (0.0, 0.05, 0.1),
    "optimizer.class": ("torch.optim.AdamW", "torch.optim.Adam", "torch.optim.SGD"),
    "optimizer.fused": (True, False),
    "checkpointing": (True, False),
    "checkpointing.layers": SHARES,
    "compile": (True, False),
    "compile.share": SHARES,
    "mode": ("train", "eval"),
}
"""Candidate requirements of each path."""


def require(truths: Mapping[str, Truth], draw: random.Random) -> dict[str, Any]:
    """Return a requirement for each path with a known truth, more often one that holds."""
    required = {}
    for path, candidates in CANDIDATES.items():
        if path in truths:
            holds = sorted(truths[path].holds, key=str)
            required[path] = draw.choice(holds) if holds and draw.random() < 0.6 else draw.choice([*candidates, *holds])
    return required


def faults_of(truths: Mapping[str, Truth], required: Mapping[str, Any], checks: Iterable[Any]) -> Iterator[str]:
    """Compare checks with the truth and yield the faults."""
    judged = {check.path: check for check in checks}
    for path, value in required.items():
        truth, check = truths[path], judged.get(path)
        if check is None:
            if value in truth.holds and not truth.hidden:
                yield f"false alarm: {path} {value!r} has no check"
        elif check.status == "active" and value not in truth.holds | truth.free:
            holds = ", ".join(map(repr, truth.holds)) or "nothing"
            yield f"wrong: {path} {value!r} is active, {holds} holds: {check.reason}"
        elif check.status != "active" and value in truth.holds and not (check.status == "unknown" and truth.hidden):
            yield f"false alarm: {path} {value!r} is {check.status}: {check.reason}"


def verify(run: DrawnRun, required: Mapping[str, Any]) -> Iterator[str]:
    """Verify a run and yield the faults of the checks."""
    objects = [id(one) for one in run.model.parameters() if one.requires_grad]  # DoRA replaces 4-bit parameters
    try:
        checks = kernels_check.verify(run.model, run.step, required)
        if run.batch is not None and required.get("packing.isolated") is True:
            probed = kernels_check.probe_isolation(run.model, run.batch)
            checks = [probed if one.path == probed.path and one.status != "fallback" else one for one in checks]
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        yield f"raised: {error!r} in {place.filename}, line {place.lineno}"
    else:
        yield from faults_of(run.truths, required, checks)
    if [id(one) for one in run.model.parameters() if one.requires_grad] != objects:
        yield "restored: other parameters than before"


def examine(seed: int) -> tuple[list[str], list[str]]:
    """Return the faults of the run of a seed, and the properties of the run."""
    faults, ends, about = list[str](), list[Any](), list[str]()
    for verified in (False, True):
        run = DrawnRun(seed)
        frozen = {name for name, value in run.model.named_parameters() if not value.requires_grad}
        about = run.about
        for _ in range(run.warm):
            run.step()
        if verified:
            faults += verify(run, require(run.truths, random.Random(seed)))
        ends.append((run.state(), [run.step() for _ in range(2)]))
    (state, losses), (after, losses_after) = ends
    keys = sorted(key for key in {*state, *after} if key.removeprefix("parameter ") not in frozen)
    faults += [f"restored: {key} differs" for key in keys if state.get(key) != after.get(key)]
    if losses != losses_after:
        faults.append(f"restored: next losses {losses} without, {losses_after} with")
    return faults, about


def main(arguments: list[str] | None = None) -> int:
    """Examine seeds and families, print the faults and the properties of the runs; return 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--many", type=int, default=300, metavar="N", help="how many random runs")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first seed")
    parser.add_argument("--families", nargs="+", default=["all"], metavar="NAME", help="model types, all, or none")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print_origin()
    seeds = range(options.first, options.first + options.many)
    features, violations = Counter[str](), list[str]()
    for seed in seeds:
        try:
            faults, about = examine(seed)
        except Exception:
            faults, about = [f"raised: the run itself: {traceback.format_exc(limit=-3)}"], []
        features.update({*about})
        violations += [f"seed {seed}: {fault} [{'; '.join(about)}]" for fault in faults]
    print(f"{len(seeds)} random runs: " + ", ".join(f"{runs} {one}" for one, runs in sorted(features.items())))
    if options.families != ["none"]:
        violations += oracle.faults_of_families(options.families)
    return report_violations(violations)


if __name__ == "__main__":
    sys.exit(main())
