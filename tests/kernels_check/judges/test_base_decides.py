"""Every comparison of what is judged of the base, and of the checks themselves, decides something."""

import dataclasses

import pytest
import torch

from kernels_check.check import name_some
from kernels_check.judges import base_layers, base_products
from kernels_check.judges.paths import validate
from kernels_check.observation import storage
from kernels_check.observation.adapter_layers import adapter_layers
from kernels_check.observation.calls import Calls, ModuleCall
from kernels_check.observation.census import Census
from kernels_check.observation.digest import digest
from kernels_check.observation.gradients import GradientSeen
from kernels_check.observation.optimizers import OptimizerSeen
from kernels_check.observation.products import Product

FORWARD = ModuleCall(names=("",), caller=None, training=True, with_grad=True, in_backward=False, thread=0)


@pytest.fixture
def instrument():
    """Evidence is constructed here: nothing is watched."""
    return "profile"


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


def test_a_four_bit_layer_is_held_to_its_own_size(training):
    """A state of another layer, and scales that do not fit, prove nothing."""
    layer = adapter_layers(training().model)[0].base
    layer.out_features *= 2
    assert "quant_state describes" in storage.read_storage(layer).problem
    layer = adapter_layers(training(double=False).model)[0].base
    state = layer.weight.quant_state
    state.absmax = state.absmax[:-1]
    assert "bytes of float32 scales" in storage.read_storage(layer).problem
    nested = adapter_layers(training().model)[0].base
    nested.weight.quant_state.absmax = nested.weight.quant_state.absmax.view(torch.int8)
    assert "bytes of int8 scales" in storage.read_storage(nested).problem


def test_a_state_kept_by_the_layer_counts(training):
    """bitsandbytes moves it there when a parameter is recreated; without any the weight is not quantised."""
    layer = adapter_layers(training().model)[0].base
    layer.quant_state, layer.weight.quant_state = layer.weight.quant_state, None
    assert storage.read_storage(layer).bits == 4
    layer.quant_state = None
    assert "not quantised" in storage.read_storage(layer).problem


def test_int8_needs_the_state_of_its_class():
    """A float layer that has a state is a float layer."""
    layer = torch.nn.Linear(4, 4)
    layer.state = object()
    assert storage.read_storage(layer).bits == 32


def test_int8_needs_its_scales():
    """Without them, or with those of another layer, the integers are no weights."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(64, 64), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    assert storage.read_storage(layer).bits == 8
    layer.weight.SCB = layer.weight.SCB[:-1]
    assert storage.read_storage(layer).problem == "63 scales for 64 rows of int8"
    layer.weight.SCB = None
    assert storage.read_storage(layer).problem == "no scales for 64 rows of int8"


def test_the_origin_is_noted_only_where_it_differs(training):
    """A base that was loaded in its compute dtype needs no remedy, nor does one that is as required."""
    check = training().check("base.compute_dtype", "bfloat16")
    assert "dequantises" not in check.reason
    assert "remedy" not in check.reason
    assert "remedy" in training().check("base.compute_dtype", "float32").reason
    partly = training(unquantised=("lm_head", "q_proj"))
    assert "remedy" not in partly.check("base.bits").reason


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


def test_a_layer_that_is_passed_by_is_found(training):
    """Its own forward or that of what holds it was replaced; the others of its kind ran."""
    for replaced in ("layers.1.mlp", "layers.1.self_attn.q_proj"):
        run = training()
        module = run.model.get_submodule(f"base_model.model.model.{replaced}")
        width = module.base_layer.out_features if replaced.endswith("q_proj") else None
        module.forward = lambda x, *a, width=width, **k: x if width is None else x.new_ones(*x.shape[:-1], width)
        check = run.check("base.gemm_path", "dequantize")
        assert check.status == "fallback"
        assert "without one ran" in check.reason
        assert replaced in check.reason
    assert training().check("base.gemm_path", "dequantize").met


def test_several_values_are_told_apart_from_one(training, seen):
    """And a layer that cannot be read is named by its problem, beside those that differ."""
    run = training(unquantised=("lm_head", "layers.1.self_attn.v_proj"))
    assert base_layers.judge_bits(seen(model=run.model), 4).observed == "16+4"
    first = adapter_layers(run.model)[0].base
    first.weight.quant_state = None
    first.quant_state = None
    check = base_layers.judge_bits(seen(model=run.model), 4).against("base.bits", 4)
    assert check.status == "fallback"
    assert "cannot tell for" in check.reason
    assert "not quantised" in check.reason
    second = training()
    adapter_layers(second.model)[0].base.weight.quant_state = None
    adapter_layers(second.model)[0].base.quant_state = None
    assert base_layers.judge_bits(seen(model=second.model), 4).against("base.bits", 4).status == "unknown"


def test_as_many_names_as_are_shown_are_all():
    """Nothing is counted then, and one more is one more."""
    assert name_some("abcd") == "a, b, c, d"
    assert name_some("abcde") == "a, b, c, d and 1 more"


@pytest.mark.parametrize("share", [0.0, 0, 1.0, 1])
def test_a_share_may_be_nothing_or_all(share):
    """Both ends belong to the range."""
    validate({"optimizer.paged_share": share})


def census_of(*sizes, unread=0):
    """A base of a 4-bit part, of others by their sizes, and of what could not be read."""
    census = Census()
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


def test_the_two_largest_others_are_named_and_the_rest_counted(judge_share):
    """And no rest where there is none."""
    assert judge_share(census_of(30, 20), 1.0).reason.endswith("the largest that are not: n0 0.0 KiB, n1 0.0 KiB")
    assert judge_share(census_of(30, 20, 10), 1.0).reason.endswith("n1 0.0 KiB and 1 more")


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (2**10, "1.0 KiB"),
        (2**20 - 2**10, "1023.0 KiB"),
        (2**20, "1.0 MiB"),
        (2**30 - 2**20, "1023.0 MiB"),
        (2**30, "1.0 GiB"),
    ],
)
def test_a_size_is_told_in_the_largest_unit_that_it_fills(judge_share, size, words):
    """From one of it on."""
    assert f"n0 {words}" in judge_share(census_of(size), 1.0).reason


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


def test_a_base_that_an_optimizer_holds_or_a_gradient_reaches_is_not_frozen(judge_frozen):
    """Either is enough where it requires gradients; what requires none is skipped, and said."""
    for given, reached in ((True, False), (False, True), (True, True)):
        finding = judge_frozen(requires=True, given=given, reached=reached)
        assert finding.observed is False
        assert finding.reason.startswith("1 base parameters require gradients: 0.base_layer.weight")
        assert ("are given to the optimizer" in finding.reason) is given
        assert ("received a gradient" in finding.reason) is reached
        assert "unchanged over" not in finding.reason
    idle = judge_frozen(requires=False, given=True)
    assert idle.observed is True
    assert "unchanged over 2 steps, no gradient, not optimised; 1 frozen base parameters are given to" in idle.reason


def test_a_base_that_requires_gradients_to_no_effect_is_noted(judge_frozen):
    """Where an optimizer stepped without it; where none did, one may hold it and it is unknown."""
    loose = judge_frozen(requires=True, given=False)
    assert (loose.observed, loose.status) == (True, None)
    assert "no gradient reached and no optimizer holds, though they require gradients: 0.base" in loose.reason
    unseen = judge_frozen(requires=True, given=False, stepped=False)
    assert (unseen.observed, unseen.status) == (None, "unknown")
    assert unseen.reason == (
        "no optimizer stepped, so it cannot be told whether one holds what trains: 0.base_layer.weight"
    )
    sound = judge_frozen(requires=False, given=False)
    assert (sound.observed, "though they require gradients" in sound.reason) == (True, False)


def test_the_remedy_is_for_what_was_asked(seen, training):
    """Nothing is to be mended where nothing was required."""
    run = training(unquantised=("lm_head", "layers.1.self_attn.v_proj"))
    assert "; remedy: load with quantization_config" in base_layers.judge_bits(seen(model=run.model), 4).reason
    assert "exceptions: " in base_layers.judge_bits(seen(model=run.model), None).reason
    for judge in (base_layers.judge_bits, base_layers.judge_quant_type, base_layers.judge_double_quant):
        assert "remedy" not in judge(seen(model=run.model), None).reason


def test_where_no_compute_dtype_is_required_the_others_are_told_from_most(seen, training, bases):
    """Layers that called no product are no majority."""
    run = training()
    one = [product("float32", 0), *(product("bfloat16", number) for number in (1, 2))]
    watched = seen(fourbit=tuple(one), model=run.model, modules=bases(run.model))
    reason = base_products.judge_compute_dtype(watched, None).reason
    assert reason.startswith("2 of 4 targeted layers: bfloat16, by the products that they called; exceptions: ")
    unseen = seen(model=run.model, modules=bases(run.model))
    assert base_products.judge_compute_dtype(unseen, None).reason.startswith("0 of 4 targeted layers: None")


def test_four_bit_layers_without_an_adapter_count(seen, training):
    """A 4-bit base none of whose products was seen is unknown, wherever the adapter is and whatever calls a hook."""
    run = training(targets=("lm_head",))
    called = Calls(all=(FORWARD, dataclasses.replace(FORWARD, names=("base_model.model.model.layers.0.mlp.up_proj",))))
    for modules in (called, Calls()):
        judged = base_products.judge_gemm_path(seen(model=run.model, modules=modules), "dequantize")
        assert (judged.status, judged.reason) == ("unknown", "4-bit weights but no known 4-bit operator ran")
