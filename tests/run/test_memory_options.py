"""Tests of the advice on memory: which study keys to change, ordered by how much each lowers the estimate."""

from __future__ import annotations

import dataclasses
import tomllib

import pytest

from lorameter.errors import UsageError
from lorameter.models import catalogue, shapes
from lorameter.models.costs.peaks import find_card
from lorameter.run.memory_fit import Fitter, advise, on_gpu, on_machine
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload

LORA = LoraVariant(name="lora", r=16)
WIDE = Workload(batch_size=6, sequence_length=1024)


@pytest.fixture
def advice(machine):
    """A function that advises on a variant of a model on a GPU or on this machine."""

    def make(variant, workload=WIDE, *, model="llama2-7b", card="24GiB", **asked):
        device = on_machine(machine, None) if card is None else on_gpu(machine, find_card(card))
        shape = shapes.shape(catalogue.resolve(f"random:{model}"))
        return advise(
            Fitter(device=device, shape=shape, process_bytes=None), variant, workload, **asked
        )  # fmt: skip

    return make


def turned(variant, workload, lines):
    """Return variant and workload with these study lines applied."""
    for key, value in tomllib.loads("\n".join(lines)).items():
        owner = workload if key == "batch_size" else variant
        changed = dataclasses.replace(owner, **{key: value})
        variant, workload = (variant, changed) if key == "batch_size" else (changed, workload)
    return variant, workload


CASES = [
    (LORA, "llama2-7b", "24GiB"), (LORA, "llama2-70b", "H100"), (LORA, "gemma-7b", "RTX 4090"),
    (LoraVariant(r=512, dtype="float32"), "mistral-7b", "24GiB"), (LoraVariant(r=64), "qwen2.5-7b", "T4"),
    (LoraVariant(quantization="nf4", prepare_for_kbit=True, autocast="bfloat16"), "llama2-13b", "24GiB"),
    (LoraVariant(quantization="int8", r=256), "llama2-13b", "A100 40GB"), (LORA, "llama2-7b", None),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "model", "card"), CASES)
def test_each_change_makes_a_variant_with_the_stated_estimate(advice, variant, model, card):
    """Each line is valid in a study, frees as much as the estimate falls, and the largest change is first."""
    found = advice(variant, model=model, card=card)
    assert found.options
    for option in found.options:
        alone = advice(*turned(variant, WIDE, [option.writes]), model=model, card=card)
        assert alone.needs == option.needs
        assert alone.status == option.status
        assert option.freed_bytes == found.needs.expected_bytes - option.needs.expected_bytes > 0
        assert (option.table == "workload") is option.writes.startswith("batch_size")
    freed = [option.freed_bytes for option in found.options]
    assert freed == sorted(freed, reverse=True)


@pytest.mark.parametrize(("variant", "model", "card"), CASES)
def test_the_fewest_make_it_fit_and_fewer_do_not(advice, variant, model, card):
    """Every change of a suggested set is needed, and no single change is enough where several are suggested."""
    found = advice(variant, model=model, card=card)
    assert found.status != "fits"
    if found.turn is None:
        everything = turned(variant, dataclasses.replace(WIDE, batch_size=1), [
            option.writes for option in found.options if option.table == "variant"
        ])  # fmt: skip
        assert advice(*everything, model=model, card=card).status != "fits"
        return
    assert advice(*turned(variant, WIDE, found.turn), model=model, card=card).status == "fits"
    for left in found.turn:
        fewer = [line for line in found.turn if line != left]
        assert advice(*turned(variant, WIDE, fewer), model=model, card=card).status != "fits"
    if len(found.turn) > 1:
        assert all(option.status != "fits" for option in found.options)


def test_several_ranks_are_refused(advice):
    """The memory of each rank of a sharded model is not estimated."""
    with pytest.raises(UsageError, match="ranks = 2"):
        advice(LORA, Workload(ranks=2, strategy="ddp", batch_size=4))
