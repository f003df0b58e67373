"""Tests of the memory fit: a workload fits if the upper end of its range does, and the largest that fits is maximal."""

from __future__ import annotations

import dataclasses

import pytest

from lorameter.errors import UsageError
from lorameter.models import catalogue, shapes
from lorameter.models.costs.peaks import find_card
from lorameter.run.memory_fit import Fitter, on_gpu, on_machine
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import MOST_BATCH, Workload

GIB = 2**30
LORA = LoraVariant(name="lora", r=16)
QLORA = dataclasses.replace(LORA, name="qlora", quantization="nf4", gradient_checkpointing=True)
WIDE = Workload(batch_size=6, sequence_length=1024)


@pytest.fixture
def fitter(machine):
    """A function that makes a fitter of a model and a GPU, or of this machine with the given memory."""

    def make(model, card=None, memory_bytes=None):
        if card is None:
            device = on_machine(dataclasses.replace(machine, memory_bytes=memory_bytes or machine.memory_bytes), None)
        else:
            device = on_gpu(machine, find_card(card))
        shape = shapes.shape(catalogue.resolve(f"random:{model}"))
        return Fitter(device=device, shape=shape, process_bytes=None)

    return make


@pytest.mark.parametrize(("model", "card", "variant", "status"), [
    ("llama2-7b", "24GiB", LORA, "does-not-fit"), ("llama2-7b", "24GiB", QLORA, "fits"),
    ("llama2-7b", "RTX 4090", QLORA, "fits"), ("llama2-7b", "80GB", LORA, "may-not-fit"),
    ("llama2-7b", "H200", LORA, "fits"), ("llama2-70b", "H100", LORA, "does-not-fit"),
    ("llama2-70b", "H100", QLORA, "fits"), ("llama2-70b", "L40S", QLORA, "does-not-fit"),
    ("mistral-7b", "24GiB", LORA, "does-not-fit"), ("mistral-7b", "24GiB", QLORA, "fits"),
    ("qwen2.5-7b", "24GiB", LORA, "does-not-fit"), ("gemma-7b", "24GiB", LORA, "does-not-fit"),
])  # fmt: skip
def test_memory_fit_on_an_absent_gpu(fitter, model, card, variant, status):
    """For real shapes and six sequences of 1024 tokens, LoRA saves all activations and checkpointed NF4 nearly none."""
    one = fitter(model, card)
    assert one.device.machine.device == "cuda"
    assert one.status(one.needs(variant, WIDE)) == status


@pytest.mark.parametrize("key", ["batch_size", "sequence_length"])
@pytest.mark.parametrize(("model", "card", "variant"), [
    ("llama2-7b", "24GiB", QLORA), ("llama2-7b", "H200", LORA), ("mistral-7b", "24GiB", QLORA),
    ("llama2-70b", "H100", QLORA), ("gemma-7b", "L40S", QLORA), ("smollm2-135m", None, LORA),
    ("tiny-llama", None, LORA),
])  # fmt: skip
def test_the_largest_fits_and_one_more_does_not(fitter, model, card, variant, key):
    """The size is limited by memory, the model or the study."""
    one = fitter(model, card)
    workload = Workload(batch_size=2, sequence_length=512)
    found = (one.largest_batch if key == "batch_size" else one.largest_length)(variant, workload)

    def status(size):
        return one.status(one.needs(variant, dataclasses.replace(workload, **{key: size})))

    assert status(found.value) == "fits"
    if found.bound == "memory":
        assert status(found.value + 1) != "fits"
    else:
        assert found.value in (one.shape.context, MOST_BATCH)


def test_only_free_memory_of_this_machine_counts(machine):
    """The free memory counts, up to the total; assumptions about GPUs are left out."""
    device = on_machine(machine, 3 * GIB)
    assert (device.usable_bytes, device.total_bytes, device.assumed) == (3 * GIB, machine.memory_bytes, ())
    assert on_machine(machine, 2**60).usable_bytes == machine.memory_bytes
    card = dataclasses.replace(machine, device="cuda", device_name="GPU", device_memory_bytes=24 * GIB)
    assert on_machine(card, None).usable_bytes == 24 * GIB
    with pytest.raises(UsageError, match=r"not known.*--gpu"):
        on_machine(dataclasses.replace(card, device_memory_bytes=None), None)
