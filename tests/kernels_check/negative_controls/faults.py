"""Negative controls: their form, how one is verified, and faults that users cause in a run after building it.

A control has a faulty and a healthy run. It holds if the check finds the fault and accepts the healthy run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import peft
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels_check.check import Check, Json
from kernels_check.selftest import train_norms
from negative_controls.small_run import PAD_TOKEN, SmallRun, autocast, build, forget_compilations, only_math


def force_math(run: SmallRun) -> None:
    """Keep ``sdpa_kernel(MATH)`` around the step, as after a numerical comparison."""
    run.step_context = only_math


def use_autocast(run: SmallRun) -> None:
    """Run every step under autocast to bfloat16."""
    run.step_context = partial(autocast, "cpu")


def use_autocast_on_cuda(run: SmallRun) -> None:
    """Run every step under autocast to bfloat16 on CUDA."""
    run.step_context = partial(autocast, "cuda")


def only_flash_and_efficient(run: SmallRun) -> None:
    """Exclude cuDNN, which Hopper prefers and which accepts inputs that flash refuses."""
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    run.step_context = partial(sdpa_kernel, backends)


def tf32_on(run: SmallRun) -> None:
    """Let float32 products run on tensor cores, inside each step only."""
    run.step_context = partial(_precision, "tf32")


def tf32_off(run: SmallRun) -> None:
    """Keep float32 products in float32, the default."""
    run.step_context = partial(_precision, "ieee")


@contextmanager
def _precision(wanted: str) -> Iterator[None]:
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = wanted
    try:
        yield
    finally:
        matmul.fp32_precision = before


def pad(run: SmallRun, *, real: int) -> None:
    """Replace all but the first ``real`` tokens of every row after the first by padding, and pass the matching mask."""
    ids = run.inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[1:, real:] = 0
    run.inputs = {"input_ids": ids.masked_fill(mask.eq(0), PAD_TOKEN), "attention_mask": mask}


def pad_one_token(run: SmallRun) -> None:
    """Replace only the last token by padding, which is enough to need a mask."""
    pad(run, real=run.inputs["input_ids"].shape[1] - 1)


def eval_mode(run: SmallRun) -> None:
    """Forget ``model.train()`` after an evaluation."""
    run.model.eval()


def merge_adapter(run: SmallRun) -> None:
    """Merge the adapter for inference and continue training."""
    run.model.merge_adapter()
    train_norms(run)


def target_nothing(run: SmallRun) -> None:
    """Use the targets of another architecture, catch the library's error, and train without an adapter."""
    base = run.model.unload()
    try:
        run.model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query_key_value"]))
    except ValueError:
        run.model = base.train()
    train_norms(run)
    _new_optimizer(run)


def target_uncalled_module(run: SmallRun) -> None:
    """Adapt a module that no forward calls, such as a spare head."""
    base = run.model.unload()
    base.spare_head = torch.nn.Linear(128, 96)
    run.model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["spare_head"])).train()
    train_norms(run)
    _new_optimizer(run)


def _new_optimizer(run: SmallRun) -> None:
    run.optimizer = torch.optim.AdamW([value for value in run.model.parameters() if value.requires_grad], lr=1e-3)


Build: TypeAlias = Callable[[], SmallRun]
Change: TypeAlias = Callable[[SmallRun], object]


@dataclass(frozen=True)
class Recipe:
    """Builds a run and then changes it in order. Recipes with the same text give the same run."""

    make: Build
    changes: tuple[Change, ...]
    text: str
    """The identity of the recipe: its functions with their arguments."""

    def __call__(self) -> SmallRun:
        run = self.make()
        for change in self.changes:
            change(run)
        return run


@dataclass(frozen=True, kw_only=True)
class Control:
    """A faulty run and a healthy one."""

    name: str
    path: str
    """The path whose check must find the fault."""
    required: Json
    fault: Recipe
    healthy: Recipe
    words: tuple[str, ...]
    """Words that the reason must contain."""
    not_words: tuple[str, ...] = ()
    """Words that the reason must not contain."""
    caught_by: Literal["status", "reason", "unknown"] = "status"
    """``reason``: the required path did run, and the reason warns of a side effect or of CUDA's behaviour. ``unknown``:
    the evidence is contradictory, and the reason says where."""
    needs_cuda: str | None = None
    """Why the fault shows only on a GPU."""


def control(name: str, path: str, required: Json, fault: Build, healthy: Build, *words: str, **options: Any) -> Control:
    """Return a row of the catalogue."""
    return Control(
        name=name, path=path, required=required, fault=_recipe(fault), healthy=_recipe(healthy), words=words, **options
    )


def small(*changes: Change, **options: Any) -> Recipe:
    """Return a recipe that builds a small run with ``options`` and applies the ``changes`` in order."""
    return recipe_with_changes(partial(build, **options), *changes)


def recipe_with_changes(make: Build, *changes: Change) -> Recipe:
    """Return a recipe that makes a run and applies the ``changes`` in order."""
    return Recipe(make, changes, " then ".join(map(_text, (make, *changes))))


def _recipe(make: Build) -> Recipe:
    return make if isinstance(make, Recipe) else recipe_with_changes(make)


def _text(value: Any) -> str:
    if isinstance(value, partial):
        given = [*map(_text, value.args), *(f"{name}={_text(one)}" for name, one in value.keywords.items())]
        return f"{_text(value.func)}({', '.join(given)})"
    return repr(value)


HEALTHY = small()


@dataclass
class Verifier:
    """Verifies the runs of controls; controls with the same recipe share the verification."""

    controls: tuple[Control, ...]
    _checks: dict[tuple[str, str, Json], Check] = field(default_factory=dict)

    def failures(self, control: Control) -> list[str]:
        """Return everything that the control requires and that does not hold."""
        faulty, healthy = (self._check(recipe, control) for recipe in (control.fault, control.healthy))
        return find_failures(control, faulty, healthy)

    def _check(self, recipe: Recipe, control: Control) -> Check:
        key = recipe.text, control.path, control.required
        if key not in self._checks:
            required = {control.path: control.required}
            for other in self.controls:
                if recipe.text in (other.fault.text, other.healthy.text):
                    required.setdefault(other.path, other.required)
            try:
                checks = recipe().verify(required)
            finally:
                forget_compilations()
            self._checks |= {(recipe.text, one.path, one.required): one for one in checks}
        return self._checks[key]


def find_failures(control: Control, faulty: Check, healthy: Check) -> list[str]:
    """Return everything that a control requires and that these checks do not show."""
    failures = []
    caught = {"status": faulty.status in ("fallback", "absent"), "unknown": faulty.status == "unknown"}
    if not caught.get(control.caught_by, faulty.met):
        failures.append(f"the faulty run is {faulty.status}")
    missing = [word for word in control.words if word not in faulty.reason]
    failures += [f"its reason lacks {', '.join(map(repr, missing))}: {faulty.reason}"] if missing else []
    present = [word for word in control.not_words if word in faulty.reason]
    failures += [f"its reason has {', '.join(map(repr, present))}: {faulty.reason}"] if present else []
    if not healthy.met:
        failures.append(f"the healthy run is {healthy.status}: {healthy.reason}")
    if control.caught_by == "reason" and all(word in healthy.reason for word in control.words):
        failures.append(f"the healthy run is given the same warning: {healthy.reason}")
    return failures
