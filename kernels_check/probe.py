"""``python -m kernels_check probe``: tests which fast paths this machine runs, and why the others do not run.

Each path is tried in a training step of a small real model, and judged by the check of that path: a library may accept
a setting without an error but run another implementation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any, Literal
from unittest import mock

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels_check.check import Json
from kernels_check.small_run import SmallRun, build, compile_layers

SCHEMA = 1
EXIT_FAILED = 4
_LIBRARIES = ("torch", "transformers", "bitsandbytes", "triton", "flash-attn", "flash-attn-4", "liger-kernel")
_CHARACTERS_SHOWN = 240
"""Maximum characters of the evidence, or of the reason, in the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FastPath:
    """A fast path, a run that uses it, and the requirement that shows whether it ran."""

    name: str
    path: str
    required: Json
    make: Callable[..., SmallRun] = build
    """Makes the run for a ``device``."""
    needs_gpu: bool = False
    """Whether the path exists only on GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The result for one path."""

    name: str
    path: str
    required: Json
    status: Literal["ran", "claimed", "unavailable"]
    """``claimed``: silently accepted but not run, which misleads a user. ``unavailable``: refused."""
    reason: str
    """The evidence of the check, or why the path was refused, in the message of the library."""


def run(arguments: argparse.Namespace) -> int:
    """Probe, print the table or one JSON document, and return 4 if a path was claimed but did not run."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers would search the hub for attention kernels
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    # An interrupted compilation leaves half a library in its cache, which the next one would load.
    with tempfile.TemporaryDirectory(prefix="kernels-check-") as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        with mock.patch.dict(os.environ, caches):
            for path in PATHS:
                print(f"kernels_check probe: {path.name}", file=sys.stderr)
                found.append(try_path(path, device))
    machine = {
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: metadata.version(name) for name in _LIBRARIES if find_spec(name.replace("-", "_"))},
    }
    claimed = [one.name for one in found if one.status == "claimed"]
    if arguments.json:
        paths = [asdict(one) for one in found]
        print(json.dumps({"schema": SCHEMA, "machine": machine, "failed": claimed, "paths": paths}, indent=2))
    else:
        _show(found, machine, claimed)
    return EXIT_FAILED if claimed else 0


def try_path(path: FastPath, device: str) -> Attempt:
    """Try one path; an exception is the reason why it cannot run."""
    outcome = partial(Attempt, name=path.name, path=path.path, required=path.required)
    if path.needs_gpu and device == "cpu":
        return outcome(status="unavailable", reason="needs a GPU")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check = path.make(device=device).check(path.path, path.required)
    except Exception as error:
        return outcome(status="unavailable", reason=" ".join(f"{type(error).__name__}: {error}".split()))
    return outcome(status="ran" if check.met else "claimed", reason=check.reason)


_MARKS = {
    "ran": "[green]ran[/]",
    "claimed": "[red]CLAIMED, did not run[/]",
    "unavailable": "[yellow]cannot run[/]",
}


def _show(found: Sequence[Attempt], machine: Mapping[str, Any], claimed: Sequence[str]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("path", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("evidence, or why not", overflow="fold")
    for one in found:
        table.add_row(one.name, _MARKS[one.status], escape(one.reason[:_CHARACTERS_SHOWN]))
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    heading = f"{machine['device']} ({machine['name']}, {machine['cpu_capability']}); {versions}"
    console.print(heading, markup=False)
    console.print(table)
    ran = sum(one.status == "ran" for one in found)
    console.print(f"{ran} of {len(found)} paths ran" + (f"; claimed: {', '.join(claimed)}" if claimed else ""))


def _restrict_sdpa(run: SmallRun, *, backend: SDPBackend) -> None:
    """Let SDPA use only one backend."""
    run.step_context = partial(sdpa_kernel, backend)
    if backend is SDPBackend.EFFICIENT_ATTENTION:
        # The backend refuses grouped heads, which transformers repeats if there is a mask.
        mask = torch.ones_like(run.inputs["input_ids"])
        mask[0, -1] = 0
        run.inputs["attention_mask"] = mask


def _use_tf32(run: SmallRun) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def _apply_liger(run: SmallRun) -> None:
    import_module("liger_kernel.transformers").apply_liger_kernel_to_llama(
        rope=False, swiglu=False, fused_linear_cross_entropy=False, model=run.model.get_base_model()
    )


def _paged_adamw(parameters: Any, lr: float) -> Any:
    import bitsandbytes as bnb

    return bnb.optim.PagedAdamW32bit(parameters, lr=lr)


def _attention(name: str, required: str, **options: Any) -> FastPath:
    return FastPath(name=name, path="attention.backend", required=required, make=partial(build, quant=None, **options))


def _sdpa(name: str, required: str, backend: SDPBackend) -> FastPath:
    return _attention(name, required, change=partial(_restrict_sdpa, backend=backend))


PATHS: tuple[FastPath, ...] = (
    _sdpa("SDPA flash", "flash", SDPBackend.FLASH_ATTENTION),
    _sdpa("SDPA cuDNN", "cudnn", SDPBackend.CUDNN_ATTENTION),
    _sdpa("SDPA memory-efficient", "efficient", SDPBackend.EFFICIENT_ATTENTION),
    _sdpa("SDPA math", "math", SDPBackend.MATH),
    _attention("flash-attn 2 package", "flash_attention_2", attention="flash_attention_2"),
    _attention("flash-attn 3 package", "flash_attention_3", attention="flash_attention_3"),
    _attention("flash-attn 4 package", "flash_attention_4", attention="flash_attention_4"),
    _attention("flex attention", "flex", attention="flex_attention"),
    FastPath(name="NF4", path="base.quant_type", required="nf4", make=partial(build, double=False)),
    FastPath(name="FP4", path="base.quant_type", required="fp4", make=partial(build, quant="fp4", double=False)),
    FastPath(name="int8", path="base.bits", required=8, make=partial(build, quant="int8")),
    FastPath(name="double quantisation", path="base.double_quant", required=True),
    FastPath(name="fused 4-bit GEMM", path="base.gemm_path", required="fused", needs_gpu=True),
    FastPath(
        name="paged optimizer", path="optimizer.paged_share", required=0.5, needs_gpu=True,
        make=partial(build, rank=1024, optimizer=_paged_adamw),  # smaller states are never paged
    ),
    FastPath(
        name="fused optimizer", path="optimizer.fused", required=True,
        make=partial(build, optimizer=partial(torch.optim.AdamW, fused=True)),
    ),
    FastPath(
        name="tf32", path="tf32", required=True, needs_gpu=True,
        make=partial(build, quant=None, dtype="float32", change=_use_tf32),
    ),
    FastPath(
        name="compile", path="compile.share", required=0.5,
        make=partial(build, quant=None, change=partial(compile_layers, count=1, backend="inductor")),
    ),
    FastPath(
        name="Liger", path="fused.kernels", required="rms_norm", needs_gpu=True,
        make=partial(build, quant=None, change=_apply_liger),
    ),
)  # fmt: skip
