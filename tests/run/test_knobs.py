"""What to change first: keys of a study that are not turned yet, by what the estimate falls for each."""

from __future__ import annotations

import dataclasses
import tomllib

import pytest

from harness.errors import UsageError
from harness.models import catalogue, shapes
from harness.models.costs.cards import find_card
from harness.run.fitting import Fitter, on_card, on_machine
from harness.run.knobs import advise
from harness.studies.variant import Variant
from harness.studies.workload import Workload

LORA = Variant(name="lora", r=16)
WIDE = Workload(batch_size=6, sequence_length=1024)
TURNED = Variant(quantization="nf4", gradient_checkpointing=True, optimizer="paged_adamw_8bit")


@pytest.fixture
def advice(machine):
    """A function that advises on a variant of a model on a card, or on this machine."""

    def make(variant, workload=WIDE, *, model="llama2-7b", card="24GiB", **asked):
        device = on_machine(machine, None) if card is None else on_card(machine, find_card(card))
        shape = shapes.shape(catalogue.resolve(f"random:{model}"))
        return advise(
            Fitter(device=device, shape=shape, process_bytes=None), variant, workload, **asked
        )  # fmt: skip

    return make


def turned(variant, workload, lines):
    """Both with these lines of a study."""
    for key, value in tomllib.loads("\n".join(lines)).items():
        owner = workload if key == "batch_size" else variant
        changed = dataclasses.replace(owner, **{key: value})
        variant, workload = (variant, changed) if key == "batch_size" else (changed, workload)
    return variant, workload


CASES = [
    (LORA, "llama2-7b", "24GiB"), (LORA, "llama2-70b", "H100"), (LORA, "gemma-7b", "RTX 4090"),
    (Variant(r=512, dtype="float32"), "mistral-7b", "24GiB"), (Variant(r=64), "qwen2.5-7b", "T4"),
    (Variant(quantization="nf4", prepare_for_kbit=True, autocast="bfloat16"), "llama2-13b", "24GiB"),
    (Variant(quantization="int8", r=256), "llama2-13b", "A100 40GB"), (LORA, "llama2-7b", None),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "model", "card"), CASES)
def test_each_is_a_variant_that_can_be_run_and_what_is_said_of_it_is_its_estimate(advice, variant, model, card):
    """Its line is one of a study; what it frees is how far the estimate falls; what frees most is first."""
    found = advice(variant, model=model, card=card)
    assert found.knobs
    for knob in found.knobs:
        alone = advice(*turned(variant, WIDE, [knob.writes]), model=model, card=card)
        assert alone.needs == knob.needs
        assert alone.standing == knob.standing
        assert knob.freed_bytes == found.needs.expected_bytes - knob.needs.expected_bytes > 0
        assert (knob.table == "workload") is knob.writes.startswith("batch_size")
    freed = [knob.freed_bytes for knob in found.knobs]
    assert freed == sorted(freed, reverse=True)


@pytest.mark.parametrize(("variant", "model", "card"), CASES)
def test_the_fewest_make_it_fit_and_fewer_do_not(advice, variant, model, card):
    """Of a set each is needed, and no single one would do where there are several."""
    found = advice(variant, model=model, card=card)
    assert found.standing != "fits"
    if found.turn is None:
        everything = turned(variant, dataclasses.replace(WIDE, batch_size=1), [
            knob.writes for knob in found.knobs if knob.table == "variant"
        ])  # fmt: skip
        assert advice(*everything, model=model, card=card).standing != "fits"
        return
    assert advice(*turned(variant, WIDE, found.turn), model=model, card=card).standing == "fits"
    for left in found.turn:
        fewer = [line for line in found.turn if line != left]
        assert advice(*turned(variant, WIDE, fewer), model=model, card=card).standing != "fits"
    if len(found.turn) > 1:
        assert all(knob.standing != "fits" for knob in found.knobs)


def test_checkpointing_is_what_frees_most_of_a_wide_batch(advice):
    """Llama-2-7B in bfloat16, six sequences of 1024 tokens, on 32 GiB: it fits with that alone."""
    found = advice(LORA, card="32GiB")
    assert found.standing == "does-not-fit"
    assert found.knobs[0].writes == "gradient_checkpointing = true"
    assert found.turn == ("gradient_checkpointing = true",)


def test_of_70_billion_the_batch_is_the_last_to_go_down(advice):
    """Two of which neither is enough, and the batch stays."""
    assert set(advice(LORA, model="llama2-70b", card="H100").turn) == {
        "gradient_checkpointing = true", 'quantization = "nf4"',
    }  # fmt: skip


def test_what_is_turned_already_is_no_knob(advice):
    """And a batch of one sequence cannot be smaller."""
    found = advice(TURNED, Workload(batch_size=1))
    assert (found.knobs, found.left_out, found.turn) == ((), (), ())
    assert [knob.writes for knob in advice(TURNED, Workload(batch_size=4, sequence_length=512)).knobs] == [
        "batch_size = 2"
    ]


def test_the_head_goes_to_16_bits_where_preparation_made_it_32(advice):
    """It casts the embeddings and the norms too."""
    prepared = dataclasses.replace(TURNED, prepare_for_kbit=True, autocast="bfloat16")
    (knob,) = (knob for knob in advice(prepared).knobs if knob.table == "variant")
    assert knob.writes == "prepare_for_kbit = false"
    assert knob.freed_bytes > 2 * 32000 * 4096 * 2


def test_what_the_variant_refuses_is_left_out_with_its_reason(advice):
    """An initialisation that rewrites the base allows no 4 bits."""
    found = advice(Variant(init_lora_weights="pissa"))
    (left_out,) = found.left_out
    assert left_out.writes == 'quantization = "nf4"'
    assert "rewrites the base" in left_out.why


def test_on_a_cpu_nothing_is_paged_and_widths_are_those_of_its_kernels(advice, machine):
    """What would be refused there is no advice."""
    assert {one.writes for one in advice(LORA, card=None).left_out} == {'optimizer = "paged_adamw_8bit"'}
    narrow = dataclasses.replace(shapes.shape(catalogue.resolve("random:smollm2-135m")), intermediate_size=1000)
    fitter = Fitter(device=on_machine(machine, None), shape=narrow, process_bytes=None)
    refused = {one.writes: one.why for one in advise(fitter, LORA, WIDE).left_out}
    assert "do not divide" in refused['quantization = "nf4"']


def test_where_all_are_not_enough_it_is_said(advice):
    """70 billion parameters in 4 bits are 35 GB."""
    found = advice(LORA, model="llama2-70b", card="24GiB")
    assert found.turn is None
    assert not advice(LORA, model="llama2-70b", card="24GiB").largest
    assert [one.value for one in advice(LORA, model="llama2-70b", with_largest=True).largest] == [None, None]


def test_several_ranks_are_refused(advice):
    """What each holds of a model that is shared out nobody estimates."""
    with pytest.raises(UsageError, match="ranks = 2"):
        advice(LORA, Workload(ranks=2, strategy="ddp", batch_size=4))
