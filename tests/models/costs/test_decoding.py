"""What a decoded token must read: by hand, and against the bytes of tensors that are really there."""

from __future__ import annotations

import pytest

from lorameter.models import catalogue, shapes
from lorameter.models.costs.decoding import DecodeCost, decode_cost, mean_context
from lorameter.models.shapes import ModelShape
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload

SMALL = ModelShape(
    hidden_size=64, intermediate_size=128, layers=2, heads=2, kv_heads=1, head_dim=32, vocab_size=100, context=64,
    tied=False, architecture="llama",
)  # fmt: skip


def test_a_two_layer_model_by_hand():
    """NF4 without double quantisation: half a byte a weight, a float32 for each 64, a table of 16 values a layer."""
    weights = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
    variant = Variant(r=4, target_modules=("q_proj",), quantization="nf4", double_quant=False)
    adapter = 2 * 4 * (64 + 64)
    assert decode_cost(SMALL, variant, context=10) == DecodeCost(
        flops=2 * (2 * weights + 100 * 64) + 2 * adapter + 2 * (2 * 2 * 10 * 2 * 32),  # scores and values, two heads
        linear_bytes=2 * (weights // 2 + 4 * weights // 64 + 7 * 64),
        adapter_bytes=4 * adapter,
        head_bytes=2 * 100 * 64,
        other_bytes=2 * (5 * 64 + 64),  # two norms a block and one more; a row of the embedding
        cache_bytes=2 * (2 * 2 * 10 * 32),  # keys and values, one head of them
    )


def test_a_merged_adapter_is_not_read():
    """Merged, the base keeps its size and the adapter is gone from bytes and FLOPs."""
    variant = Variant(r=4, quantization="nf4")
    beside, merged = (decode_cost(SMALL, variant, context=10, merged=done) for done in (False, True))
    assert merged.adapter_bytes == 0
    assert merged.bytes == beside.bytes - beside.adapter_bytes
    assert merged.flops < beside.flops


def test_prompts_of_one_request_share_the_weights():
    """Each has its own FLOPs, its row of the embedding, and its keys and values; what is read beside is read once."""
    variant = Variant(r=4, quantization="nf4")
    one, eight = (decode_cost(SMALL, variant, context=10, prompts=count) for count in (1, 8))
    assert (eight.flops, eight.cache_bytes) == (8 * one.flops, 8 * one.cache_bytes)
    assert eight.other_bytes == one.other_bytes + 7 * 2 * 64
    assert eight.bytes == one.bytes + 7 * (one.cache_bytes + 2 * 64)


def test_context_of_the_tokens_after_the_first():
    """Prompt of 10 and 5 new tokens: passes after the first attend to 11, 12, 13 and 14 tokens."""
    assert mean_context(Workload(prompt_tokens=10, new_tokens=5)) == (11 + 12 + 13 + 14) // 4


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "nf4"},
        {"quantization": "nf4", "double_quant": False},
        {"quantization": "nf4", "prepare_for_kbit": True},
        {"quantization": "int8"},
        {"use_dora": True},
        {"adapter_dtype": "bfloat16"},
    ],
    ids=lambda options: " ".join(options),
)
def test_bytes_are_those_of_the_stored_tensors(options):
    """Weights, quantisation state, adapter and cache of a built model, the embedding as one row: equal to the byte."""
    import torch

    from lorameter.trial.building.base_model import load_base
    from lorameter.trial.building.lora import attach
    from lorameter.trial.building.packing import evaluating
    from lorameter.trial.memory import resident_bytes

    variant, source = Variant(r=4, **options), catalogue.resolve("tiny-llama")
    model = attach(load_base(source, variant, device="cpu", seed=0), variant)
    stored = resident_bytes(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
    embedding = model.get_input_embeddings().weight
    unread = embedding[1:].nbytes + sum(buffer.nbytes for buffer in model.buffers())  # frequencies, a few numbers
    with evaluating(model):
        cache = model(input_ids=torch.ones(1, 21, dtype=torch.long), use_cache=True).past_key_values
    cost = decode_cost(shapes.shape(source), variant, context=21)
    read = stored["base_weight_bytes"] + stored["quantization_state_bytes"] + stored["adapter_bytes"] - unread
    assert cost.bytes == read + cost.cache_bytes
    assert cost.cache_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_bytes_of_the_repacked_layout():
    """On a CPU that repacks 4-bit weights, the weights and scales that decoding reads, to the byte."""
    import torch

    from lorameter.trial.building.base_model import load_base
    from lorameter.trial.building.lora import attach
    from lorameter.trial.building.packing import linear4bit_layers

    variant, source = Variant(r=4, quantization="nf4"), catalogue.resolve("tiny-llama")
    model = attach(load_base(source, variant, device="cpu", seed=0), variant).eval()
    with torch.no_grad():
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    layers = [(layer.weight, layer.weight.quant_state) for layer in linear4bit_layers(model)]
    if not getattr(layers[0][1], "packing_format_for_cpu", False):
        pytest.skip("this CPU decodes 4-bit weights in their stored layout")
    read = sum(weight.nbytes + state.absmax.nbytes + state.code.nbytes for weight, state in layers)
    assert decode_cost(shapes.shape(source), variant, context=4, repacked=True).linear_bytes == read
