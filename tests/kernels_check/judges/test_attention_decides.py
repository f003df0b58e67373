"""Every comparison of what is judged of attention decides something."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from kernels_check.judges import attention
from kernels_check.judges.batch import probe_isolation
from kernels_check.observation.attention_calls import AttentionCall
from kernels_check.observation.attention_layers import announced_layers, attention_layers
from kernels_check.observation.calls import Calls, ModuleCall

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


@pytest.fixture
def instrument():
    """Evidence is constructed here: nothing is watched."""
    return "profile"


def model(**config):
    """Something with a configuration."""
    bare = torch.nn.Identity()
    bare.config = SimpleNamespace(**config)
    return bare


@pytest.fixture
def backend(seen):
    """Judge the backend of some calls."""

    def judge(required, *calls, of=BARE, entered=(), grads=(True, True)):
        more = {}
        if entered:  # each name an entry into the model of its own, numbered from 1
            of = torch.nn.ModuleDict({name: torch.nn.Identity() for name in entered})
            made = {"caller": None, "training": True, "in_backward": False, "thread": 0}
            entries = [ModuleCall(names=(n,), with_grad=g, **made) for n, g in zip(entered, grads, strict=True)]
            more["modules"] = Calls(all=(ModuleCall(names=("",), with_grad=False, **made), *entries))
        return attention.judge_backend(seen(*calls, model=of, **more), required).against("attention.backend", required)

    return judge


def but(which, /, **changes):
    return dataclasses.replace(which, **changes)


def test_layers_are_those_with_softmax_attention():
    """Linear attention calls no attention operator; without a configuration the number is unknown."""
    mixed = model(layer_types=["full_attention", "linear_attention", "sliding_attention"], num_hidden_layers=3)
    assert announced_layers(mixed) == 2
    assert announced_layers(model(num_hidden_layers=5)) == 5
    assert announced_layers(torch.nn.Sequential(model(num_hidden_layers=5))) == 5
    assert announced_layers(BARE) is None


def test_every_call_counts(backend):
    """Of the one layer that the model itself is."""
    check = backend("flash", FLASH, FLASH, FLASH)
    assert check.met
    assert check.reason.startswith("forward: 3 flash; backward: none; 1 of 1 attention layers as required;")
    assert not backend("flash", FLASH, MATH).met


def test_calls_of_compiled_code_must_be_a_multiple_of_the_layers(backend):
    """No module is known there: each entry must have called as many as the configuration announces."""
    flash = but(FLASH, region=1)
    two = model(num_hidden_layers=2)
    assert backend("flash", flash, flash, of=two).met
    other = but(flash, region=2)
    assert backend("flash", flash, flash, other, other, of=two).met
    assert backend("flash", flash, other, of=two).status == "unknown"  # one entry in pieces, or two without a layer
    for wrong, status in ((1, "fallback"), (3, "fallback"), (4, "unknown")):
        check = backend("flash", *[flash] * wrong, of=two)
        assert check.status == status
        assert f"{wrong} calls in an entry into compiled code are not those of 2 attention layers" in check.reason
    assert not backend("flash", flash, of=model(num_hidden_layers=0)).met
    unknown = backend("flash", flash)
    assert not unknown.met
    assert "an unknown number of attention layers" in unknown.reason
    assert backend("flash", flash, but(flash, recomputed=True), of=model(num_hidden_layers=1)).met
    assert not backend("flash", but(flash, recomputed=True), of=model(num_hidden_layers=1)).met


def test_recomputed_calls_alone_prove_no_forward_pass(backend):
    """Nor do they make up for one."""
    again = but(FLASH, recomputed=True)
    assert "only recomputed ones" in backend("flash", again, again).reason
    assert not backend("flash", again, again).met
    assert backend("flash", FLASH, FLASH, again, again).met


def test_without_forward_calls_the_backend_is_unknown(backend):
    """A backward pass alone has none."""
    check = backend("flash", but(FLASH, direction="backward"))
    assert check.status == "unknown"
    assert "neither an attention operator nor" in check.reason


def test_nothing_required_is_no_fallback(backend):
    """The cause of what nobody asked for is not looked for."""
    check = backend(None, MATH)
    assert check.status == "active"
    assert "likely cause" not in check.reason
    assert "cannot come from" not in check.reason


def test_what_cuda_would_do_is_said_of_the_cpus_flash_only(backend):
    """A mask, or heads above 256, and only where they are."""
    plain = backend("flash", ON_CPU).reason
    assert "CUDA" not in plain
    assert "refuse the explicit mask" in backend("flash", but(ON_CPU, mask=True)).reason
    assert "refuse the explicit mask" not in backend("flash", but(FLASH, mask=True)).reason
    assert "head size 257" in backend("flash", but(ON_CPU, head_size=257)).reason
    assert "head size" not in backend("flash", but(ON_CPU, head_size=256)).reason
    assert "head size" not in backend("flash", but(FLASH, head_size=257)).reason
    assert "head size" not in backend("flash", but(ON_CPU, head_size=None)).reason


def test_layers_that_went_astray_are_named(backend):
    """One wrong call of a layer is enough, and a layer that is right is not named."""
    check = backend("flash", but(FLASH, call=1), but(MATH, call=2), but(FLASH, call=2), entered=("first", "second"))
    assert "1 of 2 attention layers as required" in check.reason
    assert "not as required in second;" in check.reason
    assert not check.met


def test_what_is_not_the_models_is_said_and_not_judged(backend):
    """A reference without gradients, and another model; where they are all there is, the model ran none."""
    reference = but(MATH, call=2)
    other = MATH
    check = backend("flash", but(FLASH, call=1), reference, entered=("first", "second"), grads=(True, False))
    assert check.met
    assert "not judged: 1 call without gradients (1 math)" in check.reason
    assert backend("flash", reference, entered=("first", "second"), grads=(True, False)).status == "absent"
    assert attention_layers(BARE, Calls(), [other]).elsewhere == (other,)


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
def test_the_cause_is_what_the_inputs_show(backend, call, words, absent):
    """On a CPU, where float32 is no cause."""
    reason = backend("flash", call).reason
    assert words in reason
    assert absent not in reason


def test_what_is_written_out_in_spite_of_the_configuration_is_not_put_down_to_it(backend):
    """A model that was loaded with 'sdpa' is not told to be: some of its layers do not ask for it."""
    for implementation, words, absent in (
        ("sdpa", "need_weights=False", "load it with"),
        ("eager", "load it with 'sdpa'", "need_weights"),
    ):
        built = model(_attn_implementation=implementation)
        reason = backend("flash", FLASH, but(MATH, backend="eager"), of=built).reason
        assert words in reason
        assert absent not in reason


def test_float32_is_a_cause_on_cuda(backend, monkeypatch):
    """With or without grouped heads; bfloat16 is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "dtype float32 (CUDA's flash and cuDNN refuse it)" in backend("flash", but(MATH, dtype="float32")).reason
    assert "grouped" in backend("flash", but(MATH, dtype="float32", grouped=True)).reason
    assert "dtype float32" not in backend("flash", MATH).reason


def test_a_mix_with_eager_is_not_put_down_to_the_model(backend):
    """Only where all is eager was the model built so."""
    assert "built with" not in backend("flash", MATH, but(MATH, backend="eager")).reason


def test_the_dtype_is_that_of_forward_calls_that_tell_it(seen):
    """Backward calls, and calls without a dtype, prove nothing."""
    judged = attention.judge_dtype(seen(but(FLASH, direction="backward"), but(FLASH, dtype=None)), None)
    assert judged.status == "unknown"
    backward = but(FLASH, direction="backward", dtype="float32")
    assert attention.judge_dtype(seen(FLASH, backward), None).observed == "bfloat16"


def test_float32_inputs_are_warned_of(seen):
    """Math is what remains only for grouped heads without a mask, which memory-efficient would have taken."""
    assert "float32" not in attention.judge_dtype(seen(FLASH), None).reason
    single = but(FLASH, dtype="float32")
    assert "CUDA refuse float32; where" in attention.judge_dtype(seen(single), None).reason
    assert "math would run" in attention.judge_dtype(seen(but(single, grouped=True)), None).reason
    assert "math would run" not in attention.judge_dtype(seen(but(single, grouped=True, mask=True)), None).reason


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
def test_the_mask_is_what_the_operator_was_given(seen, mask, causal, observed, status):
    """What it does not tell is unknown."""
    judged = attention.judge_mask(seen(but(FLASH, mask=mask, causal=causal), but(FLASH, direction="backward")), None)
    assert (judged.observed, judged.status) == (observed, status)
    assert ("pass no attention_mask" in judged.reason) is (observed == "explicit")


def test_no_forward_call_has_no_mask(seen):
    """Unknown, with or without a backward one."""
    assert attention.judge_mask(seen(), None).status == "unknown"
    assert attention.judge_mask(seen(but(FLASH, direction="backward")), None).status == "unknown"


def test_a_refusal_of_cuda_is_said_of_the_cpu_only(seen):
    """Elsewhere the mask was really taken."""
    assert "CUDA's would refuse" in attention.judge_mask(seen(but(ON_CPU, mask=True)), None).reason
    assert "CUDA's would refuse" not in attention.judge_mask(seen(but(FLASH, mask=True)), None).reason
    assert "CUDA's would refuse" not in attention.judge_mask(seen(ON_CPU), None).reason


def test_kernels_alone_must_all_be_accepted(seen):
    """One of two backends is not the required one; any fused one is fused; others are not attention."""

    def judge(required, **kernels):
        named = {name.replace("_", "-"): count for name, count in kernels.items()}
        return attention.judge_backend(seen(kernels=named, model=BARE), required).against("attention.backend", required)

    assert judge("flash", ATT_SDPA_FLASH=2, GEMM_BF16=1).met
    assert not judge("flash", ATT_SDPA_FLASH=2, ATT_CUDNN=1).met
    assert judge("fused", ATT_SDPA_FLASH=2, ATT_CUDNN=1).met
    assert not judge("fused", ATT_FLEX=2).met
    assert judge("flash", GEMM_BF16=1).status == "unknown"


def test_a_row_of_one_record_is_watched_and_not_perturbed(training):
    """A record that leaks into another row is found there, which no attention can bring about."""
    run = training()
    positions = torch.stack([torch.tensor([*range(6), *range(10)]), torch.arange(16)])
    batch = {**run.inputs, "position_ids": positions, "use_cache": False}
    assert probe_isolation(run.model, batch).met

    def leak(module, inputs, output):
        return torch.stack([output[0], output[0] + output[1]])

    run.model.get_input_embeddings().register_forward_hook(leak)
    check = probe_isolation(run.model, batch)
    assert check.status == "unknown"
    assert "changing one row of the batch changes the logits of another" in check.reason


def test_of_compiled_code_the_announced_layers_are_told(backend):
    """As many as the configuration says, or that it says nothing."""
    flash = but(FLASH, region=1)
    words = "compiled, so that no layer is told, {} attention layers; "
    assert words.format(2) in backend("flash", flash, flash, of=model(num_hidden_layers=2)).reason
    assert words.format("an unknown number of") in backend("flash", flash).reason


def test_code_in_pieces_is_no_excuse_for_an_entry_that_lacks_a_layer(backend):
    """Where each entry into the model has all layers, and other code ran in pieces, it cannot be told."""
    inside, pieces = but(FLASH, region=1, call=0), [but(FLASH, region=2), but(FLASH, region=3)]
    two = model(num_hidden_layers=2)
    assert backend("flash", inside, inside, *pieces, of=two).status == "unknown"
    lacking = backend("flash", inside, *pieces, of=two)
    assert lacking.status == "fallback"
    assert "1 calls in an entry into compiled code are not those of 2 attention layers" in lacking.reason


def test_code_in_pieces_is_no_excuse_for_a_layer_without_attention(seen):
    """A layer that is known to have run none is a fault, whatever else was compiled."""
    of = torch.nn.ModuleDict({"first": torch.nn.Identity(), "second": torch.nn.Identity()})
    of.config = SimpleNamespace(num_hidden_layers=2)
    made = {"caller": None, "training": True, "with_grad": True, "in_backward": False, "thread": 0}
    modules = Calls(all=tuple(ModuleCall(names=(name,), **made) for name in ("first", "second")))
    pieces = [but(FLASH, region=2), but(FLASH, region=3)]
    judged = attention.judge_backend(seen(but(FLASH, call=0), *pieces, model=of, modules=modules), "flash")
    assert judged.against("attention.backend", "flash").status == "fallback"
    assert "1 call of 1 of 2 layers ran no attention that is recognised: second" in judged.reason


@pytest.mark.parametrize(
    ("required", "status"), [(None, "unknown"), ("explicit", "unknown"), ("causal", "fallback"), ("none", "fallback")]
)
def test_what_one_call_does_not_tell_is_unknown_unless_another_differs(seen, required, status):
    """As required so far is no verdict; one that is otherwise is."""
    calls = but(FLASH, mask=True), but(FLASH, mask=None, causal=False)
    judged = attention.judge_mask(seen(*calls), required)
    assert judged.against("attention.mask", required).status == status
    assert "not told by 1 call" in judged.reason


def test_the_dtypes_are_counted_as_far_as_they_are_told(seen):
    """Each with the number of its calls, or that none is."""
    told = attention.judge_dtype(seen(FLASH, FLASH, but(FLASH, dtype="float16")), None)
    assert told.reason == "input types of the inner operator: 2 bfloat16, 1 float16"
    untold = attention.judge_dtype(seen(but(FLASH, dtype=None)), None)
    assert untold.reason == "input types of the inner operator: none that is told; not told by 1 call"


@pytest.mark.parametrize("judge", [attention.judge_backend, attention.judge_dtype, attention.judge_mask])
def test_attention_of_a_pass_that_failed_is_said_and_not_judged(seen, judge):
    """Where that is all there is, the model ran none."""
    made = {"names": ("",), "caller": None, "training": True, "in_backward": False, "thread": 0, "with_grad": True}
    modules = Calls(all=(ModuleCall(**made), ModuleCall(**made)), failed=frozenset({0}))
    failed, sound = but(MATH, call=0, dtype="float32", mask=True), but(FLASH, call=1)
    alone = judge(seen(failed, modules=modules), None)
    assert (alone.observed, alone.present) == (None, False)
    assert alone.reason.endswith("; not judged: 1 in passes that failed (1 math)")
    assert judge(seen(failed, sound, modules=modules), None).observed == judge(seen(FLASH), None).observed
    assert "failed" not in judge(seen(FLASH), None).reason


@pytest.mark.parametrize("judge", [attention.judge_dtype, attention.judge_mask])
def test_without_attention_of_the_model_its_inputs_are_unknown_or_absent(seen, judge):
    """None was seen, or none but another model's: then the model ran none."""
    assert judge(seen(), None).reason == "no attention operator in the profiled step"
    assert judge(seen(), None).status == "unknown"
    made = {"names": ("",), "caller": None, "training": True, "in_backward": False, "thread": 0}
    modules = Calls(all=(ModuleCall(with_grad=False, **made), ModuleCall(with_grad=True, **made)))
    evaluated = judge(seen(but(FLASH, call=0), modules=modules), None)
    assert (evaluated.status, evaluated.present) == (None, False)
    assert "no attention of the model itself was seen; not judged: 1 call without gradients" in evaluated.reason
