"""Tests kernels_check on random models and on transformers families: compares each check with the known truth.

    python benchmarks/selftest/random_models.py [--many N] [--first SEED] [--families NAME ... | all | none]

Models and steps are drawn at random, so that their truth is known (`drawn_models.py`, `drawn_steps.py`). Each is
verified against random requirements, some true and some false. Faults are:

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
from shared import print_origin, report_violations

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


def draw_requirements(truths: Mapping[str, Truth], rng: random.Random) -> dict[str, Any]:
    """Draw a requirement for each path with a known truth; more than half of them hold."""
    required = {}
    for path, candidates in CANDIDATES.items():
        if path in truths:
            holds = sorted(truths[path].holds, key=str)
            required[path] = rng.choice(holds) if holds and rng.random() < 0.6 else rng.choice([*candidates, *holds])
    return required


def find_faults(truths: Mapping[str, Truth], required: Mapping[str, Any], checks: Iterable[Any]) -> Iterator[str]:
    """Compare checks with the truth and yield the faults."""
    by_path = {check.path: check for check in checks}
    for path, value in required.items():
        truth, check = truths[path], by_path.get(path)
        if check is None:
            if value in truth.holds and not truth.hidden:
                yield f"false alarm: {path} {value!r} has no check"
        elif check.status == "active" and value not in truth.holds | truth.free:
            holds = ", ".join(map(repr, truth.holds)) or "nothing"
            yield f"wrong: {path} {value!r} is active, {holds} holds: {check.reason}"
        elif check.status != "active" and value in truth.holds and not (check.status == "unknown" and truth.hidden):
            yield f"false alarm: {path} {value!r} is {check.status}: {check.reason}"


def verify_run(run: DrawnRun, required: Mapping[str, Any]) -> Iterator[str]:
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
        yield from find_faults(run.truths, required, checks)
    if [id(one) for one in run.model.parameters() if one.requires_grad] != objects:
        yield "restored: other parameters than before"


def examine(seed: int) -> tuple[list[str], list[str]]:
    """Return the faults in the run of a seed, and the properties of the run."""
    faults, results, properties = list[str](), list[Any](), list[str]()
    for verified in (False, True):
        run = DrawnRun(seed)
        frozen = {name for name, value in run.model.named_parameters() if not value.requires_grad}
        properties = run.properties
        for _ in range(run.warm):
            run.step()
        if verified:
            faults += verify_run(run, draw_requirements(run.truths, random.Random(seed)))
        results.append((run.state(), [run.step() for _ in range(2)]))
    (state, losses), (verified_state, verified_losses) = results
    keys = sorted(key for key in {*state, *verified_state} if key.removeprefix("parameter ") not in frozen)
    faults += [f"restored: {key} differs" for key in keys if state.get(key) != verified_state.get(key)]
    if losses != verified_losses:
        faults.append(f"restored: next losses {losses} without, {verified_losses} with")
    return faults, properties


def main(arguments: list[str] | None = None) -> int:
    """Examine seeds and families, print the faults and the properties of the runs; return 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--many", type=int, default=300, metavar="N", help="number of random runs")
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
            faults, properties = examine(seed)
        except Exception:
            faults, properties = [f"raised: the run itself: {traceback.format_exc(limit=-3)}"], []
        features.update({*properties})
        violations += [f"seed {seed}: {fault} [{'; '.join(properties)}]" for fault in faults]
    print(f"{len(seeds)} random runs: " + ", ".join(f"{runs} {one}" for one, runs in sorted(features.items())))
    if options.families != ["none"]:
        violations += oracle.find_family_faults(options.families)
    return report_violations(violations)


if __name__ == "__main__":
    sys.exit(main())
