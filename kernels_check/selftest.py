"""`python -m kernels_check selftest`: tests that twelve faults are found on this machine and that healthy runs pass.

Each fault has occurred in real training scripts and is reproduced in a small LoRA run with the real libraries
(`small_run`). A control holds if the check of its path is `fallback` or `absent` in the faulty run, and `active` in the
healthy run. The full set of controls is in the tests (`tests/kernels_check/negative_controls`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeAlias

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kernels_check.check import Check, Json
from kernels_check.small_run import SmallRun, build, compile_layers

SCHEMA = 1
EXIT_FAILED = 4
WIDTH = 160
"""Width of the table without a terminal."""
_VERDICTS = {True: "[green]holds[/]", False: "[red]FAILED[/]"}


Build: TypeAlias = Callable[[], SmallRun]


def changed(change: Callable[[SmallRun], object]) -> Build:
    """Build a run and change it."""
    return partial(build, change=change)


def pack(run: SmallRun, *, cache: bool) -> None:
    """Put two records in a row; with a cache, transformers builds no mask from their positions, and they attend to each
    other."""
    positions = torch.tensor([[*range(6), *range(10)], [*range(8), *range(8)]])
    run.inputs |= {"position_ids": positions, "use_cache": cache}


def train_norms(run: SmallRun) -> None:
    """Train the norms, so that a step has gradients even if the adapter gives none."""
    for name, parameter in run.model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.requires_grad_(True)


def disable_adapter(run: SmallRun) -> None:
    """Disable the adapter for a comparison, and leave it disabled."""
    run.model.base_model.disable_adapter_layers()
    train_norms(run)


def freeze_adapter(run: SmallRun) -> None:
    """Freeze the adapter, as loading it for inference does."""
    for parameter in run.model.parameters():
        parameter.requires_grad_(False)
    train_norms(run)


def train_a_norm(run: SmallRun) -> None:
    """Train a norm of the base with the adapter."""
    norm = next(value for name, value in run.model.named_parameters() if name.endswith("model.norm.weight"))
    run.optimizer.add_param_group({"params": [norm.requires_grad_(True)], "lr": 0.1})


def silence_dropout(run: SmallRun) -> None:
    """Leave the dropout layers in eval mode."""
    for module in run.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()


def checkpoint(run: SmallRun) -> None:
    """Switch gradient checkpointing on."""
    run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run.model.enable_input_require_grads()


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A fault, and the requirement that shows it."""

    name: str
    path: str
    required: Json
    fault: Build
    healthy: Build = build


CONTROLS: tuple[Control, ...] = (
    Control(
        name="attention falls back to eager", path="attention.backend", required="fused",
        fault=partial(build, attention="eager"),
    ),
    Control(
        name="packed records see each other", path="packing.isolated", required=True,
        fault=changed(partial(pack, cache=True)), healthy=changed(partial(pack, cache=False)),
    ),
    Control(
        name="a targeted layer is not quantised", path="base.bits", required=4,
        fault=partial(build, skipped=("lm_head", "layers.1.self_attn.v_proj")),
    ),
    Control(
        name="scales are not quantised", path="base.double_quant", required=True, fault=partial(build, double=False)
    ),
    Control(
        name="4-bit layers compute in float32", path="base.compute_dtype", required="bfloat16",
        fault=partial(build, compute="float32"),
    ),
    Control(name="the base is not frozen", path="base.frozen", required=True, fault=changed(train_a_norm)),
    Control(name="the adapter is disabled", path="peft.attached", required=True, fault=changed(disable_adapter)),
    Control(name="the adapter does not learn", path="peft.learning", required=True, fault=changed(freeze_adapter)),
    Control(name="dropout is inactive", path="peft.dropout", required=0.05, fault=changed(silence_dropout)),
    Control(
        name="another optimizer", path="optimizer.class", required="torch.optim.AdamW",
        fault=partial(build, optimizer=torch.optim.SGD),
    ),
    Control(
        name="nothing is checkpointed", path="checkpointing", required=True, fault=build, healthy=changed(checkpoint)
    ),
    Control(
        name="one layer of two is compiled", path="compile", required=True,
        fault=partial(build, quant=None, change=partial(compile_layers, count=1)),
        healthy=partial(build, quant=None, change=partial(compile_layers, count=2)),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Both runs of a control."""

    control: str
    path: str
    required: Json
    held: bool
    failure: str | None
    """Why the control does not hold."""
    fault: Check | None = None
    healthy: Check | None = None


def run(arguments: argparse.Namespace) -> int:
    """Run the controls, print the table or one JSON document, and return 0 if all hold."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    outcomes = []
    for control in CONTROLS:
        print(f"kernels_check selftest: {control.name}", file=sys.stderr)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries warn about the faults
            outcomes.append(run_control(control))
    held = [outcome.held for outcome in outcomes]
    if arguments.json:
        counts = {"held": held.count(True), "failed": held.count(False)}
        results = [asdict(outcome) for outcome in outcomes]
        document = {"schema": SCHEMA, "held": all(held), "counts": counts, "outcomes": results}
        print(json.dumps(document, indent=2, allow_nan=False))
    else:
        _show(outcomes)
    return 0 if all(held) else EXIT_FAILED


def run_control(control: Control) -> Outcome:
    """Build and verify both runs; a control whose run raises does not hold."""
    outcome = partial(Outcome, control=control.name, path=control.path, required=control.required)
    try:
        fault, healthy = (make().check(control.path, control.required) for make in (control.fault, control.healthy))
    except Exception as error:
        return outcome(held=False, failure=f"{type(error).__name__}: {error}")
    failures = [] if fault.status in ("fallback", "absent") else [f"the fault is {fault.status}: {fault.reason}"]
    failures += [] if healthy.met else [f"the healthy run is {healthy.status}: {healthy.reason}"]
    return outcome(held=not failures, failure="; ".join(failures) or None, fault=fault, healthy=healthy)


def _show(outcomes: Sequence[Outcome]) -> None:
    """Print the table, then each failure with its reason."""

    def describe(check: Check | None) -> str:
        return "–" if check is None else escape(f"{check.status} ({check.observed})")

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("fault", "path", "with the fault", "healthy", ""):
        table.add_column(name, overflow="fold", no_wrap=name == "fault")
    for one in outcomes:
        table.add_row(one.control, one.path, describe(one.fault), describe(one.healthy), _VERDICTS[one.held])
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(table)
    lines = [f"FAILED: {one.control}: {one.failure}" for one in outcomes if not one.held]
    for line in [*lines, f"{sum(one.held for one in outcomes)} of {len(outcomes)} hold"]:
        console.print(line, markup=False, highlight=False)
