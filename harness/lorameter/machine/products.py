"""How fast this machine multiplies matrices in each dtype, from which a study with `dtype = "auto"` takes its dtype.

A CPU without instructions for bfloat16 or float16 multiplies them in a scalar loop of torch or after conversion to
float32, up to 40 times slower than float32. Flags of the CPU do not tell: torch, oneDNN and their settings also decide.
So products are timed, for less than a second, by `python -m lorameter.machine.products`: a process of its own, since
the parent does not import torch. The result is kept in the cache folder, by everything that it depends on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from lorameter.errors import UsageError
from lorameter.machine.provenance import Machine, library_version
from lorameter.machine.reading import parse_fields, read_file
from lorameter.models.catalogue import cache_dir
from lorameter.models.costs.peaks import stated_peak
from lorameter.records import codec, fileio
from lorameter.studies.study import Target
from lorameter.studies.variant import DType

SHAPE = (256, 512, 512)
"""Rows, inputs and outputs of the timed product: a small training step."""
REPEATS = 5
"""Timed products of each dtype, of which the fastest counts."""
TIMEOUT_S = 120.0
_SETTINGS = re.compile(r"ATEN_CPU_CAPABILITY|(ONEDNN|DNNL|MKL)_\w+")
"""Environment variables that change how torch multiplies."""
_BFLOAT16_SINCE = (8, 0)
"""Compute capability of Ampere, the first GPUs with products of bfloat16 (CUDA C++ Programming Guide)."""


def measure_products() -> dict[DType, float]:
    """GFLOP/s of a product of `SHAPE` in each dtype, on one thread of this CPU. The dtypes take turns."""
    import torch

    torch.set_num_threads(1)
    rows, inputs, outputs = SHAPE
    dtypes: tuple[DType, ...] = ("float32", "bfloat16", "float16")
    fastest_s = dict.fromkeys(dtypes, float("inf"))
    for repeat in range(REPEATS + 1):
        for dtype in dtypes:
            left = torch.ones(rows, inputs, dtype=getattr(torch, dtype))
            weight = torch.ones(outputs, inputs, dtype=getattr(torch, dtype))
            begin = time.thread_time()  # CPU time: other work on the machine does not count
            torch.nn.functional.linear(left, weight)
            if repeat:  # the first product makes its kernel
                fastest_s[dtype] = min(fastest_s[dtype], time.thread_time() - begin)
    return {dtype: 2 * rows * inputs * outputs / seconds / 1e9 for dtype, seconds in fastest_s.items()}


def add_products(machine: Machine) -> Machine:
    """The machine with the rates of its CPU's products; without them on a GPU, or if torch cannot be started."""
    if machine.device != "cpu":
        return machine
    path = cache_dir() / "products" / f"{_key()}.json"
    try:
        rates = codec.from_json(dict[str, float], fileio.read_json(path), path.name)
    except (OSError, codec.NotReadableError, UsageError):
        command = [sys.executable, "-m", __name__]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=True, timeout=TIMEOUT_S
            )
            rates = codec.from_json(dict[str, float], codec.parse(done.stdout), "products")
        except (OSError, subprocess.SubprocessError, codec.NotReadableError, UsageError):
            return machine
        with contextlib.suppress(OSError):  # without the file they are timed again
            path.parent.mkdir(parents=True, exist_ok=True)
            fileio.write_whole(path, codec.dumps(rates))
    return dataclasses.replace(machine, gflops=rates)


def _key() -> str:
    """A digest of the CPU, torch and the environment variables on which the rates depend."""
    cpu = read_file(Path("/proc/cpuinfo"), parse_fields, "").value or {}
    switches = {name: value for name, value in os.environ.items() if _SETTINGS.fullmatch(name)}
    content = [cpu.get("model name"), cpu.get("flags"), library_version("torch"), sys.executable, switches]
    return hashlib.sha256(codec.dumps(content).encode(errors="backslashreplace")).hexdigest()[:16]


def lacks_products(machine: Machine, dtype: DType) -> bool:
    """Whether the machine is known to multiply a dtype more slowly than float32."""
    if machine.device == "cuda":
        if dtype != "bfloat16":
            return False
        if stated_peak(machine.device_name, "float16") is not None:
            return stated_peak(machine.device_name, "bfloat16") is None
        return machine.capability is not None and machine.capability < _BFLOAT16_SINCE
    rates = machine.gflops
    return dtype in rates and rates[dtype] < rates["float32"]


def describe_products(machine: Machine, dtype: DType) -> str:
    """How many times faster or slower than float32 a CPU multiplies a dtype, with both rates."""
    wide, rate = machine.gflops["float32"], machine.gflops[dtype]
    times = f"{wide / rate:.2g} times slower" if rate < wide else f"{rate / wide:.2g} times faster"
    return f"{times} than float32 ({rate:.3g} against {wide:.3g} GFLOP/s)"


def make_target(machine: Machine) -> Target:
    """What a study takes from this machine: the kind for its profile, and the dtype for `dtype = "auto"`."""
    if machine.device == "cuda":
        lacking = lacks_products(machine, "bfloat16")
        why = f"{machine.device_name} has {'no ' if lacking else ''}products of bfloat16"
        return Target(kind=machine.kind, dtype="float32" if lacking else "bfloat16", why=why)
    if "bfloat16" not in machine.gflops:
        return Target(kind=machine.kind, dtype="float32", why="the products of this CPU could not be timed")
    lacking = lacks_products(machine, "bfloat16")
    why = f"this CPU multiplies bfloat16 {describe_products(machine, 'bfloat16')}"
    return Target(kind=machine.kind, dtype="float32" if lacking else "bfloat16", why=why)


if __name__ == "__main__":
    print(codec.dumps(measure_products()))
