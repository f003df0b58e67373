"""Training runs drawn at random of which it is known what is true.

Around a drawn model (`drawn_model`): the inputs, the way through an accumulated step, the optimizer, other models
beside it, recomputation, modes. Two runs of one seed are twins. What a run is may be described in full by
`kernels_check.controls.random_run`, whose attributes it has.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from drawn_inputs import draw_inputs
from drawn_layers import Attending, Decoder
from drawn_model import draw_model
from drawn_optimizer import draw_optimizers
from drawn_truth import Drawn, Truth, at_least, freer, true
from torch import Tensor, nn
from torch.nn import functional

from kernels_check.observation.compilations import forget

OPERATORS = (
    "attention.backend", "attention.dtype", "attention.mask", "optimizer.fused", "base.gemm_path", "base.compute_dtype",
    "lora.learning",
)  # fmt: skip
"""Paths that rest on operators or on when they ran: not all of another thread can be seen."""
IN_COMPILED = (*OPERATORS, "lora.dropout", "lora.attached", "checkpointing", "checkpointing.layers")
"""Paths that rest on calls inside of blocks, too: compiled code calls no hook, and the spy leaves it to a profile."""


class DrawnRun:
    """One run of a seed, with what is true of it by path.

    Args:
        seed: of everything about the run.
    """

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.drawn: Drawn = draw_model(draw)
        self.model: Any = self.drawn.model
        self.truths: dict[str, Truth] = self.drawn.truths
        self.about: list[str] = self.drawn.about
        self.second: Any = None
        self.average: Any = None
        self.schedule: Any = None
        self.inputs: dict[str, Tensor] = {}
        self.labels: Any = None
        self.batch: dict[str, Any] | None = None
        self.accumulate = draw.choice([1, 1, 2, 3])
        self.modes = [True] * self.accumulate
        self.recomputes, self.recomputes_half = ["none"] * self.accumulate, False
        self.zero_first, self.to_none = draw.random() < 0.5, draw.random() < 0.5
        self.clips, self.evaluates = draw.random() < 0.3, False
        self.by_closure, self.in_thread = draw.random() < 0.1, draw.random() < 0.03
        self.after: list[Callable[[], None]] = []
        """What is done to the run behind each update."""
        draw_inputs(self, draw)
        self._draw_precision(draw)
        self._draw_modes(draw)
        self._draw_recomputation(draw)
        self._draw_company(draw)
        draw_optimizers(self, draw)
        self.truths["compile"] = true(False)
        self.truths["compile.share"] = true(free={0.0}) if self.company == "trained copy" else at_least(0.0)
        self.warm = draw.randint(0, 2)
        self.about += [f"accumulates {self.accumulate}"] if self.accumulate > 1 else []
        if self.in_thread:
            self.about.append("in a thread")
            self._hide(OPERATORS)
        self._draw_compilation(draw)

    def _hide(self, paths: Iterable[str]) -> None:
        for path in paths:
            self.truths[path] = replace(self.truths[path], hidden=True)

    @property
    def _blocks(self) -> bool:
        return self.drawn.style == "plain"

    def _draw_precision(self, draw: random.Random) -> None:
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext
        if draw.random() < 0.2:
            self.around = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
            self.about.append("autocast")
            written = any("eager" in one or "elementwise" in one for one in self.about)
            both = {"float32", "bfloat16"}
            if self.truths["attention.dtype"].holds or self.truths["attention.dtype"].free:
                self.truths["attention.dtype"] = true(free=both) if written else true("bfloat16")
            quantised = any(stored.bits < 16 for stored in self.drawn.stored.values())
            self.truths["base.compute_dtype"] = true(free=both | {"float16"}) if quantised else true("bfloat16")

    def _draw_modes(self, draw: random.Random) -> None:
        self.model.train()
        self.truths["mode"] = true("train")
        # one forward in eval mode stores 4-bit layers anew on some processors, and loses the scales of 8-bit ones
        way = draw.random()
        dropped = self.truths["lora.dropout"]
        if way < 0.06 and not self.drawn.small:
            self.modes = [False] * self.accumulate
            self.truths["mode"] = true("eval")
            self.truths["lora.dropout"] = true(free={0.0, *(dropped.free if not dropped.holds else ())})
            self.about.append("eval mode")
        elif way < 0.12 and self.accumulate > 1 and not self.drawn.small:
            self.modes[draw.randrange(self.accumulate)] = False
            self.truths["mode"] = true()
            self.truths["lora.dropout"] = true(free={0.0, *(dropped.free if not dropped.holds else ())})
            self.about.append("mode changes inside the step")
        elif way < 0.2 and not self.drawn.small:
            self.evaluates = True
            self.about.append("evaluates inside the step")
            if any("Multihead" in one or "dropout" in one for one in self._kinds()):
                self._answers_otherwise()
        if not all(self.modes) and "attention math by dropout" in self.about:
            free = {"flash", "math", "fused"}
            self.truths["attention.backend"] = true(free=free if len(self._kinds()) == 1 else ())

    def _answers_otherwise(self) -> None:
        """An answer of nn.MultiheadAttention without gradients goes another way, which has no name."""
        for path in ("attention.backend", "attention.dtype", "attention.mask"):
            self.truths[path] = freer(self.truths[path])

    def _kinds(self) -> list[str]:
        return [one for one in self.about if one.startswith("attention ")]

    def _draw_recomputation(self, draw: random.Random) -> None:
        self.truths["checkpointing"], self.truths["checkpointing.layers"] = true(False), at_least(0.0)
        number = len(self.drawn.layers)
        if draw.random() < 0.65:
            return
        self.about.append("recomputes")
        if not self._blocks:
            self.drawn.adapted.base_model.model.gradient_checkpointing_enable({"use_reentrant": draw.random() < 0.5})
            self.drawn.adapted.base_model.model.enable_input_require_grads()
            # transformers recomputes in training mode alone
            always = len(set(self.modes)) == 1
            self.truths["checkpointing"] = true(self.modes[0]) if always else true()
            self.truths["checkpointing.layers"] = at_least(float(all(self.modes)))
            return
        way = draw.choice(["all", "some", "mlp", "half"])
        reentrant = draw.random() < 0.3
        if reentrant and not all(self.modes) and any("Multihead" in one for one in self._kinds()):
            self._answers_otherwise()  # a checkpoint of the reentrant kind switches gradients off
        for place, layer in enumerate(self.drawn.layers):
            layer.reentrant = reentrant
            layer.recomputes = {"some": "all" if place == 0 else "none", "half": "all"}.get(way, way)
        self.truths["checkpointing"], self.truths["checkpointing.layers"] = true(True), at_least(1.0)
        if way == "mlp":
            self.truths["checkpointing"] = true(free={True})
            self.truths["checkpointing.layers"] = at_least(0.0, 1.0)
        elif way == "some" and number > 1:
            self.truths["checkpointing"] = true()
            self.truths["checkpointing.layers"] = at_least(1 / number)
        elif way == "half" and self.accumulate > 1:
            self.recomputes = ["all" if place else "none" for place in range(self.accumulate)]
            self.recomputes_half = True
            self.truths["checkpointing"], self.truths["checkpointing.layers"] = true(), at_least(0.0)
        self.about.append(f"recomputes {way}")

    def _draw_compilation(self, draw: random.Random) -> None:
        """Compile blocks in place, each whole; nothing is compiled where code is known to break in pieces."""
        whole = self._blocks and not self.drawn.small and not {"DoRA", "packed", "recomputes"} & {*self.about}
        whole &= not (self.company or self.in_thread or self.evaluates or self.batch) and all(self.modes)
        if not whole or not {"LoRA", "rank-stabilised LoRA"} & {*self.about} or draw.random() > 0.6:
            return
        forget()  # runs of one class share the compiler's limit of recompilations
        layers = self.drawn.layers
        chosen = layers if draw.random() < 0.5 else [layer for layer in layers if draw.random() < 0.5]
        for layer in chosen:
            layer.compile(backend="eager", fullgraph=True)
        self.truths["compile"] = true(len(chosen) == len(layers)) if len(chosen) in (0, len(layers)) else true()
        self.truths["compile.share"] = at_least(len(chosen) / len(layers))
        if chosen:
            self._hide(IN_COMPILED)
            self.about.append("compiled" if len(chosen) == len(layers) else "compiled in part")

    def _draw_company(self, draw: random.Random) -> None:
        """Other models beside the one that is verified."""
        self.company = draw.choice(["teacher", "copy", "average", "trained copy"]) if draw.random() < 0.3 else ""
        if self.company == "trained copy" and draw.random() < 0.5:
            self.company = ""
        if self.company == "average" and self.drawn.small:
            self.company = ""
        if self.company != "teacher" and self.drawn.eight:  # cannot be copied
            self.company = ""
        if not self.company:
            return
        self.about.append(f"beside: {self.company}")
        if self.company == "teacher":
            kind = draw.choice(["flash", "math by context", "eager in 4 dimensions"])
            self.second = Decoder([Attending(kind, "additive")] * draw.randint(1, 4)).requires_grad_(False)
            self.second.train(draw.random() < 0.5)
        else:
            self.average = copy.deepcopy(self.model)
        if self.company == "average":
            self.average.requires_grad_(False)
        if self.company == "trained copy":
            self._nobody_calls()

    def _nobody_calls(self) -> None:
        """Little is true of a model that nobody calls: how it lies there."""
        lies = {path for path in self.truths if path.startswith("base.") and path != "base.gemm_path"} | {"lora.dtype"}
        for path, now in self.truths.items():
            self.truths[path] = freer(now) if path in lies else true()
        if self.batch is not None:
            self.truths["packing.isolated"] = true(free={True, False})
        self.truths["lora.attached"] = self.truths["lora.learning"] = true(free={False})
        self.truths["mode"] = true(free={"train", "eval"})
        self.truths["padding.share"] = true(free=self.truths["padding.share"].holds | {0.0})
        self.truths["checkpointing"], self.truths["checkpointing.layers"] = true(free={False}), true(free={0.0})
        self.truths["lora.dropout"] = true(free={0.0, 0.05, 0.1})

    def step(self) -> float:
        """Forward, backward and an update, in the way that was drawn."""
        if not self.in_thread:
            return self._step()
        losses: list[float] = []
        thread = threading.Thread(target=lambda: losses.append(self._step()))
        thread.start()
        thread.join()
        return losses[0]

    def _step(self) -> float:
        if self.evaluates:
            self.model.eval()
            with torch.no_grad(), self.around():
                self.model(**self.inputs)
            self.model.train()
        losses: list[float] = []
        if self.by_closure and len(self.optimizers) == 1:
            self.optimizers[0].step(lambda: losses.append(self._passes()) or losses[-1])  # type: ignore[func-returns-value]
        else:
            losses.append(self._passes())
            for optimizer in self.optimizers:
                optimizer.step()
        for change in self.after:
            change()
        if self.schedule is not None:
            self.schedule.step()
        if self.company == "average":
            with torch.no_grad():
                for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
                    mean.lerp_(value, 0.1)
        if not self.zero_first:
            self._zero()
        return losses[0]

    def _zero(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=self.to_none)

    def _passes(self) -> float:
        if self.zero_first:
            self._zero()
        model = self.average if self.company == "trained copy" else self.model
        total = 0.0
        for training, recomputes in zip(self.modes, self.recomputes, strict=True):
            model.train(training)
            if self.recomputes_half:
                for layer in self.drawn.layers:
                    layer.recomputes = recomputes
            with self.around():
                loss = self._loss(model) / self.accumulate
            loss.backward()
            total += float(loss.detach())
        if self.clips:
            nn.utils.clip_grad_norm_([one for one in model.parameters() if one.grad is not None], 1.0)
        return total

    def _loss(self, model: Any) -> Tensor:
        logits = _logits(model(**self.inputs))
        loss = functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), self.labels[:, 1:].flatten(), ignore_index=-100
        )
        other = self.second if self.company == "teacher" else self.average if self.company == "copy" else None
        if other is not None:
            with torch.no_grad():
                taught = _logits(other(**self.inputs)).float()
            loss = loss + 0.1 * functional.mse_loss(logits.float(), taught)
        return loss


def _logits(output: Any) -> Tensor:
    return output if torch.is_tensor(output) else output.logits
