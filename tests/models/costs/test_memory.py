"""An estimate follows from the shape alone: closed forms, order of the settings, and the published figures."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorameter.models import catalogue, shapes
from lorameter.models.costs.memory import (
    CUDA_CONTEXT_BYTES,
    MEASURED_ERRORS,
    MEASURED_ON,
    PEAK_RANGES,
    bare_process_bytes,
    birth_bytes,
    estimate_memory,
    estimate_peak,
    mapped_from_tokens,
    stored_dtype,
)
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload

LLAMA = shapes.shape(catalogue.resolve("random:llama2-7b"))
VARIANT = LoraVariant(name="v", r=8, target_modules=("q_proj", "v_proj"))
LARGE = {"r": 512, "gradient_checkpointing": True}
NF4 = {"quantization": "nf4", "prepare_for_kbit": True}


def kinds(phase="train", device="cuda", workload=None, **changes):
    variant = dataclasses.replace(VARIANT, **changes)
    return estimate_memory(variant, workload or Workload(), LLAMA, phase=phase, device=device).kinds


def test_weights_and_adapter_are_closed_forms():
    """Llama-2-7B by hand: 32 blocks of 4 × 4096² + 3 × 4096 × 11008, two tables of 32000 × 4096, 65 norms."""
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    plain, packed = kinds(), kinds(**NF4, double_quant=False)
    assert plain["linear_weights"] == 2 * linear
    assert plain["embeddings_bfloat16"] == 2 * 2 * 32000 * 4096
    assert plain["norms_bfloat16"] == 2 * 65 * 4096
    assert packed["linear_weights"] == linear // 2
    assert packed["quantization_state"] == linear // 64 * 4 + 7 * 32 * 64  # a scale for 64 weights, a table a layer
    assert packed["embeddings_float32"] == 2 * plain["embeddings_bfloat16"]
    assert plain["adapter"] == 4 * 8 * 524_288
    assert plain["optimizer_state"] == 2 * plain["adapter"] + 4 * 128
    assert kinds(quantization="int8")["linear_weights"] == linear


def test_keys_and_values_grow_with_the_context():
    """Two of them for each block, head and token, 16 bits each; a request has no optimizer."""
    short = kinds("generate", workload=Workload(prompt_tokens=100, new_tokens=28))
    assert short["kv_cache"] == 2 * 32 * 4096 * 128 * 2
    assert kinds("generate", workload=Workload(prompt_tokens=228, new_tokens=28))["kv_cache"] == 2 * short["kv_cache"]
    assert not {"optimizer_state", "gradients", "activations"} & short.keys()


def test_adapters_that_lie_beside_each_other_count_while_requests_are_answered():
    """Each with its weights; training has one."""
    one, four = (kinds("generate", workload=Workload(adapters=count)) for count in (1, 4))
    assert four == {**one, "adapter": 4 * one["adapter"]}
    assert kinds("train", workload=Workload(adapters=4)) == kinds("train")


def test_a_request_of_many_prompts_has_the_keys_and_values_of_each():
    """And their logits and the work on them; what lies there before it is the same. Of one it is no peak."""
    one, eight = (kinds("generate", workload=Workload(request_batch=count)) for count in (1, 8))
    times = {kind: eight[kind] / size for kind, size in one.items() if size}
    assert {kind for kind, factor in times.items() if factor == 8} == {"kv_cache", "logits", "temporaries"}
    assert {factor for kind, factor in times.items()} == {1, 8}
    sizes = {"shape": LLAMA, "device": "cuda"}
    assert estimate_peak(VARIANT, Workload(), **sizes).phase == "train"
    many = Workload(request_batch=512, prompt_tokens=1024)
    assert estimate_peak(VARIANT, many, **sizes).phase == "generate"
    assert estimate_peak(VARIANT, many, **sizes, answers=False).phase == "train"
    one_long = Workload(batch_size=1, sequence_length=64, prompt_tokens=4000)
    assert estimate_peak(VARIANT, one_long, **sizes).phase == "generate"


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"r": 64}, {"r": 8}),
        ({"target_modules": ("all-linear",)}, {}),
        ({}, {"quantization": "nf4"}),
        ({"dtype": "float32"}, {}),
        ({}, {"gradient_checkpointing": True}),
        ({"attention": "eager"}, {}),
        ({"quantization": "nf4", "double_quant": False}, {"quantization": "nf4"}),
        ({**LARGE, "optimizer": "adamw"}, LARGE),
        (LARGE, {**LARGE, "adapter_dtype": "bfloat16"}),
    ],
)
def test_settings_are_ordered(more, less):
    """More of the one than of the other, on a GPU and on a CPU."""
    devices = ("cuda",) if more.get("optimizer") else ("cuda", "cpu")
    for device in devices:
        assert sum(kinds(device=device, **more).values()) > sum(kinds(device=device, **less).values())


def test_a_batch_and_a_sequence_take_more():
    """Activations and logits scale with the tokens; eager attention with the square of the length."""
    sizes = [sum(kinds(workload=Workload(batch_size=rows)).values()) for rows in (1, 2, 4)]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=1e-6)
    eager = [kinds(attention="eager", workload=Workload(sequence_length=n))["activations"] for n in (512, 1024)]
    assert eager[1] > 2.2 * eager[0]


def test_large_ranks_are_highest_when_the_optimizer_steps():
    """Under checkpointing gradients of r 1024 outweigh activations and logits of a short batch."""
    found = kinds(r=1024, target_modules=("all-linear",), gradient_checkpointing=True)
    assert found["gradients"] == found["adapter"]


def test_a_process_counts_on_the_host_and_a_context_on_a_gpu():
    """The kinds of the host are in the total; a GPU's context is outside the allocator, as is what is paged."""
    host = estimate_memory(VARIANT, Workload(), LLAMA)
    bare = sum(host.kinds[kind] for kind in ("process", "library_code", "library_heap", "interpreter"))
    assert bare == bare_process_bytes(None)
    assert bare_process_bytes("13.0") - bare == birth_bytes("13.0") - birth_bytes(None) > 100 * 2**20
    assert host.needed_bytes == host.total_bytes
    larger = estimate_memory(VARIANT, Workload(), LLAMA, process_bytes=host.kinds["process"] + 100)
    assert larger.total_bytes == host.total_bytes + 100
    paged = dataclasses.replace(VARIANT, r=64, optimizer="paged_adamw_32bit")
    card = estimate_memory(paged, Workload(), LLAMA, device="cuda")
    assert card.needed_bytes == card.total_bytes + CUDA_CONTEXT_BYTES
    assert card.outside_allocator["paged_optimizer_state"] == 8 * 64 * 524_288
    assert "process" not in card.kinds
    assert estimate_memory(paged, Workload(), LLAMA, device="cuda", process_bytes=1) == card


def test_a_mapped_checkpoint_stays_whole_beside_its_quantised_layers(tmp_path):
    """As long as the embeddings are its own pages: not for another type, and not when they are cast."""
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    assert stored_dtype(catalogue.resolve(str(tmp_path))) == "bfloat16"
    assert stored_dtype(catalogue.resolve("random:llama2-7b")) is None

    def pages(**changes):
        variant = dataclasses.replace(VARIANT, **changes)
        return estimate_memory(variant, Workload(), LLAMA, stored="bfloat16").kinds.get("checkpoint_pages", 0)

    assert pages(quantization="nf4") == kinds()["linear_weights"]
    assert pages() == pages(**NF4) == pages(quantization="nf4", dtype="float32") == 0


MODELS = {
    name: shapes.shape(catalogue.resolve(f"random:{name}"))
    for name in ("llama2-7b", "llama2-70b", "mistral-7b", "qwen2.5-7b", "gemma-7b", "smollm2-135m")
}
VARIANTS = st.builds(
    lambda quantised, prepared, **fields: LoraVariant(
        **fields, quantization=quantised, prepare_for_kbit=prepared and quantised != "none"
    ),
    quantised=st.sampled_from(("none", "int8", "nf4")),
    prepared=st.booleans(),
    r=st.sampled_from((1, 16, 512)),
    dtype=st.sampled_from(("float32", "bfloat16")),
    target_modules=st.sampled_from((("all-linear",), ("q_proj", "v_proj"), ("o_proj",))),
    lora_dropout=st.sampled_from((0.0, 0.1)),
    use_dora=st.booleans(),
    attention=st.sampled_from(("sdpa", "eager", "flex_attention")),
    gradient_checkpointing=st.booleans(),
    gradient_accumulation=st.sampled_from((1, 4)),
    autocast=st.sampled_from((None, "bfloat16")),
    optimizer=st.sampled_from(("adamw", "adamw_fused", "paged_adamw_8bit")),
)


@settings(max_examples=150, deadline=None)
@given(
    VARIANTS, st.sampled_from(sorted(MODELS)), st.sampled_from(("cuda", "cpu")), st.integers(1, 300),
    st.integers(8, 4000), st.integers(0, 50), st.integers(0, 500),
)  # fmt: skip
def test_no_estimate_falls_with_a_larger_batch_or_length(variant, model, device, rows, length, more_rows, more_length):
    """What fits is found by halving. On a CPU it falls at one number of tokens alone, and on neither side of that."""
    shape = MODELS[model]
    less = Workload(batch_size=rows, sequence_length=length)
    more = Workload(batch_size=rows + more_rows, sequence_length=length + more_length)
    falls_at = mapped_from_tokens(variant, shape)
    if device == "cpu" and rows * length < falls_at <= more.batch_size * more.sequence_length:
        return
    for phase in ("train", "generate"):
        before, after = (
            estimate_memory(variant, workload, shape, phase=phase, device=device).needed_bytes
            for workload in (less, more)
        )
        assert before <= after


def test_the_errors_are_those_that_were_measured():
    """Constants of the program are the least and the greatest of the page that `make proof-memory_estimate` writes."""
    page = (Path(__file__).parents[3] / "reports" / "proof" / "memory_estimate.txt").read_text(encoding="utf-8")
    measured, _, _ = page.partition("published peaks")
    errors = re.findall(r"^.*?\b(?:train|generate) +[\d.]+ +[\d.]+ +([+-][\d.]+)%", measured, re.MULTILINE)
    assert pytest.approx((min(map(float, errors)) / 100, max(map(float, errors)) / 100)) == MEASURED_ERRORS
    assert MEASURED_ON.startswith(f"{len(errors)} peaks")
    assert "smollm2-135m, CPU" in measured
    low, high = (1 / ratio - 1 for ratio in reversed(PEAK_RANGES["cpu"]))
    assert low < MEASURED_ERRORS[0] < MEASURED_ERRORS[1] < high
