"""Tries what methods of PEFT can do, each on a tiny model: `python -m lorameter.trial.building.method_probe`.

Reads variants as JSON from the standard input and prints what was found of each (`lorameter.models.methods`).
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorameter.errors import LorameterError, UsageError, impossible, shorten
from lorameter.models import catalogue
from lorameter.models.methods import MethodFacts
from lorameter.records import codec
from lorameter.studies.variant import FullVariant, Variant
from lorameter.trial.building import peft_methods
from lorameter.trial.building.base_model import load_base
from lorameter.trial.step import loss_of

MODEL = f"{catalogue.RANDOM_PREFIX}tiny-llama"
_ROWS, _LENGTH = 2, 16


def probe(variant: Variant) -> MethodFacts:
    """What a variant's method can do on the tiny model."""
    try:
        if not isinstance(variant, FullVariant):
            peft_methods.config_of(variant, steps=1000)
        peft_methods.find_optimizer(variant)
    except UsageError as error:
        return MethodFacts(refused=str(error))
    try:
        return _tried(variant)
    except UsageError as error:
        return MethodFacts(refused=str(error))
    except Exception as error:  # which exception depends on the method
        if variant.quantization != "none" and _trains(dataclasses.replace(variant, quantization="none")):
            said = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
            why = f"PEFT does not train {variant.method_name} on this quantised base ({shorten(said, 200)})"
            where = f"variant {variant.name!r}"
            remedy = 'Set autocast, or quantization = "none".'
            refused = impossible(where, "quantization", variant.quantization, why, remedy)
            return MethodFacts(refused=str(refused))
        return MethodFacts()


def _trains(variant: Variant) -> bool:
    try:
        _tried(dataclasses.replace(variant, prepare_for_kbit=False))
    except Exception:  # as above
        return False
    return True


def _tried(variant: Variant) -> MethodFacts:
    base = _base(variant)
    before = [(parameter, parameter.detach().clone()) for parameter in base.parameters()]
    inputs = torch.randint(0, 250, (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    model = peft_methods.attach(base, variant, batches=[batch], steps=1000)
    optimizer, update = peft_methods.make_optimizer(model, variant), peft_methods.updater(model)
    model.train()
    cast_to = getattr(torch, variant.autocast) if variant.autocast else None
    for step in (1, 2):
        loss_of(model, batch | {"labels": inputs}, device="cpu", autocast=cast_to).backward()
        optimizer.step()
        if update is not None:
            update(step)
        optimizer.zero_grad()
    if isinstance(variant, FullVariant):
        return MethodFacts(keeps_base=False, several=False, mixes=False, merges=False, reloads=False)
    there = {id(parameter) for parameter in model.parameters()}
    keeps = all(id(one) in there and torch.equal(one, was) for one, was in before)
    model.eval()
    answers = _logits(model, batch, cast_to)
    with tempfile.TemporaryDirectory() as folder:
        reloads = _can(lambda: _reload(model, variant, Path(folder), batch, answers, cast_to))
    several = _can(lambda: _add(model, variant))
    mixes = several and _can(lambda: _mix(model, batch, answers, cast_to))
    merges = _can(lambda: peft_methods.merge(model)) and peft_methods.is_merged(model)
    return MethodFacts(keeps_base=keeps, several=several, mixes=mixes, merges=merges, reloads=reloads)


def _base(variant: Variant) -> Any:
    return load_base(catalogue.resolve(MODEL), variant, device="cpu", seed=0)


def _logits(model: Any, batch: dict[str, Any], cast_to: torch.dtype | None) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=cast_to or torch.bfloat16, enabled=cast_to is not None):
        logits: torch.Tensor = model(**batch, use_cache=False).logits
    return logits


def _reload(
    model: Any,
    variant: Variant,
    folder: Path,
    batch: dict[str, Any],
    answers: torch.Tensor,
    cast_to: torch.dtype | None,
) -> None:
    peft_methods.save(model, folder)
    again = _logits(peft_methods.load(_base(variant), variant, folder).eval(), batch, cast_to)
    torch.testing.assert_close(again, answers)


def _add(model: Any, variant: Variant) -> None:
    peft_methods.attach_beside(model, variant, "second")
    peft_methods.activate(model, "second")
    peft_methods.activate(model, "default")


def _mix(model: Any, batch: dict[str, Any], answers: torch.Tensor, cast_to: torch.dtype | None) -> None:
    """Ask one row of each adapter. A model may take the names and answer all rows by one: then there is no mixing."""
    peft_methods.activate(model, "second")
    others = _logits(model, batch, cast_to)
    peft_methods.activate(model, "default")
    mixed = _logits(model, {**batch, "adapter_names": ["default", "second"]}, cast_to)
    if torch.equal(answers[1], others[1]):
        raise ValueError("both adapters answer alike")
    torch.testing.assert_close(mixed, torch.stack([answers[0], others[1]]))


def _can(action: Callable[[], object]) -> bool:
    """Whether something that PEFT may refuse, with whichever exception, goes through."""
    try:
        action()
    except Exception:
        return False
    return True


if __name__ == "__main__":
    try:
        variants = codec.from_json(tuple[Variant, ...], json.load(sys.stdin), "variants")
    except LorameterError as error:
        sys.exit(str(error))
    facts = [probe(one) for one in variants]
    print("\n\n" + json.dumps(codec.to_json(facts)))  # after whatever libraries have printed
