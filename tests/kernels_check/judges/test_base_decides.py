"""Every comparison of what is judged of the base, and of the checks themselves, decides something."""

import dataclasses

import pytest
import torch

from kernels_check.judges import base_layers, base_products
from kernels_check.observe.adapter import adapter_layers
from kernels_check.observe.calls import Calls
from kernels_check.observe.digest import WeightBits, digest
from kernels_check.observe.learning import GradientSeen
from kernels_check.observe.operators import Product
from kernels_check.observe.optimizer import OptimizerSeen


@pytest.fixture
def bases(entries):
    """One call of each base layer below an adapter, numbered in their order."""
    return lambda model: entries(*(f"{layer.name}.base_layer" for layer in adapter_layers(model)))


def product(dtype, call, path="dequantize"):
    """A 4-bit product of a layer, or one of no layer."""
    return Product(op="bitsandbytes::gemm_4bit", path=path, dtype=dtype, call=call)


def test_the_compute_dtype_is_that_of_each_layers_products(seen, training, bases):
    """What ran counts, layer by layer: one that differs, one without any, and products of nobody knows whom."""
    run = training()
    modules = bases(run.model)

    def judge(*products, required="bfloat16"):
        judged = base_products.judge_compute_dtype(seen(fourbit=products, model=run.model, modules=modules), required)
        return judged.against("base.compute_dtype", required)

    bf16 = [product("bfloat16", number) for number in range(4)]
    assert judge(*bf16).reason == "4 of 4 targeted layers: bfloat16, by the products that they called"
    assert judge(*bf16).met
    one = judge(*bf16[:3], product("float32", 3))
    assert (one.status, one.observed) == ("fallback", "bfloat16+float32")
    assert "3 of 4 targeted layers" in one.reason
    assert "layers.1.self_attn.v_proj (float32)" in one.reason
    assert "layers claim bfloat16" in one.reason
    assert "bnb_4bit_compute_dtype" in one.reason
    both = judge(*bf16, product("float32", 3))
    assert both.status == "fallback"
    missing = judge(*bf16[:3], product("bfloat16", None))
    assert missing.status == "unknown"
    assert "cannot tell for base_model.model.model.layers.1.self_attn.v_proj" in missing.reason
    assert judge(*bf16, required=None).status == "active"


def test_products_in_compiled_code_count_where_they_agree(seen, training):
    """No layer is known there; where they do not agree, nothing is."""
    run = training()
    inside = [dataclasses.replace(product(dtype, None), compiled=True) for dtype in ("bfloat16", "float32")]

    def judge(*products):
        return base_products.judge_compute_dtype(seen(fourbit=products, model=run.model, modules=Calls()), "bfloat16")

    assert judge(inside[0], inside[0]).satisfies
    assert judge(*inside).status == "unknown"
    assert judge().status == "unknown"


def test_bytes_that_changed_without_repacking_are_no_excuse(seen, training):
    """And repacking without a change of bytes is none either."""
    run = training()
    before = digest(run.model)
    name = next(iter(before.parts))
    other = dataclasses.replace(before.parts[name], fingerprint="other")
    changed = dataclasses.replace(before, parts={**before.parts, name: other})
    packed = dataclasses.replace(changed, packed=True)

    def judge(after):
        return base_layers.judge_frozen(seen(model=run.model, before=before, after=after), True)

    assert judge(changed).observed is False
    assert judge(packed).status == "unknown"
    same = dataclasses.replace(before, packed=True)
    assert judge(same).observed is True


def test_an_unknown_four_bit_path_is_unknown(seen, training, bases):
    """So are 4-bit weights of which no product was seen; a float base has none."""

    def judge(of, *paths):
        calls = tuple(product(None, number, path) for number, path in enumerate(paths))
        judged = base_products.judge_gemm_path(seen(fourbit=calls, model=of, modules=bases(of)), "dequantize")
        return judged.against("base.gemm_path", "dequantize").status

    run = training()
    assert judge(run.model, *["dequantize"] * 4) == "active"
    assert judge(run.model, "dequantize", *["unknown"] * 3) == "unknown"
    assert judge(run.model, "dequantize", "fused", "unknown", "unknown") == "fallback"
    assert judge(run.model, *["dequantize"] * 3) == "fallback"
    assert judge(run.model) == "unknown"
    assert judge(training(quant=None).model) == "not_applicable"


def census_of(*sizes, unread=0):
    """A base of a 4-bit part, of others by their sizes, and of what could not be read."""
    census = WeightBits()
    for bits, name, size in [(4, "q", 64), (None, "odd", unread), *((16, f"n{n}", one) for n, one in enumerate(sizes))]:
        census.bytes_of[bits] += size
        census.weights_of[bits] += size
        census.largest[bits, name] += size
    census.largest = +census.largest
    return census


@pytest.fixture
def judge_share(seen):
    """Judge the share of 4-bit bytes of a base that was counted so."""

    def judge(census, minimum):
        watched = seen()
        watched.readings["census"] = census
        return base_layers.judge_bytes_in_4bit(watched, minimum).against("base.bytes_in_4bit", minimum)

    return judge


@pytest.mark.parametrize(("minimum", "status"), [(0.25, "active"), (0.5, "unknown"), (0.51, "fallback")])
def test_what_cannot_be_read_may_be_in_4_bits_or_not(judge_share, minimum, status):
    """A share that is reached only with all of it may be reached; above that it is not."""
    assert judge_share(census_of(128, unread=64), minimum).status == status


@pytest.fixture
def judge_frozen(seen):
    """Judge whether a float layer under a LoRA of one's own is frozen, by what requires gradients and is optimised."""

    def judge(*, requires, given, reached=False, stepped=True, **more):
        layer = torch.nn.Module()
        layer.base_layer, layer.lora_A = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 2)
        model = torch.nn.Sequential(layer)
        weight = layer.base_layer.weight.requires_grad_(requires)
        parameters = frozenset({id(weight)} if given else {0})
        optimizer = OptimizerSeen(
            classes=("torch.optim.adamw.AdamW",), learning_rates=(1e-3,), parameters=parameters, state_bytes=0,
            paged_bytes=0, claims_paged=False, fused_requested=None, on_cpu=True,
        )  # fmt: skip
        before = digest(model)
        watched = {"optimizers": (optimizer,) if stepped else (), "before": before, "after": before, **more}
        gradients = {"0.base_layer.weight": GradientSeen(nonzero=True, finite=True)} if reached else {}
        return base_layers.judge_frozen(seen(model=model, gradients=gradients, **watched), True)

    return judge
