"""Tests on a tiny model what PEFT methods support: `python -m lorameter.trial.building.method_probe`.

Reads variants as JSON from standard input and prints the facts about each (`lorameter.models.methods`).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorameter.errors import UsageError, shorten
from lorameter.models import catalogue
from lorameter.models.methods import MethodFacts
from lorameter.records import codec
from lorameter.studies.variant import BuiltVariant, FullVariant, Variant
from lorameter.trial.building import peft_methods
from lorameter.trial.building.base_model import load_base
from lorameter.trial.step import compute_loss

MODEL = f"{catalogue.RANDOM_PREFIX}tiny-llama"
_ROWS, _LENGTH = 2, 16


def probe(variant: Variant) -> MethodFacts:
    """Find out what a variant's method supports, by trying it on the tiny model."""
    try:
        if not isinstance(variant, FullVariant):
            peft_methods.make_config(variant, steps=1000)
        return _try_method(variant)
    except UsageError as error:
        return MethodFacts(refused=str(error).removeprefix(f"variant {variant.name!r}: "))
    except Exception as error:  # the exception's type depends on the method
        if not variant.format.is_quantised or not _can(lambda: _try_method(variant.unquantised())):
            return MethodFacts()
        message = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
        why = f"PEFT does not train {variant.method_name} on this quantised base ({shorten(message, 200)})"
        remedy = 'Set autocast, or quantization = "none".'
        return MethodFacts(refused=f"quantization = {variant.quantization!r}: {why}. {remedy}")


def _try_method(variant: Variant) -> MethodFacts:
    peft_methods.find_optimizer(variant)
    base = _base(variant)
    before = [(parameter, parameter.detach().clone()) for parameter in base.parameters()]
    inputs = torch.randint(0, 250, (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    model = peft_methods.attach(base, variant, batches=lambda: [batch], steps=1000)
    optimizer, update = peft_methods.make_optimizer(model, variant), peft_methods.find_update_hook(model)
    model.train()
    for step in (1, 2):
        compute_loss(model, batch | {"labels": inputs}, device="cpu", autocast=variant.autocast).backward()
        if not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters()):
            raise ValueError("all gradients are zero")
        optimizer.step()
        if update is not None:
            update(step)
        optimizer.zero_grad()
    if isinstance(variant, FullVariant):
        return MethodFacts(keeps_base=False, several=False, mixes=False, merges=False, reloads=False)
    present = {id(parameter) for parameter in model.parameters()}
    keeps = all(id(parameter) in present and torch.equal(parameter, initial) for parameter, initial in before)
    model.eval()
    answers = _logits(model, batch, variant)

    def reload() -> None:
        with tempfile.TemporaryDirectory() as folder:
            peft_methods.save(model, Path(folder))
            again = peft_methods.load(_base(variant), variant, Path(folder)).eval()
        torch.testing.assert_close(_logits(again, batch, variant), answers)

    def add() -> None:
        """Several trials can share one base only if switching adapters does not change which parameters train."""
        before = _trained(model)
        peft_methods.attach_second(model, variant, "second")
        peft_methods.activate(model, "second")
        peft_methods.activate(model, "default")
        if _trained(model) != before:
            raise ValueError("another part of the adapter trains after a switch")

    def mix() -> None:
        """Some models accept adapter names but use one adapter for all rows: they cannot mix adapters."""
        peft_methods.activate(model, "second")
        others = _logits(model, batch, variant)
        peft_methods.activate(model, "default")
        mixed = _logits(model, {**batch, "adapter_names": ["default", "second"]}, variant)
        if torch.equal(answers[1], others[1]):
            raise ValueError("both adapters give the same answers")
        torch.testing.assert_close(mixed, torch.stack([answers[0], others[1]]))

    reloads, several = _can(reload), _can(add)
    mixes = several and _can(mix)
    merges = _can(lambda: peft_methods.merge(model)) and peft_methods.is_merged(model)
    return MethodFacts(keeps_base=keeps, several=several, mixes=mixes, merges=merges, reloads=reloads)


def _base(variant: Variant) -> Any:
    return load_base(catalogue.resolve(MODEL), variant, device="cpu", seed=0)


def _trained(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _logits(model: Any, batch: dict[str, Any], variant: Variant) -> torch.Tensor:
    dtype = getattr(torch, variant.autocast or "bfloat16")
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=bool(variant.autocast)):
        logits: torch.Tensor = model(**batch, use_cache=False).logits
    return logits


def _can(action: Callable[[], object]) -> bool:
    """Whether PEFT carries out the action; it may refuse it with any exception."""
    try:
        action()
    except Exception:
        return False
    return True


if __name__ == "__main__":
    variants = codec.from_json(tuple[BuiltVariant, ...], json.load(sys.stdin), "variants")
    facts = [probe(one) for one in variants]
    print("\n\n" + json.dumps(codec.to_json(facts)))  # after anything that libraries have printed
