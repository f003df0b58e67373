"""Random training steps around a drawn model for `random_models.py`, with the true value of each checked path.

The choices are inputs, precision, modes, recomputation, the optimizer and compilation. Two runs with one seed are
equal.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import torch
from drawn_models import DTYPES, EAGER, PAD, VOCABULARY, Decoder, Truth, at_least, draw_model, true
from torch import Tensor
from torch.nn import functional

ROWS, LENGTH, RATE = 2, 12, 0.02
IN_COMPILED = (
    "attention.backend", "attention.dtype", "attention.mask", "optimizer.fused", "base.gemm_path", "base.compute_dtype",
    "peft.learning", "peft.dropout", "peft.attached", "checkpointing", "checkpointing.layers",
)  # fmt: skip
"""Paths that are judged by operators or by calls inside blocks, which compiled code hides."""
OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], str, bool | None]] = {
    "AdamW": (lambda given: torch.optim.AdamW(given, lr=RATE), "torch.optim.AdamW", False),
    "fused AdamW": (lambda given: torch.optim.AdamW(given, lr=RATE, fused=True), "torch.optim.AdamW", True),
    "foreach AdamW": (lambda given: torch.optim.AdamW(given, lr=RATE, foreach=True), "torch.optim.AdamW", False),
    "fused Adam": (lambda given: torch.optim.Adam(given, lr=RATE, fused=True), "torch.optim.Adam", True),
    "SGD": (lambda given: torch.optim.SGD(given, lr=RATE, momentum=0.9), "torch.optim.SGD", False),
    "fused SGD": (lambda given: torch.optim.SGD(given, lr=RATE, fused=True), "torch.optim.SGD", True),
    "Adafactor": (lambda given: torch.optim.Adafactor(given, lr=RATE), "torch.optim.Adafactor", False),
    "bitsandbytes' AdamW8bit": (
        lambda given: bnb.optim.AdamW8bit(given, lr=RATE),
        "bitsandbytes.optim.AdamW8bit",
        None,
    ),
}
"""Optimizer factory, class, and whether it is fused (None: not defined)."""


class DrawnRun:
    """A model with a training step, and the truth by path."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        self.drawn = draw_model(rng)
        self.model: Any = self.drawn.model
        self.truths: dict[str, Truth] = self.drawn.truths
        self.properties = self.drawn.properties
        self.batch: dict[str, Any] | None = None
        self.schedule: Any = None
        self.reset: Callable[[], object] = lambda: None
        """Called on the model after each update."""
        self.step_context: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.accumulate, self.training, self.evaluates = rng.choice([1, 1, 2, 3]), True, False
        for choose in (
            self._draw_inputs, self._draw_precision, self._draw_mode, self._draw_recomputation, self._draw_optimizer,
            self._draw_compilation,
        ):  # fmt: skip
            choose(rng)
        self.warm = rng.randint(0, 2)
        """Number of steps before the verified one."""

    def _draw_inputs(self, rng: random.Random) -> None:
        """Draw full rows, padded rows, or packed records; no token repeats, so that padding is recognised."""
        ids = 3 + torch.randperm(VOCABULARY - 3)[: ROWS * LENGTH].view(ROWS, LENGTH)
        self.inputs, self.labels = {"input_ids": ids}, ids.clone()
        plain = self.drawn.plain
        self.truths["padding.share"] = true(0.0)
        layout = rng.choice(["whole", "whole", "padded", "packed" if plain else "padded"])
        if layout == "padded":
            padding = rng.randint(2, LENGTH // 2)
            mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
            mask[0, LENGTH - padding :] = 0
            ids[0, LENGTH - padding :], self.labels[0, LENGTH - padding :] = PAD, -100
            masked = rng.random() < 0.8
            self.inputs["attention_mask"] = mask if masked else torch.ones_like(mask)
            self.truths["padding.share"] = true(padding / (ROWS * LENGTH))
            if not plain and masked:
                self.truths["attention.mask"] = true("explicit")
            self.properties.append("padded" if masked else "padded under a mask of ones")
        elif layout == "packed":
            bounds = [0, *sorted(rng.sample(range(2, LENGTH - 1), rng.randint(1, 3))), LENGTH]
            positions = torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(bounds)])
            self.inputs["position_ids"] = positions.expand(ROWS, -1).clone()
            self.batch = dict(self.inputs)
            decoder = next(module for module in self.model.modules() if isinstance(module, Decoder))
            masked = all(layer.attention.spec.mask not in ("none", "causal") for layer in self.drawn.layers)
            if rng.random() < 0.4:
                decoder.dropped_boundary = rng.randint(1, len(bounds) - 2)
            isolated = masked and decoder.dropped_boundary is None
            # one of several layers leaks between records if its own mixing is large enough
            self.truths["packing.isolated"] = true(isolated, hidden=not masked)
            self.properties.append("packed" if isolated else "packed, records leak")

    def _draw_precision(self, rng: random.Random) -> None:
        if rng.random() < 0.2:
            self.step_context = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
            eager = any(kind in EAGER for kind in self.drawn.kinds)
            self.truths["attention.dtype"] = true(free=DTYPES) if eager else true("bfloat16")
            quantised = self.drawn.has_bits(4, 8)
            self.truths["base.compute_dtype"] = true(free={*DTYPES, "float16"}) if quantised else true("bfloat16")
            self.properties.append("autocast")

    def _draw_mode(self, rng: random.Random) -> None:
        """Draw train or eval mode; one eval forward repacks 4-bit layers on some processors and drops the scales of
        8-bit layers."""
        draw = 1.0 if self.drawn.has_bits(4, 8) else rng.random()
        self.training, self.evaluates = draw >= 0.08, 0.08 <= draw < 0.2
        self.truths["mode"] = true("train" if self.training else "eval")
        if not self.training:
            dropout = self.truths["peft.dropout"]
            self.truths["peft.dropout"] = true(free={0.0, *(dropout.free if not dropout.holds else ())})
            self.properties.append("eval mode")
        elif self.evaluates:
            self.properties.append("evaluates in the step")

    def _draw_recomputation(self, rng: random.Random) -> None:
        """Draw the recomputed layers: all or the first of plain torch, or all by transformers, in training mode
        only."""
        layers, share = self.drawn.layers, 0.0
        if rng.random() < 0.35:
            reentrant = rng.random() < 0.4
            if self.drawn.plain:
                chosen = rng.choice([layers, layers[:1]])
                for layer in chosen:
                    layer.recomputes, layer.reentrant = True, reentrant
                share = len(chosen) / len(layers)
            else:
                self.model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                self.model.base_model.model.enable_input_require_grads()
                share = float(self.training)
            self.properties.append("recomputes")
        self.truths["checkpointing"] = true(share == 1.0) if share in (0.0, 1.0) else true()
        self.truths["checkpointing.layers"] = at_least(share)

    def _draw_optimizer(self, rng: random.Random) -> None:
        """Draw an optimizer of all or of all but one trainable parameters, with or without a fault."""
        trainable = [one for one in self.model.parameters() if one.requires_grad]
        one, fault = rng.choice(trainable), "none"
        if rng.random() < 0.2:
            fault = rng.choice(["no rate", "reset", "base trains", *(["left out"] if len(trainable) > 1 else [])])
            self.properties.append(f"fault: {fault}")
        if fault == "base trains":
            names = ("norm", "between", "ln_")
            norms = [value for name, value in self.model.named_parameters() if any(part in name for part in names)]
            trainable.append(rng.choice(norms).requires_grad_())
            self.truths["base.frozen"] = true(free={False})
        elif fault != "none":
            self.truths["peft.learning"] = true(free={False})
        name = "AdamW" if fault == "base trains" else rng.choice(list(OPTIMIZERS))
        make, kind, fused = OPTIMIZERS[name]
        self.optimizer = make([value for value in trainable if fault != "left out" or value is not one])
        self.truths["optimizer.fused"] = true(free={True, False}) if fused is None else true(fused)
        self.truths["optimizer.class"] = true(kind)
        self.properties.append(f"optimizer {name}")
        if fault == "no rate":
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0
        elif fault == "reset":
            initial = one.detach().clone()
            self.reset = lambda: one.data.copy_(initial)
        elif rng.random() < 0.1 and "Adam" in name and fault == "none":
            self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, step / 5))
            self.properties.append("warms up from a rate of 0")
        in_bfloat16 = any(value.dtype == torch.bfloat16 for value in trainable)
        if in_bfloat16 and (self.schedule is not None or "Adam" not in name):
            self.truths["peft.learning"] = true(free={True, False})  # updates may round away

    def _draw_compilation(self, rng: random.Random) -> None:
        """Draw in-place compilation of blocks; code with known graph breaks is not compiled."""
        self.truths["compile"], self.truths["compile.share"] = true(False), at_least(0.0)
        plain = self.drawn.plain and self.training and not self.evaluates and self.batch is None
        plain &= bool({"LoRA", "rank-stabilised LoRA"} & {*self.properties}) and not self.drawn.has_bits(4, 8)
        if not plain or "recomputes" in self.properties or rng.random() < 0.5:
            return
        torch._dynamo.reset()  # runs of one class share the compiler's limit of recompilations
        layers = self.drawn.layers
        chosen = layers if rng.random() < 0.5 else layers[1:]
        for layer in chosen:
            layer.compile(backend="eager", fullgraph=True)
        self.truths["compile"] = true(len(chosen) == len(layers)) if len(chosen) in (0, len(layers)) else true()
        self.truths["compile.share"] = at_least(len(chosen) / len(layers))
        if chosen:
            self.truths |= {path: replace(self.truths[path], hidden=True) for path in IN_COMPILED}
            self.properties.append("compiled" if len(chosen) == len(layers) else "compiled in part")

    def step(self) -> float:
        """Run forward and backward passes and an update, and return the loss."""
        if self.evaluates:
            self.model.eval()
            with torch.no_grad(), self.step_context():
                self.model(**self.inputs)
        self.model.train(self.training)
        self.optimizer.zero_grad()
        total = 0.0
        for _ in range(self.accumulate):
            with self.step_context():
                output = self.model(**self.inputs)
                logits = (output if torch.is_tensor(output) else output.logits).float()[:, :-1].flatten(0, 1)
                loss = functional.cross_entropy(logits, self.labels[:, 1:].flatten(), ignore_index=-100)
            (loss / self.accumulate).backward()
            total += float(loss.detach())
        self.optimizer.step()
        self.reset()
        if self.schedule is not None:
            self.schedule.step()
        return total

    def state(self) -> dict[str, Any]:
        """Return the state that `verify` restores bit for bit: parameters, gradients, optimizer, random state,
        modes."""
        named = {f"parameter {name}": one for name, one in self.model.named_parameters()}
        named |= {f"gradient {name}": one.grad for name, one in self.model.named_parameters()}
        for place, values in self.optimizer.state_dict()["state"].items():
            named |= {f"optimizer {place} {key}": value for key, value in values.items()}
        named |= {f"mode {name}": module.training for name, module in self.model.named_modules()}
        return {name: _bits(value) for name, value in named.items()} | {"random": torch.get_rng_state().tolist()}


def _bits(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _bits(one) for key, one in value.items()}
    if not isinstance(value, Tensor):
        return value
    return str(value.dtype), tuple(value.shape), value.detach().contiguous().flatten().view(torch.uint8).tolist()
