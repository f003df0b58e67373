"""What taking a prepared base takes beside making it of its source, in each form in which a variant may want it.

    python benchmarks/selftest/base_loads.py [--model smollm2-135m] [--replicates 8]

Each replicate is a process that has imported everything and then makes the base and takes it, in an order that is drawn
anew: from the model's own files as transformers and bitsandbytes do it, and from the folder in which it was prepared
once. Both have been read before, so that no disk is in either. The pages of a base that is mapped are read when a step
first touches them; so that they are not left out, taking it includes reading a byte of each, and so does making it.

Exit status 1 unless taking is faster in each form, by the whole interval.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.models import bases, catalogue
from harness.records.units import format_bytes, format_interval, format_ratio
from harness.run.executors.local import worker_environment
from harness.stats import compare_trials, estimate_trials
from harness.studies.request import BaseRequest
from harness.studies.variant import Variant
from harness.studies.workload import Workload
from harness.trial.building import prepared
from harness.trial.building.base_model import load_base

FORMS: Mapping[str, dict[str, Any]] = {
    "none": {}, "int8": {"quantization": "int8"}, "nf4": {"quantization": "nf4"}, "fp4": {"quantization": "fp4"},
}  # fmt: skip
WAYS = ("made", "taken")


def main() -> int:
    """Every form, a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--replicates", type=int, default=8)
    parser.add_argument("--one", metavar="FORM", help="one replicate of this form alone, as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(replicate(options.model, options.one)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        environment = worker_environment(1) | {bases.ENV_BASES: folder}
        results = [form_holds(options.model, form, options.replicates, environment) for form in FORMS]
    return 0 if all(results) else 1


def form_holds(model: str, form: str, replicates: int, environment: Mapping[str, str]) -> bool:
    """Measure one form; whether taking it is certainly faster."""
    command = [sys.executable, __file__, "--model", model, "--one", form]
    found = []
    for _ in range(1 + replicates):  # the first one prepares the base, and reads the files
        done = subprocess.run(command, env=dict(environment), stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout))
    times: dict[str, Sequence[Sequence[float]]] = {way: [[one[way]] for one in found[1:]] for way in WAYS}
    said = {way: estimate_trials(times[way]) for way in WAYS}
    ratio = compare_trials(times["made"], times["taken"], pairing="replicate")
    words = ", ".join(f"{way} in {format_interval(one.value, one.low, one.high, 's')}" for way, one in said.items())
    print(
        f"{model}, {form}: {format_bytes(found[0]['bytes'])}; {words}; taken over made "
        f"{format_ratio(ratio.ratio, ratio.low, ratio.high)} ({replicates} processes)",
        flush=True,
    )
    return ratio.high is not None and ratio.high < 1


def replicate(model: str, form: str) -> dict[str, float]:
    """Seconds in which a base is made and taken in this process, and the bytes of the prepared one."""
    torch.set_num_threads(1)
    variant, workload = Variant(**FORMS[form]), Workload(model=model)
    source = catalogue.resolve(model)
    summary = prepared.prepare(BaseRequest(workload=workload, variant=variant, device="cpu", threads=1, log_path=""))
    ways: dict[str, Callable[[], Any]] = {
        "made": lambda: load_base(source, variant, device="cpu", seed=workload.data_seed),
        "taken": lambda: prepared.take(Path(summary.path), variant, "cpu"),
    }
    found = {"bytes": float(summary.bytes)}
    for way in random.sample(WAYS, len(WAYS)):
        begin = time.perf_counter()
        touch(ways[way]())
        found[way] = time.perf_counter() - begin
    return found


def touch(model: torch.nn.Module) -> None:
    """Read a byte of each page of what a model stores."""
    for tensor in prepared._tensors(model).values():
        tensor.detach().reshape(-1).view(torch.uint8)[::4096].sum()


if __name__ == "__main__":
    sys.exit(main())
