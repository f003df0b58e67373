"""Is what a check says of a model true, whatever the model and its step are?

    python benchmarks/selftest/random_models.py --many 2000
    python benchmarks/selftest/random_models.py --seed 17

Models and steps are drawn at random (`drawn_model`, `drawn_run`), and what is true of each is known from how it was
drawn. Each is judged by both instruments against requirements that are drawn, too, true ones and others. Faults are:

- wrong: a requirement that does not hold, and is active;
- false alarm: one that holds, and is not active, or is left out though the instrument judges it;
- disagreement: two instruments that both judge and say different things;
- raised: the check raised;
- restored: afterwards the run is not to the bit what a twin of the same seed is that was never watched, or its next
  losses are others.

Exit status 1, with the seeds, if there is one.
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
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from drawn_run import DrawnRun
from drawn_truth import SHARES, Truth

import kernels_check
from kernels_check.controls import random_run

FEW = 200
INSTRUMENTS: tuple[Any, ...] = ("profile", "spy")
LEFT_TO_A_PROFILE = frozenset({"packing.isolated", "tf32"})
CANDIDATES: dict[str, tuple[Any, ...]] = {
    "attention.backend": ("flash", "math", "eager", "fused", "efficient"),
    "attention.dtype": ("float32", "bfloat16"),
    "attention.mask": ("none", "causal", "explicit"),
    "packing.isolated": (True, False),
    "padding.share": (0.0,),
    "base.bits": (4, 8, 16, 32),
    "base.bytes_in_4bit": SHARES,
    "base.quant_type": ("nf4", "fp4", "int8", "none"),
    "base.double_quant": (True, False),
    "base.compute_dtype": ("float32", "bfloat16"),
    "base.frozen": (True, False),
    "base.gemm_path": ("dequantize", "fused"),
    "lora.attached": (True, False),
    "lora.learning": (True, False),
    "lora.dtype": ("float32", "bfloat16"),
    "lora.dropout": (0.0, 0.05, 0.1),
    "optimizer.class": ("torch.optim.AdamW", "torch.optim.Adam", "torch.optim.SGD"),
    "optimizer.fused": (True, False),
    "checkpointing": (True, False),
    "checkpointing.layers": SHARES,
    "compile": (True, False),
    "compile.share": SHARES,
    "mode": ("train", "eval"),
}
"""What may be required of each path."""


def require(truths: Mapping[str, Truth], draw: random.Random) -> dict[str, Any]:
    """Draw a requirement for each path of which something is known: one that holds more often than not."""
    required = {}
    for path, candidates in CANDIDATES.items():
        truth = truths.get(path)
        if truth is None:
            continue
        holds = sorted(truth.holds, key=str)
        required[path] = draw.choice(holds) if holds and draw.random() < 0.6 else draw.choice([*candidates, *holds])
    return required


def faults_of(instrument: str, truths: Mapping[str, Truth], required: Mapping[str, Any], checks: Any) -> Iterator[str]:
    """Compare checks with what is true."""
    judged = {check.path: check for check in checks}
    for path, value in required.items():
        truth, check = truths[path], judged.get(path)
        if check is None:
            if value in truth.holds and not (instrument == "spy" and path in LEFT_TO_A_PROFILE) and not truth.hidden:
                yield f"{instrument}: false alarm: {path} {value!r} is left out"
        elif check.status == "active" and not {value} & (truth.holds | truth.free):
            yield f"{instrument}: wrong: {path} {value!r} is active, true is {_spell(truth)}: {check.reason}"
        elif check.status != "active" and value in truth.holds and not (check.status == "unknown" and truth.hidden):
            yield f"{instrument}: false alarm: {path} {value!r} is {check.status}: {check.reason}"


def disagreements(checks: Mapping[str, Any]) -> Iterator[str]:
    """Paths that both instruments judge, and judge differently."""
    one, other = ({check.path: check for check in checks[instrument]} for instrument in INSTRUMENTS)
    for path in one.keys() & other.keys():
        left, right = one[path], other[path]
        if "unknown" in (left.status, right.status):
            continue
        if (left.status, left.observed) != (right.status, right.observed):
            said = [f"{check.status}, {check.observed!r} ({check.reason})" for check in (left, right)]
            yield f"disagreement: {path}: profile {said[0]}; spy {said[1]}"


def _spell(truth: Truth) -> str:
    holds = ", ".join(map(repr, sorted(truth.holds, key=str))) or "nothing"
    return holds + ("".join(f" (perhaps {one!r})" for one in sorted(truth.free, key=str)))


def describe(run: DrawnRun) -> dict[str, Any]:
    """Everything that the next steps depend on; hooks without their handles, which count through a process."""
    told = random_run.RandomRun.describe(run)  # type: ignore[arg-type]
    for name, state in told.items():
        if isinstance(state, list) and name.startswith(("model.", "second.", "average.")):
            told[name] = [(key, [one[1] for one in value] if key.endswith("_hooks") else value) for key, value in state]
    return told


def examine(seed: int) -> tuple[list[str], list[str]]:
    """Faults of the run of one seed, and what the run is about."""
    faults, ends, about = list[str](), list[Any](), list[str]()
    for watched in (False, True):
        run = DrawnRun(seed)
        about = run.about
        for _ in range(run.warm):
            run.step()
        identities = random_run._identities(run)  # type: ignore[arg-type]
        if watched:
            required = require(run.truths, random.Random(seed))
            checks = {}
            for instrument in INSTRUMENTS:
                try:
                    checks[instrument] = kernels_check.verify(
                        run.model, run.step, required, batch=run.batch, instrument=instrument
                    )
                except Exception as error:
                    place = traceback.extract_tb(error.__traceback__)[-1]
                    faults.append(f"{instrument}: raised {error!r} in {place.filename}, line {place.lineno}")
                else:
                    faults += faults_of(instrument, run.truths, required, checks[instrument])
            if len(checks) == len(INSTRUMENTS):
                faults += disagreements(checks)
            if random_run._identities(run) != identities:  # type: ignore[arg-type]
                faults.append("restored: other objects than before")
        ends.append((describe(run), [run.step() for _ in range(2)]))
    (state, losses), (after, losses_after) = ends
    for key in sorted({*state, *after}):
        if state.get(key) != after.get(key):
            faults.append(f"restored: {key}: {random_run._difference(state.get(key), after.get(key))}")
    if losses != losses_after:
        faults.append(f"restored: next losses {losses} without, {losses_after} with")
    return faults, about


def main(arguments: list[str] | None = None) -> int:
    """Examine the seeds, and print the faults and what the runs were about."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--many", type=int, default=FEW, metavar="N", help="how many runs")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first seed")
    parser.add_argument("--seed", type=int, help="this one alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    seeds = range(options.first, options.first + options.many) if options.seed is None else [options.seed]
    kinds, paths, about, faulty = Counter[str](), Counter[str](), Counter[str](), 0
    for seed in seeds:
        try:
            faults, told = examine(seed)
        except Exception:
            faults, told = [f"raised: the run itself: {traceback.format_exc(limit=-3)}"], []
        about.update(dict.fromkeys(told, 1))
        faulty += bool(faults)
        for fault in faults:
            kinds[kind := next(kind for kind in KINDS if kind in fault)] += 1
            paths[f"{kind} {fault.partition(kind)[2].split()[0].rstrip(':')}"] += 1
            print(f"seed {seed}: {fault}\n    of: {'; '.join(told)}", flush=True)
    print(f"{len(seeds)} runs, seeds {seeds[0]} to {seeds[-1]}, each by {' and '.join(INSTRUMENTS)}: {faulty} at fault")
    for kind in KINDS:
        print(f"{kinds[kind]:6} {kind}")
    for path, count in paths.most_common():
        print(f"{count:6}   {path}")
    print("what the runs were about:")
    for feature, runs in sorted(about.items()):
        print(f"{runs:6} {feature}")
    return 1 if faulty else 0


KINDS = ("wrong:", "false alarm:", "disagreement:", "raised", "restored:")

if __name__ == "__main__":
    sys.exit(main())
