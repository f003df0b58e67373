"""The optimizers of a drawn run, which fuse or do not, and let all of the adapter learn or do not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from drawn_truth import freer, true

STEP = 0.02
OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], str, bool | None]] = {
    "AdamW": (lambda given: torch.optim.AdamW(given, lr=STEP), "torch.optim.AdamW", False),
    "AdamW by fused": (lambda given: torch.optim.AdamW(given, lr=STEP, fused=True), "torch.optim.AdamW", True),
    "AdamW by foreach": (lambda given: torch.optim.AdamW(given, lr=STEP, foreach=True), "torch.optim.AdamW", False),
    "Adam by fused": (lambda given: torch.optim.Adam(given, lr=STEP, fused=True), "torch.optim.Adam", True),
    "SGD": (lambda given: torch.optim.SGD(given, lr=STEP, momentum=0.9), "torch.optim.SGD", False),
    "SGD by fused": (lambda given: torch.optim.SGD(given, lr=STEP, fused=True), "torch.optim.SGD", True),
    "Adafactor": (lambda given: torch.optim.Adafactor(given, lr=STEP), "torch.optim.Adafactor", False),
    "AdamW of bitsandbytes": (lambda given: bnb.optim.AdamW(given, lr=STEP), "bitsandbytes.optim.AdamW", None),
    "AdamW8bit": (lambda given: bnb.optim.AdamW8bit(given, lr=STEP), "bitsandbytes.optim.AdamW8bit", None),
}


def draw_optimizers(run: Any, draw: random.Random) -> None:
    """Give a run its optimizers, and let some of it not learn, or some of its base."""
    trained = run.average if run.company == "trained copy" else run.model
    trainable = [one for one in trained.parameters() if one.requires_grad]
    sick = draw.choice(["no rate", "reset", "left out", "base trains"]) if draw.random() < 0.2 else ""
    sick = "" if run.company == "trained copy" else sick
    if sick == "base trains":
        norms = [value for name, value in trained.named_parameters() if _is_norm(name)]
        trainable.append(draw.choice(norms).requires_grad_())
        run.truths["base.frozen"] = true(free={False})
    given = trainable
    if draw.random() < 0.2:
        given = [one for one in trained.parameters() if one.is_floating_point()]
        run.about.append("the optimizer is given everything")
    one = draw.choice(trainable)
    if sick == "left out":
        given = [value for value in given if value is not one]
    name = draw.choice(list(OPTIMIZERS))
    name = "AdamW" if sick == "base trains" or not given else name
    make, kind, fused = OPTIMIZERS[name]
    run.truths["optimizer.class"] = true(kind)
    run.truths["optimizer.fused"] = true(free={True, False}) if fused is None else true(fused)
    if sick == "left out" and not given:
        run.optimizers = []
        run.truths |= dict.fromkeys(("optimizer.class", "optimizer.fused"), true(free={False}))
    elif draw.random() < 0.1 and len(given) > 1:
        _mix_groups(run, draw, given, {id(value) for value in trainable})
        name = "mixed groups"
    else:
        run.optimizers = [make(given)]
    run.about.append(f"optimizer {name}")
    if sick in ("no rate", "reset", "left out"):
        run.truths["lora.learning"] = true(free={False})
    if sick == "no rate":
        for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
            group["lr"] = 0.0
    if sick == "reset":
        kept = one.detach().clone()
        run.after.append(lambda: one.data.copy_(kept))
    run.about += [f"sick: {sick}"] if sick else []
    if not sick and draw.random() < 0.1 and name in OPTIMIZERS and name != "Adafactor":
        run.schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizers[0], lambda done: min(1.0, done / 5))
        run.about.append("warms up from a rate of 0")
    coarse = any(value.dtype == torch.bfloat16 for value in trainable)
    if coarse and (run.schedule is not None or "Adam" not in name):
        run.truths["lora.learning"] = true(free={True, False})  # updates may round away
    if run.company == "trained copy":
        run.truths["optimizer.class"] = freer(run.truths["optimizer.class"])
        run.truths["optimizer.fused"] = true(free={True, False})


def _mix_groups(run: Any, draw: random.Random, given: list[Any], trained: set[int]) -> None:
    """One optimizer with a fused group and one that is not."""
    cut = draw.randint(1, len(given) - 1)
    groups = [{"params": given[:cut], "fused": True}, {"params": given[cut:], "fused": False}]
    run.optimizers = [torch.optim.AdamW(groups, lr=STEP)]
    run.truths["optimizer.class"] = true("torch.optim.AdamW")
    has = [any(id(one) in trained for one in group["params"]) for group in groups]
    run.truths["optimizer.fused"] = true(free={False}) if all(has) else true(has[0])
    if "adapters merged" in run.about:  # no gradient reaches those, whatever they ask for
        run.truths["optimizer.fused"] = true(free={True, False})


def _is_norm(name: str) -> bool:
    return name.endswith("weight") and any(part in name for part in ("norm", "ln_", "before", "between"))
