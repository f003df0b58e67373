"""Every comparison of a judge decides something: the same evidence with one thing changed gets another verdict."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from kernels_check import adapter, attention, base_layers, execution, optimizer
from kernels_check.adapter_layers import lora_layers
from kernels_check.events import AttentionCall, FourbitCall, StepProfile
from kernels_check.observe import GradientSeen, Observation, OptimizerSeen

BARE = torch.nn.Identity()
FLASH = AttentionCall(
    op="aten::_scaled_dot_product_flash_attention",
    backend="flash",
    direction="forward",
    dtype="bfloat16",
    mask=False,
    causal=True,
    dropout=0.0,
    grouped=False,
    head_size=64,
)
ON_CPU = dataclasses.replace(FLASH, op="aten::_scaled_dot_product_flash_attention_for_cpu")
MATH = dataclasses.replace(FLASH, op="aten::_scaled_dot_product_attention_math", backend="math")
ADAMW = OptimizerSeen(
    classes=("torch.optim.adamw.AdamW",),
    learning_rates=(1e-3,),
    parameters=frozenset(),
    state_bytes=1000,
    paged_bytes=0,
    claims_paged=False,
    fused_requested=None,
    on_cpu=True,
)


@pytest.fixture
def instrument():
    """Evidence is constructed here: nothing is watched."""
    return "profile"


def seen(*attention, **more):
    """An observation of which only what matters is given."""
    nothing = {"fourbit": (), "optimizer_ops": {}, "kernels": {}, "unclassified": {}}
    fields = {**nothing, "compiled_regions": 0, "compiler_lookups": 0}
    profile = StepProfile(attention=attention, **fields | {key: more.pop(key) for key in list(more) if key in fields})
    empty = {"calls": 2, "optimizer_steps": 2, "optimizers": (), "gradients": {}, "changed": frozenset()}
    rest = {"module_calls": {}, "recomputed": frozenset(), "modes": {"": True}, "drew_random": False}
    return Observation(profile=profile, **empty | rest | more)


def model(**config):
    """Something with a configuration."""
    bare = torch.nn.Identity()
    bare.config = SimpleNamespace(**config)
    return bare


def backend(required, *calls, of=BARE):
    return attention.judge_backend(of, seen(*calls), required).against("attention.backend", required)


def but(call, **changes):
    return dataclasses.replace(call, **changes)


def test_layers_are_those_with_softmax_attention():
    """Linear attention calls no attention operator; without a configuration the number is unknown."""
    mixed = model(layer_types=["full_attention", "linear_attention", "sliding_attention"], num_hidden_layers=3)
    assert attention.attention_layers(mixed) == 2
    assert attention.attention_layers(model(num_hidden_layers=5)) == 5
    assert attention.attention_layers(BARE) is None


def test_a_backend_is_judged_without_a_known_number_of_layers():
    """Then every call counts, and the reason says that the number is unknown."""
    check = backend("flash", FLASH, FLASH, FLASH)
    assert check.met
    assert check.reason.startswith("forward: 3 flash; backward: none; unknown number of attention layers")
    assert not backend("flash", FLASH, MATH).met


def test_calls_must_be_a_multiple_of_the_layers():
    """Three calls cannot be those of two layers, four are two micro-batches; a configuration of none is no division."""
    two = model(num_hidden_layers=2)
    assert backend("flash", *[FLASH] * 4, of=two).met
    check = backend("flash", *[FLASH] * 3, of=two)
    assert check.status == "fallback"
    assert "3 calls cannot come from 2 layers" in check.reason
    assert backend("flash", FLASH, of=model(num_hidden_layers=0)).met


def test_recomputed_calls_alone_prove_no_forward_pass():
    """Nor do they count twice beside the first."""
    again = but(FLASH, recomputed=True)
    two = model(num_hidden_layers=2)
    assert not backend("flash", again, again, of=two).met
    assert backend("flash", FLASH, FLASH, again, again, of=two).met
    assert not backend("flash", FLASH, again, of=two).met


def test_without_forward_calls_the_backend_is_absent():
    """A backward pass alone has none."""
    check = backend("flash", but(FLASH, direction="backward"))
    assert check.status == "absent"
    assert check.reason.startswith("forward: none; backward: 1 flash")


def test_nothing_required_is_no_fallback():
    """The cause of what nobody asked for is not looked for."""
    check = backend(None, MATH)
    assert check.status == "active"
    assert "likely cause" not in check.reason
    assert "cannot come from" not in check.reason


def test_what_cuda_would_do_is_said_of_the_cpus_flash_only():
    """A mask, or heads above 256, and only where they are."""
    plain = backend("flash", ON_CPU).reason
    assert "CUDA" not in plain
    assert "refuse the explicit mask" in backend("flash", but(ON_CPU, mask=True)).reason
    assert "refuse the explicit mask" not in backend("flash", but(FLASH, mask=True)).reason
    assert "head size 257" in backend("flash", but(ON_CPU, head_size=257)).reason
    assert "head size" not in backend("flash", but(ON_CPU, head_size=256)).reason
    assert "head size" not in backend("flash", but(FLASH, head_size=257)).reason
    assert "head size" not in backend("flash", but(ON_CPU, head_size=None)).reason


def test_layers_that_went_astray_are_named_by_the_order_of_their_calls():
    """Unless the order is not known, because some were written out or the number of layers is unknown."""
    two = model(num_hidden_layers=2)
    assert "not as required in layers 1;" in backend("flash", FLASH, MATH, FLASH, MATH, of=two).reason
    assert "not as required" not in backend("flash", FLASH, MATH).reason
    eager = but(MATH, op="aten::softmax", backend="eager")
    assert "not as required" not in backend("flash", FLASH, eager, of=two).reason
    assert "not as required in layers 0, 1;" in backend("flash", eager, eager, of=two).reason


@pytest.mark.parametrize(
    ("call", "words", "absent"),
    [
        (but(MATH, dtype="float64"), "float64", "look for"),
        (but(MATH, dropout=0.1), "attention dropout is on", "look for"),
        (but(MATH, mask=True), "an explicit mask", "look for"),
        (but(MATH, head_size=257), "head size above 256", "look for"),
        (but(MATH, head_size=256), "look for", "head size above"),
        (but(MATH, head_size=None), "look for", "head size above"),
        (but(MATH, dtype="float32"), "look for", "dtype float32"),
        (but(MATH, backend="eager"), "load it with 'sdpa'", "look for"),
    ],
)
def test_the_cause_is_what_the_inputs_show(call, words, absent):
    """On a CPU, where float32 is no cause."""
    reason = backend("flash", call).reason
    assert words in reason
    assert absent not in reason


def test_float32_is_a_cause_on_cuda(monkeypatch):
    """With or without grouped heads; bfloat16 is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "dtype float32 (CUDA's flash and cuDNN refuse it)" in backend("flash", but(MATH, dtype="float32")).reason
    assert "grouped" in backend("flash", but(MATH, dtype="float32", grouped=True)).reason
    assert "dtype float32" not in backend("flash", MATH).reason


def test_a_mix_with_eager_is_not_put_down_to_the_model():
    """Only where all is eager was the model built so."""
    assert "built with" not in backend("flash", MATH, but(MATH, backend="eager")).reason


def test_the_dtype_is_that_of_forward_calls_that_tell_it():
    """Backward calls, and calls without a dtype, prove nothing."""
    judged = attention.judge_dtype(seen(but(FLASH, direction="backward"), but(FLASH, dtype=None)))
    assert judged.status == "unknown"
    assert attention.judge_dtype(seen(FLASH, but(FLASH, direction="backward", dtype="float32"))).observed == "bfloat16"


def test_float32_inputs_are_warned_of():
    """Math is what remains only for grouped heads without a mask, which memory-efficient would have taken."""
    assert "float32" not in attention.judge_dtype(seen(FLASH)).reason
    single = but(FLASH, dtype="float32")
    assert "CUDA refuse float32; where" in attention.judge_dtype(seen(single)).reason
    assert "math would run" in attention.judge_dtype(seen(but(single, grouped=True))).reason
    assert "math would run" not in attention.judge_dtype(seen(but(single, grouped=True, mask=True))).reason


@pytest.mark.parametrize(
    ("mask", "causal", "observed", "status"),
    [
        (True, False, "explicit", None),
        (False, True, "causal", None),
        (False, False, "none", None),
        (None, True, "causal", None),
        (None, False, "unknown", "unknown"),
        (False, None, "unknown", "unknown"),
    ],
)
def test_the_mask_is_what_the_operator_was_given(mask, causal, observed, status):
    """What it does not tell is unknown."""
    judged = attention.judge_mask(seen(but(FLASH, mask=mask, causal=causal), but(FLASH, direction="backward")))
    assert (judged.observed, judged.status) == (observed, status)
    assert ("pass no attention_mask" in judged.reason) is (observed == "explicit")


def test_no_forward_call_has_no_mask():
    """Unknown, with or without a backward one."""
    assert attention.judge_mask(seen()).status == "unknown"
    assert attention.judge_mask(seen(but(FLASH, direction="backward"))).status == "unknown"


def test_a_refusal_of_cuda_is_said_of_the_cpu_only():
    """Elsewhere the mask was really taken."""
    assert "CUDA's would refuse" in attention.judge_mask(seen(but(ON_CPU, mask=True))).reason
    assert "CUDA's would refuse" not in attention.judge_mask(seen(but(FLASH, mask=True))).reason
    assert "CUDA's would refuse" not in attention.judge_mask(seen(ON_CPU)).reason


def test_kernels_alone_must_all_be_accepted():
    """One of two backends is not the required one; any fused one is fused; others are not attention."""

    def judge(required, **kernels):
        named = {name.replace("_", "-"): count for name, count in kernels.items()}
        return attention.judge_backend(BARE, seen(kernels=named), required).against("attention.backend", required)

    assert judge("flash", ATT_SDPA_FLASH=2, GEMM_BF16=1).met
    assert not judge("flash", ATT_SDPA_FLASH=2, ATT_CUDNN=1).met
    assert judge("fused", ATT_SDPA_FLASH=2, ATT_CUDNN=1).met
    assert not judge("fused", ATT_FLEX=2).met
    assert judge("flash", GEMM_BF16=1).status == "unknown"


@pytest.mark.parametrize(
    ("kernels", "observed", "status", "words"),
    [
        ({}, None, "unknown", "no kernel recorded"),
        ({"GEMM-TF32": 2}, True, "active", "2 TF32 and 0 plain"),
        ({"GEMM-TF32": 2, "GEMM-FP32-SIMT": 1}, True, "active", "2 TF32 and 1 plain"),
        ({"GEMM-FP32-SIMT": 3}, False, "absent", "0 TF32 and 3 plain"),
        ({"GEMM-BF16": 3}, False, "absent", "need not contain"),
    ],
)
def test_tf32_is_told_by_kernels(monkeypatch, kernels, observed, status, words):
    """Without any it is unknown; a step of bfloat16 has none of either kind, and the reason says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    judged = execution.judge_tf32(seen(kernels=kernels))
    assert (judged.observed, judged.against("tf32", True).status) == (observed, status)
    assert words in judged.reason
    assert ("need not contain" in judged.reason) is ("GEMM-BF16" in kernels)


@pytest.mark.parametrize(
    ("regions", "lookups", "observed", "status", "eagerly"),
    [(2, 2, True, "active", False), (0, 0, False, "absent", False), (0, 3, False, "fallback", True)],
)
def test_compile_is_told_by_regions(regions, lookups, observed, status, eagerly):
    """Look-ups without a region are code that went back to eager."""
    judged = execution.judge_compile(seen(compiled_regions=regions, compiler_lookups=lookups))
    assert (judged.observed, judged.against("compile", True).status) == (observed, status)
    assert ("ran eagerly" in judged.reason) is eagerly


def test_modes_are_named_where_something_was_asked():
    """The odd ones with the remedy; without a requirement, without a remedy."""
    mixed = seen(modes={"": True, "a": False, "b": False})
    asked = execution.judge_mode(mixed, "train")
    assert (asked.observed, "not in train mode: a, b" in asked.reason) == ("mixed", True)
    assert "model.train()" in asked.reason
    assert "not in eval mode: the model itself" in execution.judge_mode(mixed, None).reason
    assert "call model" not in execution.judge_mode(mixed, None).reason
    assert "call model" not in execution.judge_mode(seen(), "train").reason


def checkpointing(training, calls, *, called=4, repeated=0, required=True, modes=None, flagged=False):
    """Judge with as many adapter layers called, and called again, as given."""
    run = training(targets="all-linear")
    names = [layer.name for layer in lora_layers(run.model)]
    run.model.is_activation_checkpointing = flagged
    watched = seen(
        *calls,
        module_calls=dict.fromkeys(names[:called], 1),
        recomputed=frozenset(names[:repeated]),
        modes=modes or {"": True},
    )
    return execution.judge_checkpointing(run.model, watched, required).against("checkpointing", required)


AGAIN = but(FLASH, recomputed=True)


@pytest.mark.parametrize(
    ("calls", "called", "repeated", "status", "words"),
    [
        ((), 0, 0, "unknown", "no layer call was seen"),
        ((), 4, 4, "active", "0 forward calls"),
        ((), 4, 0, "absent", "0 of 4 adapter layers"),
        ((FLASH,), 0, 0, "absent", "1 forward calls for 1 layers (1.00 times)"),
        ((FLASH, AGAIN), 0, 0, "active", "(2.00 times)"),
        ((FLASH, FLASH, AGAIN), 0, 0, "fallback", "only part of the layers recompute"),
        ((FLASH,), 4, 3, "fallback", "only part of the layers recompute"),
        ((FLASH,), 4, 4, "active", "a selective policy keeps the attention"),
        ((FLASH, AGAIN, AGAIN), 4, 4, "active", "(3.00 times)"),
    ],
)
def test_checkpointing_is_told_by_what_ran_again(training, calls, called, repeated, status, words):
    """Attention where it is recomputed, adapter layers where a policy keeps it; a part is not all."""
    check = checkpointing(training, calls, called=called, repeated=repeated)
    assert check.status == status, check.reason
    assert words in check.reason
    assert ("selective" in check.reason) is (len(calls) < 2 and repeated > 0)


def test_a_flag_that_does_nothing_is_named_with_the_mode(training):
    """In train mode as in eval mode; not where nothing, or the opposite, was required."""
    assert "recomputes in train mode" in checkpointing(training, (FLASH,), flagged=True).reason
    sleeping = checkpointing(training, (FLASH,), flagged=True, modes={"": False})
    assert (sleeping.status, "recomputes in eval mode" in sleeping.reason) == ("fallback", True)
    assert checkpointing(training, (FLASH,), flagged=True, required=False).status == "active"
    assert checkpointing(training, (FLASH, AGAIN), flagged=True).status == "active"
    assert "2 backward" in checkpointing(training, (FLASH, *[but(FLASH, direction="backward")] * 2)).reason


@pytest.mark.parametrize(
    ("operators", "regions", "requested", "required", "status", "words", "absent"),
    [
        ({"aten::_fused_adamw_": 1}, 0, True, True, "active", "1 aten::_fused_adamw_", "build it"),
        ({"aten::_foreach_add_": 1}, 0, None, True, "fallback", "build it with fused=True", "lost"),
        ({"aten::_foreach_add_": 1}, 0, True, True, "fallback", "asked for and lost", "build it"),
        ({"aten::addcdiv_": 4}, 0, None, False, "active", "4 aten::addcdiv_", "build it"),
        ({}, 0, None, False, "active", "no update operator", "compiled"),
        ({}, 1, None, True, "unknown", "may be compiled", "build it"),
        ({"aten::addcdiv_": 4}, 1, None, True, "fallback", "4 aten::addcdiv_", "may be compiled"),
        ({"bitsandbytes::optimizer_update_32bit": 1}, 0, None, True, "not_applicable", "kernels of its own", "build"),
    ],
)
def test_fused_is_told_by_operators(operators, regions, requested, required, status, words, absent):
    """None of them may be compiled away; what was asked for and lost has a remedy of its own."""
    stepped = dataclasses.replace(ADAMW, fused_requested=requested)
    watched = seen(optimizer_ops=operators, compiled_regions=regions, optimizers=(stepped,))
    check = optimizer.judge_fused(watched, required).against("optimizer.fused", required)
    assert check.status == status
    assert words in check.reason
    assert absent not in check.reason


@pytest.mark.parametrize(
    ("paged", "claims", "on_cpu", "required", "status", "words"),
    [
        (500, True, False, 0.5, "active", "never paged"),
        (499, True, False, 0.5, "fallback", "never paged"),
        (1000, True, False, 1.0, "active", None),
        (500, False, False, 0.5, "active", None),
        (0, True, False, 0.1, "absent", "never paged"),
        (0, True, True, 0.1, "absent", "not supported on CPU"),
        (0, False, True, 0.0, "active", None),
    ],
)
def test_paging_is_told_by_bytes(paged, claims, on_cpu, required, status, words):
    """The share itself is enough; the reason explains what a paging optimizer does not page, and no other."""
    stepped = dataclasses.replace(ADAMW, paged_bytes=paged, claims_paged=claims, on_cpu=on_cpu)
    check = optimizer.judge_paged_share(seen(optimizers=(stepped,)), required)
    assert check.against("optimizer.paged_share", required).status == status
    for explanation in ("never paged", "not supported on CPU"):
        assert (explanation in check.reason) is (explanation == words)


def test_without_an_optimizer_nothing_is_judged_of_it():
    """Absent on each of its paths."""
    for judged in (optimizer.judge_fused(seen(), True), optimizer.judge_paged_share(seen(), 0.5)):
        assert judged.against("optimizer.fused", True).status == "absent"
        assert "no torch.optim.Optimizer stepped" in judged.reason


def test_learning_is_judged_factor_by_factor(training):
    """A gradient that is missing, zero or not finite, each named by itself and only there."""
    run = training()
    layers = lora_layers(run.model)
    factors = {name: weight for layer in layers for letter in "AB" for name, weight in layer.weights(letter)}
    first = next(iter(factors))
    good = GradientSeen(nonzero=True, finite=True)
    stepped = dataclasses.replace(ADAMW, parameters=frozenset(map(id, factors.values())))
    sound = seen(optimizers=(stepped,), gradients=dict.fromkeys(factors, good), changed=frozenset(factors))

    def judge(**changes):
        check = adapter.judge_learning(run.model, dataclasses.replace(sound, **changes))
        return check.against("lora.learning", True)

    assert judge().met
    assert judge().reason == f"gradients reached all {len(factors)} factors and every lora_B moved in 2 updates"
    for gradient, words in (
        (GradientSeen(nonzero=False, finite=True), "gradient always zero"),
        (GradientSeen(nonzero=True, finite=False), "gradient not finite"),
    ):
        check = judge(gradients={**sound.gradients, first: gradient})
        assert check.reason == f"1 of {len(factors)} factors {words}: {first}"
    without = {name: good for name in factors if name != first}
    assert judge(gradients=without).reason == f"1 of {len(factors)} factors without gradient: {first}"
    still = judge(changed=frozenset())
    assert still.status == "fallback"
    assert "lora_B unchanged in 4 of 4 layers" in still.reason
    assert "is_trainable" not in still.reason
    resting = dataclasses.replace(stepped, learning_rates=(0.0,))
    assert judge(changed=frozenset(), optimizers=(resting,)).status == "unknown"
    assert judge(optimizers=(resting,)).met


def test_dropout_in_compiled_code_takes_random_numbers_as_proof(training):
    """A module that calls no hook was applied only if something random was drawn in compiled code."""
    run = training()
    modes = {name: True for name, _ in run.model.named_modules()}

    def observed(**more):
        return adapter.judge_dropout(run.model, seen(modes=modes, **more), 0.05).observed

    assert observed(compiled_regions=1, drew_random=True) == 0.05
    assert observed(compiled_regions=1) == 0.0
    assert observed(drew_random=True) == 0.0
    reason = adapter.judge_dropout(run.model, seen(modes=modes), 0.05).reason
    assert "but not called" in reason
    assert "model.train()" not in reason


def test_a_remedy_for_idle_targets_is_given_where_nothing_else_is_wrong(training):
    """A disabled adapter is not executed either, and there enabling it is the remedy."""
    run = training()
    assert "choose target_modules" in adapter.judge_attached(run.model, seen()).reason
    run.model.base_model.disable_adapter_layers()
    reason = adapter.judge_attached(run.model, seen()).reason
    assert "enable_adapter_layers()" in reason
    assert "choose target_modules" not in reason


def test_an_adapter_of_an_embedding_is_seen():
    """PEFT keeps its factors as bare parameters, which call no hook: the layer's call counts, and its gradient."""
    import peft

    base = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4))
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    (layer,) = lora_layers(wrapped)
    assert {name.rpartition(".lora_")[2] for name, _ in layer.parts()} >= {"embedding_A.default", "embedding_B.default"}
    assert [name for letter in "AB" for name, _ in layer.weights(letter)] == [
        f"{layer.name}.lora_embedding_A.default",
        f"{layer.name}.lora_embedding_B.default",
    ]
    assert adapter.judge_attached(wrapped, seen(module_calls={layer.name: 1})).observed is True
    assert adapter.judge_attached(wrapped, seen()).observed is False
    name = next(name for name, _ in layer.weights("B"))
    gradients = {name: GradientSeen(nonzero=True, finite=True)}
    assert adapter.judge_attached(wrapped, seen(gradients=gradients)).observed is True


def test_a_linear_layer_that_is_called_without_its_factor_is_idle(training):
    """The wrapper's call proves the base only."""
    run = training()
    calls = {layer.name: 1 for layer in lora_layers(run.model)}
    assert adapter.judge_attached(run.model, seen(module_calls=calls)).observed is False
    calls |= {name: 1 for layer in lora_layers(run.model) for name, _ in layer.parts() if ".lora_A." in name}
    assert adapter.judge_attached(run.model, seen(module_calls=calls)).observed is True


def test_the_operators_overrule_the_layers_on_the_compute_dtype(training):
    """What ran counts, where it is 4-bit and known; agreement changes nothing."""
    run = training()

    def judge(of, dtype, required="bfloat16"):
        call = FourbitCall(op="bitsandbytes::gemm_4bit", path="dequantize", dtype=dtype)
        judged = base_layers.judge_compute_dtype(of, seen(fourbit=(call,)), required)
        return judged.against("base.compute_dtype", required)

    assert judge(run.model, "bfloat16").met
    overruled = judge(run.model, "float32")
    assert (overruled.status, overruled.observed) == ("fallback", "float32")
    assert "layers claim bfloat16" in overruled.reason
    assert "layers claim" not in judge(run.model, None).reason
    mixed = training(unquantised=("lm_head", "layers.1.self_attn.v_proj"))
    assert "layers claim" not in judge(mixed.model, "float32").reason


def test_a_four_bit_layer_is_held_to_its_own_size(training):
    """A state of another layer, and scales that do not fit, prove nothing."""
    layer = lora_layers(training().model)[0].base
    layer.out_features *= 2
    assert "quant_state describes" in base_layers.storage(layer).problem
    layer = lora_layers(training(double=False).model)[0].base
    state = layer.weight.quant_state
    state.absmax = state.absmax[:-1]
    assert "bytes of float32 scales" in base_layers.storage(layer).problem
    nested = lora_layers(training().model)[0].base
    nested.weight.quant_state.absmax = nested.weight.quant_state.absmax.view(torch.int8)
    assert "bytes of int8 scales" in base_layers.storage(nested).problem


def test_a_state_kept_by_the_layer_counts(training):
    """bitsandbytes moves it there when a parameter is recreated; without any the weight is not quantised."""
    layer = lora_layers(training().model)[0].base
    layer.quant_state, layer.weight.quant_state = layer.weight.quant_state, None
    assert base_layers.storage(layer).bits == 4
    layer.quant_state = None
    assert "not quantised" in base_layers.storage(layer).problem


def test_int8_needs_the_state_of_its_class():
    """A float layer that has a state is a float layer."""
    layer = torch.nn.Linear(4, 4)
    layer.state = object()
    assert base_layers.storage(layer).bits == 32


def test_the_origin_is_noted_only_where_it_differs(training):
    """A base that was loaded in its compute dtype needs no remedy, nor does one that is as required."""
    judged = base_layers.judge_compute_dtype(training().model, seen(), "bfloat16")
    assert "dequantises" not in judged.reason
    assert "remedy" not in judged.reason
    assert "remedy" in base_layers.judge_compute_dtype(training().model, seen(), "float32").reason
    assert "remedy" not in base_layers.judge_bits(training(unquantised=("lm_head", "q_proj")).model, None).reason


def test_a_digest_samples_pages_of_large_tensors_only(training, monkeypatch):
    """Tensors of a page or less are hashed whole, and so is everything within the limit."""
    run = training(quant=None, dtype="float32")
    whole = base_layers.digest(run.model)
    assert whole.hashed_bytes == whole.total_bytes
    monkeypatch.setattr(base_layers, "HASHED_BYTES", whole.total_bytes // 3)
    sampled = base_layers.digest(run.model)
    small = [name for name, value in run.model.named_parameters() if name.endswith("norm.weight")]
    assert all(sampled.tensors[name] == whole.tensors[name] for name in small)
    assert sampled.hashed_bytes < whole.total_bytes / 2
    assert any(name.endswith("absmax") for name in base_layers.digest(training().model).tensors)
    assert not any("lora_" in name for name in whole.tensors)


def test_a_tensor_that_comes_or_goes_has_changed():
    """Only a change of dtype is no training."""

    def digest(**tensors):
        return base_layers.Digest(tensors=tensors, hashed_bytes=1, total_bytes=1, packed=False)

    compare = base_layers._compare
    assert compare(digest(a=("float32", "1")), digest(a=("float32", "1"))) == ([], [])
    assert compare(digest(a=("float32", "1")), digest(a=("float32", "2"))) == (["a"], [])
    assert compare(digest(a=("float32", "1")), digest(a=("bfloat16", "2"))) == ([], ["a"])
    assert compare(digest(), digest(a=("float32", "1"))) == (["a"], [])
    assert compare(digest(a=("float32", "1")), digest()) == (["a"], [])


def test_bytes_that_changed_without_repacking_are_no_excuse(training):
    """And repacking without a change of bytes is none either."""
    run = training()
    before = base_layers.digest(run.model)
    name = next(iter(before.tensors))
    changed = dataclasses.replace(before, tensors={**before.tensors, name: (before.tensors[name][0], "other")})
    packed = dataclasses.replace(changed, packed=True)
    assert base_layers.judge_frozen(run.model, seen(), before, changed).observed is False
    assert base_layers.judge_frozen(run.model, seen(), before, packed).status == "unknown"
    same = dataclasses.replace(before, packed=True)
    assert base_layers.judge_frozen(run.model, seen(), before, same).observed is True
    sampled = dataclasses.replace(before, hashed_bytes=before.total_bytes - 1)
    assert "an even sample" in base_layers.judge_frozen(run.model, seen(), before, sampled).reason
    assert "sha256 over all" in base_layers.judge_frozen(run.model, seen(), before, before).reason


def test_an_unknown_four_bit_path_is_unknown(training):
    """So are 4-bit weights of which no product was seen; a float base has none."""

    def judge(of, *paths):
        calls = tuple(FourbitCall(op="bitsandbytes::gemm_4bit", path=path, dtype=None) for path in paths)
        return base_layers.judge_gemm_path(of, seen(fourbit=calls)).against("base.gemm_path", "dequantize").status

    run = training()
    assert judge(run.model, "dequantize") == "active"
    assert judge(run.model, "dequantize", "unknown") == "unknown"
    assert judge(run.model) == "unknown"
    assert judge(training(quant=None).model) == "not_applicable"


def test_several_values_are_told_apart_from_one(training):
    """And a layer that cannot be read is named by its problem, beside those that differ."""
    run = training(unquantised=("lm_head", "layers.1.self_attn.v_proj"))
    assert base_layers.judge_bits(run.model, 4).observed == "16+4"
    first = lora_layers(run.model)[0].base
    first.weight.quant_state = None
    first.quant_state = None
    check = base_layers.judge_bits(run.model, 4).against("base.bits", 4)
    assert check.status == "fallback"
    assert "cannot tell for" in check.reason
    assert "not quantised" in check.reason
    second = training()
    lora_layers(second.model)[0].base.weight.quant_state = None
    lora_layers(second.model)[0].base.quant_state = None
    assert base_layers.judge_bits(second.model, 4).against("base.bits", 4).status == "unknown"
