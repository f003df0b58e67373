"""Does the check say flash exactly when the step would run on flash alone? Every family of transformers that is small.

    python benchmarks/selftest/oracle.py [--families gpt2 t5 vit]

In the manner of transformers' own dispatch tests: torch refuses a scaled dot product that its backends may not run, so
a step that succeeds under ``sdpa_kernel(FLASH_ATTENTION)`` alone runs on flash, and one that fails does not. Which
products of attention there are, through the scaled dot product or written out, is counted by a mode of torch's
functions, which knows nothing of the check. Of each family and instrument:

- flash is said exactly when every attention goes through the scaled dot product and the step succeeds on flash alone;
- math, exactly when all goes through it in a step to which only math is left;
- eager, exactly when every attention is written out;
- and whatever else is required of a healthy LoRA run is active: stored, stepped, in its mode; attached, exactly when
  PEFT adapts what it is asked to and a step calls it; frozen, exactly when two steps of a twin leave what is saved of
  the base as it is; learning, exactly when a step of the twin changes every factor.

Exit status 1, with the reasons, if anything is not so.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from families import Family, UnfitError, families, inputs_of, logits_of
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

import kernels_check

INSTRUMENTS = ("profile", "spy")
SOFTMAXES = (torch.softmax, torch.nn.functional.softmax, torch.Tensor.softmax)
HEALTHY: dict[str, Any] = {
    "base.bits": 32, "base.quant_type": "none", "base.frozen": True, "lora.attached": True, "lora.dtype": "float32",
    "lora.dropout": 0.05, "optimizer.class": "torch.optim.AdamW", "optimizer.fused": False, "checkpointing": False,
    "compile": False, "mode": "train",
}  # fmt: skip


class Attentions(TorchFunctionMode):
    """Counts attention as it is asked for: scaled dot products, those that flash refuses, and softmaxes over scores."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = self.refused = self.written = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and call."""
        multihead = (
            function is torch.nn.functional.multi_head_attention_forward
        )  # inside it, this mode is asked nothing
        if multihead and kwargs.get("need_weights", True):
            self.written += 1
        elif multihead or function is torch.nn.functional.scaled_dot_product_attention:
            self.scaled += 1
            try:
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    return function(*args, **(kwargs or {}))
            except RuntimeError:
                self.refused += 1
        elif function in SOFTMAXES:
            shape = (args[0] if args else kwargs["input"]).shape
            # scores have a row for each query and a column for each key; a router's have none for the heads
            square = len(shape) > 3 or (len(shape) == 3 and shape[-1] == shape[-2])
            self.written += square and min(shape[-2:]) > 1
        return function(*args, **(kwargs or {}))


class Run:
    """A LoRA run of one family: adapters on every linear layer that its forward calls."""

    def __init__(self, family: Family) -> None:
        model = family.build().train()
        self.inputs = inputs_of(model)
        names = _called(model, self.inputs)
        if not names:
            raise UnfitError("no linear layer is called")
        pattern = "|".join(name.replace(".", r"\.") for name in names)
        torch.manual_seed(2)
        self.model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=0.05, target_modules=f"({pattern})"))
        self.model.train()
        self.trained = [value for value in self.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-2, weight_decay=0.0)
        self.around: Any = nullcontext
        self.lost = self._lost(names)
        """Asked for and without an adapter, where PEFT made parameters of experts of their names and there are none."""

    def _lost(self, names: list[str]) -> list[str]:
        adapted = {id(one) for one in self.model.modules() if isinstance(one, BaseTunerLayer)}
        if any(isinstance(one, ParamWrapper) for one in self.model.modules()):
            return []
        return [name for name in names if id(self.model.base_model.model.get_submodule(name)) not in adapted]

    def base(self) -> dict[str, Tensor]:
        """A copy of what is saved of the model and does not train."""
        trained = {value.data_ptr() for value in self.trained}
        saved = self.model.state_dict().items()
        return {
            name: value.clone() for name, value in saved if torch.is_tensor(value) and value.data_ptr() not in trained
        }

    def step(self) -> None:
        """Forward, backward and an update."""
        with self.around():
            self.optimizer.zero_grad()
            logits_of(self.model(**self.inputs)).float().pow(2).mean().backward()
            self.optimizer.step()

    def calls_every_adapter(self) -> bool:
        """Take a step; whether it calls each layer that is adapted."""
        tuners = [one for one in self.model.modules() if isinstance(one, BaseTunerLayer)]
        called = set[int]()
        handles = [one.register_forward_hook(lambda module, *_: called.add(id(module))) for one in tuners]
        self.step()
        for handle in handles:
            handle.remove()
        return all(id(one) in called for one in tuners)


def _called(model: nn.Module, inputs: dict[str, Any]) -> list[str]:
    """Linear layers that the forward calls, its head left out."""
    called = dict[str, None]()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.setdefault(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [name for name in called if model.get_submodule(name) is not head]


@dataclass(kw_only=True)
class Result:
    """What one family showed."""

    family: str
    implementation: str
    scaled: int
    refused: int
    """Scaled dot products that flash alone cannot do."""
    written: int
    alone: bool
    """Whether a step succeeds on flash alone."""
    attached: bool
    """Whether every layer that PEFT adapted is called, and every name that it was asked to adapt is (``Run.lost``)."""
    learns: bool | None
    still: bool = True
    """Whether nothing of what is saved of the base moves, as the statistics of a batch norm do."""
    said: dict[str, Any] = field(default_factory=dict)
    active: int = 0
    required: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def truth(self) -> str | None:
        """The backend of all attention, or None where there is none or several."""
        if self.scaled and not self.written:
            return "flash" if self.alone else "math" if self.refused == self.scaled else None
        return "eager" if self.written and not self.scaled else None


def examine(family: Family) -> Result:
    """Build the family and compare what is said of it.

    Raises:
        UnfitError: it is left out.
    """
    try:
        twin = Run(family)
        before = twin.base()
        with Attentions() as seen:
            attached = twin.calls_every_adapter() and not twin.lost
    except UnfitError:
        raise
    except Exception as error:
        raise UnfitError(
            f"does not train: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        ) from error
    learns = _learns(twin)
    after = twin.base()
    still = before.keys() == after.keys() and all(_same(value, after[name]) for name, value in before.items())
    twin.around = lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    try:
        twin.step()
        alone = True
    except RuntimeError:
        alone = False
    result = Result(
        family=family.name, implementation=str(twin.model.config._attn_implementation), scaled=seen.scaled,
        refused=seen.refused, written=seen.written, alone=alone, attached=attached,
        still=still, learns=learns,
    )  # fmt: skip
    if alone != (seen.refused == 0):
        result.faults.append(
            f"{family.name}: flash refused {seen.refused} calls, and the step on flash alone says {alone}"
        )
    for forced in (False, True):
        truth = "math" if forced and result.scaled and not result.written else result.truth
        for instrument in INSTRUMENTS:
            _judge(result, family, instrument, truth, forced=forced)
    return result


def _same(one: Tensor, other: Tensor) -> bool:
    """To the bit, so that two that are no number are alike."""
    left, right = (value.contiguous().flatten().view(torch.uint8) for value in (one, other))
    return one.shape == other.shape and torch.equal(left, right)


def _learns(twin: Run) -> bool | None:
    """Whether every factor is changed by a step; None where some get gradients that are lost in rounding."""
    before = [value.detach().clone() for value in twin.trained]
    twin.step()
    if all(not torch.equal(old, new) for old, new in zip(before, twin.trained, strict=True)):
        return True
    return None if all(value.grad is not None and value.grad.any() for value in twin.trained) else False


def _judge(result: Result, family: Family, instrument: str, truth: str | None, *, forced: bool) -> None:
    run = Run(family)
    if forced:
        run.around = only_math
    required = HEALTHY | {"attention.backend": truth or "flash", "lora.learning": True}
    where = f"{family.name}, {instrument}{', math alone' if forced else ''}"
    try:
        checks = {one.path: one for one in kernels_check.verify(run.model, run.step, required, instrument=instrument)}
    except Exception as error:
        result.faults.append(f"{where}: raised {error!r}")
        return
    backend = checks.get("attention.backend")
    result.said[where.removeprefix(f"{family.name}, ")] = backend and backend.observed
    result.faults += [f"{where}: {fault}" for fault in _faults(result, required, checks, truth)]
    result.required += len(required)
    result.active += sum(checks[path].status == "active" for path in required if path in checks)


def only_math() -> AbstractContextManager[Any]:
    """The scaled dot product with math alone."""
    return sdpa_kernel(SDPBackend.MATH)


def _faults(result: Result, required: dict[str, Any], checks: dict[str, Any], truth: str | None) -> Iterator[str]:
    known = {"attention.backend": truth is not None, "lora.learning": result.learns, "lora.attached": result.attached}
    known |= {"base.frozen": result.still}
    if not result.attached:
        known |= {"lora.dropout": None, "lora.learning": result.learns and None}
    for path, value in required.items():
        check = checks.get(path)
        holds = known.get(path, True)
        if holds is None:
            continue
        if check is None:
            if holds:
                yield f"{path} {value!r} holds, and is left out"
        elif holds and check.status != "active":
            yield f"{path} {value!r} holds, and is {check.status}: {check.reason}"
        elif not holds and check.status == "active":
            yield f"{path} {value!r} does not hold, and is active: {check.reason}"


def main(arguments: list[str] | None = None) -> int:
    """Examine the families; 0 where all that is said is so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", metavar="NAME", help="model types; all where left out")
    named = parser.parse_args(arguments).families
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results, unfit = list[Result](), dict[str, str]()
    for family in families():
        if named is None or family.name in named:
            try:
                results.append(result := examine(family))
            except UnfitError as reason:
                unfit[family.name] = str(reason)
                continue
            for fault in result.faults:
                print(fault, flush=True)
    Console(width=120, highlight=False).print(table(results))
    print(f"left out: {len(unfit)} families")
    for name, reason in unfit.items():
        print(f"  {name}: {reason}")
    truths = Counter(result.truth or "none or several" for result in results)
    faulty = [result.family for result in results if result.faults]
    print(f"{len(results)} families, {', '.join(f'{count} {truth}' for truth, count in truths.most_common())}")
    print(f"at fault: {len(faulty)}{': ' if faulty else ''}{', '.join(faulty)}")
    return 1 if faulty or not results else 0


def table(results: list[Result]) -> Table:
    """One row a family."""
    drawn = Table(title="What is so, and what is said", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("family", "scaled", "refused", "written", "flash alone", "so", "said", "with math alone", "active"):
        drawn.add_column(heading, overflow="fold")
    for one in results:
        plain = {str(one.said.get(instrument)) for instrument in INSTRUMENTS}
        forced = {str(one.said.get(f"{instrument}, math alone")) for instrument in INSTRUMENTS}
        drawn.add_row(
            one.family, str(one.scaled), str(one.refused), str(one.written), "yes" if one.alone else "no",
            one.truth or "-", " / ".join(sorted(plain)), " / ".join(sorted(forced)), f"{one.active} of {one.required}",
        )  # fmt: skip
    return drawn


if __name__ == "__main__":
    sys.exit(main())
