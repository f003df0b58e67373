"""Every comparison of what is judged of the adapter decides something."""

import dataclasses

import peft
import pytest
import torch

from kernels_check.judges import adapter, attached, learning
from kernels_check.observation.adapter_calls import LayerCall
from kernels_check.observation.adapter_layers import adapter_layers
from kernels_check.observation.adapter_updates import ParameterUpdates
from kernels_check.observation.gradients import GradientSeen
from kernels_check.observation.optimizers import OptimizerSeen

BARE = torch.nn.Identity()
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
CALL = LayerCall(active=("default",), disabled=False, merged=False, with_gradients=True)
GOOD = GradientSeen(nonzero=True, finite=True, after_updates=1)
LEARNT = ParameterUpdates(updates=2, fed=2, moved=2, learnt=2, rate=1e-3)


@pytest.fixture
def instrument():
    """Evidence is constructed here: nothing is watched."""
    return "profile"


def called(model, **changes):
    """One call of each layer in which all its parts ran."""
    return {
        layer.name: [dataclasses.replace(CALL, ran={name: 0.05 for name, _ in layer.parts()}, **changes)]
        for layer in adapter_layers(model)
    }


@pytest.fixture
def judge(seen, training):
    """Judge learning of a small run of which everything learnt, but for what is said of its first parameter."""
    run = training()
    weights = dict(pair for layer in adapter_layers(run.model) for pair in layer.weights())
    first = next(iter(weights))

    def judged(gradient=GOOD, update=LEARNT, *, given=True, rates=(1e-3,), steps=2, **more):
        kept = [value for name, value in weights.items() if given or name != first]
        stepped = dataclasses.replace(ADAMW, parameters=frozenset(map(id, kept)), learning_rates=rates)
        gradients = dict.fromkeys(weights, GOOD) | {first: gradient}
        watched = {
            "gradients": {name: one for name, one in gradients.items() if one is not None},
            "updates": dict.fromkeys(weights, LEARNT) | {first: update},
            "optimizers": (stepped,) if steps else (),
            "optimizer_steps": steps,
            "changed": frozenset(weights),
        }
        return learning.judge_learning(seen(model=run.model, **watched | more), True).against("lora.learning", True)

    return judged


def test_where_everything_learns_it_is_said_of_how_many(judge):
    """All of them, in so many updates."""
    assert judge().met
    assert judge().reason == "gradients reached 8 of 8 trainable parameters and updates moved all of them, in 2 updates"


@pytest.mark.parametrize(
    ("gradient", "status", "words"),
    [
        (None, "fallback", "without gradient"),
        (GradientSeen(nonzero=False, finite=True, after_updates=1), "fallback", "gradient always zero"),
        (GradientSeen(nonzero=False, finite=True), "unknown", "gradient zero in every call before an update moved"),
        (GradientSeen(nonzero=True, finite=False), "fallback", "gradient not finite"),
        (GradientSeen(nonzero=True, finite=True, produced=False), "unknown", "gradient put there by hand"),
    ],
)
def test_a_gradient_is_judged_by_where_it_came_from_and_what_it_held(judge, gradient, status, words):
    """Missing, zero, not finite or from nowhere, each named by itself and only there."""
    check = judge(gradient)
    assert check.status == status
    assert check.reason.startswith(f"1 of 8 parameters {words}")
    assert "q_proj.lora_A" in check.reason


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"moved": 0, "learnt": 0}, "fallback", "unchanged by updates"),
        ({"stuck": 2, "learnt": 0}, "fallback", "round away in float32"),
        ({"stuck": 2, "learnt": 1}, "active", "gradients reached 8 of 8"),
        ({"fed": 0, "learnt": 0}, "fallback", "moved only by weight decay"),
        ({"fed": 0, "learnt": 0, "moved": 0}, "fallback", "gradient gone or zero when the update was to use it"),
        ({"losses": [2]}, "fallback", "lost what an update had written"),
        ({"losses": [1]}, "fallback", "lost what an update had written"),
        ({"losses": [1], "updates": 4}, "active", "gradients reached 8 of 8"),
        ({"faint": 1, "learnt": 0, "moved": 0}, "active", "1 of 8 by less than float32 shows"),
        ({"faint": 1, "learnt": 0, "moved": 0, "rate": 1e-7}, "fallback", "unchanged by updates"),
        ({"written": 1}, "active", "gradients reached 8 of 8"),
        ({"rate": 0.0, "learnt": 0, "moved": 0}, "fallback", "learning rate 0"),
    ],
)
def test_an_update_is_judged_by_what_it_made(judge, changes, status, words):
    """Nothing, rounding, decay, what was undone, or a rate of zero of this one among others that have one."""
    check = judge(update=dataclasses.replace(LEARNT, **changes))
    assert check.status == status
    assert words in check.reason


def test_one_that_no_optimizer_was_given_is_named_or_unknown(judge):
    """Left out, or updated by something that is no optimizer of torch's, such as a copy of master weights."""
    unseen = ParameterUpdates()
    assert judge(update=unseen, given=False).status == "fallback"
    assert "1 of 8 parameters not given to the optimizer" in judge(update=unseen, given=False).reason
    copied = judge(update=ParameterUpdates(written=2), given=False)
    assert (copied.status, "master weights" in copied.reason) == ("unknown", True)


def test_where_every_learning_rate_is_zero_nothing_can_be_told(judge):
    """A warm-up from zero is no fault."""
    resting = ParameterUpdates(updates=2, fed=2)
    check = judge(update=resting, rates=(0.0,))
    assert check.status == "unknown"
    assert "learning rate is 0" in check.reason


def test_without_an_optimizer_it_says_so(judge):
    """With the remedy where nothing changed; with what it may be where something did."""
    still = judge(steps=0, changed=frozenset())
    assert still.status == "unknown"
    assert "no torch.optim.Optimizer stepped in 2 calls" in still.reason
    assert "sync_gradients" in still.reason
    assert "an optimizer of another kind" in judge(steps=0).reason
    assert judge(None, steps=0).status == "fallback"


def test_dropout_in_compiled_code_takes_random_numbers_as_proof(seen, training):
    """A module that calls no hook was applied only if something random was drawn in compiled code."""
    run = training()

    def observed(**more):
        return adapter.judge_dropout(seen(model=run.model, **more), 0.05).observed

    assert observed(regions=1, drew_random=True) == 0.05
    assert observed(regions=1) == 0.0
    assert observed(drew_random=True) == 0.0
    reason = adapter.judge_dropout(seen(model=run.model), 0.05).reason
    assert "but not called" in reason
    assert "model.train()" not in reason


def test_dropout_is_that_of_every_call_with_gradients(seen, training):
    """One that drops in half of them is an exception; calls of an evaluation inside the step are none."""
    run = training()
    calls = called(run.model)
    assert adapter.judge_dropout(seen(model=run.model, adapter_calls=calls), 0.05).observed == 0.05
    first = next(iter(calls))
    silent = dataclasses.replace(calls[first][0], ran=dict.fromkeys(calls[first][0].ran, 0.0))
    half = seen(model=run.model, adapter_calls=calls | {first: [*calls[first], silent]})
    finding = adapter.judge_dropout(half, 0.05)
    assert (finding.satisfies, "p=0.05 in 1 of 2 calls only" in finding.reason) == (False, True)
    evaluated = dataclasses.replace(silent, with_gradients=False)
    sound = seen(model=run.model, adapter_calls=calls | {first: [evaluated, *calls[first]]})
    assert adapter.judge_dropout(sound, 0.05).satisfies is True


def test_a_remedy_for_idle_targets_is_given_where_nothing_else_is_wrong(seen, training):
    """A disabled adapter is not executed either, and there enabling it is the remedy."""
    run = training()
    assert "choose target_modules" in attached.judge_attached(seen(model=run.model), True).reason
    run.model.base_model.disable_adapter_layers()
    reason = attached.judge_attached(seen(model=run.model), True).reason
    assert "enable_adapter_layers()" in reason
    assert "choose target_modules" not in reason


@pytest.mark.parametrize(
    ("changes", "observed", "words"),
    [
        ({}, True, "executed in 4 layers"),
        ({"disabled": True}, False, "adapters disabled in 1 of 4 layers"),
        ({"merged": True}, False, "merged into the base in 1 of 4 layers"),
        ({"active": ()}, False, "no active adapter in 1 of 4 layers"),
        ({"ran": {}}, False, "adapter not executed in 1 of 4 layers"),
    ],
)
def test_a_layer_is_judged_by_its_calls(seen, training, changes, observed, words):
    """Whatever its flags are before and after."""
    run = training()
    calls = called(run.model)
    first = next(iter(calls))
    calls[first] = [dataclasses.replace(calls[first][0], **changes)]
    finding = attached.judge_attached(seen(model=run.model, adapter_calls=calls), True)
    assert finding.observed is observed
    assert words in finding.reason


def test_a_layer_that_skips_its_adapter_in_part_of_the_calls_is_unknown(seen, training):
    """The loss may rest on either; a reference without gradients is no such part."""
    run = training()
    calls = called(run.model)
    first = next(iter(calls))
    for with_gradients, status in ((True, "unknown"), (False, None)):
        skipped = dataclasses.replace(CALL, disabled=True, with_gradients=with_gradients)
        watched = seen(model=run.model, adapter_calls=calls | {first: [skipped, *calls[first]]})
        assert attached.judge_attached(watched, True).status == status


def test_a_gradient_is_no_proof_where_the_parts_of_other_layers_ran(seen, training):
    """A penalty on the weights gives one to a layer that was bypassed."""
    run = training()
    calls = called(run.model)
    first = next(iter(calls))
    calls[first] = [dataclasses.replace(CALL, ran={})]
    reached = frozenset(name for name, _ in adapter_layers(run.model)[0].weights())
    finding = attached.judge_attached(seen(model=run.model, adapter_calls=calls, reached=reached), True)
    assert finding.observed is False
    everything = frozenset(name for layer in adapter_layers(run.model) for name, _ in layer.weights())
    compiled = seen(model=run.model, regions=1, reached=everything)
    assert attached.judge_attached(compiled, True).observed is True


def test_a_lora_layer_is_known_by_what_it_holds():
    """A class of one's own, with an entry per adapter or without; factors without a wrapped layer are none."""
    for factor in (torch.nn.ModuleDict({"default": torch.nn.Linear(4, 2)}), torch.nn.Linear(4, 2)):
        holder = torch.nn.Module()
        holder.lora_A = factor
        bare = torch.nn.Sequential(holder)
        assert adapter_layers(bare) == []
        holder.base_layer = torch.nn.Linear(4, 4)
        (layer,) = adapter_layers(bare)
        assert layer.name == "0"
        assert len(layer.adapters) == 1
        assert len(dict(layer.weights())) == 2


def test_a_dtype_without_weights_says_that_there_is_no_adapter(seen, training):
    """One that is inactive has its dtype all the same, and is not attached."""
    assert "no layer carries an adapter" in adapter.judge_dtype(seen(model=BARE), None).reason
    run = training()
    for layer in adapter_layers(run.model):
        layer.module._active_adapter = []
    assert adapter.judge_dtype(seen(model=run.model), None).observed == "float32"
    reason = attached.judge_attached(seen(model=run.model), None).reason
    assert "no active adapter in 4 of 4 layers" in reason


def test_the_dtype_of_a_copy_is_told_apart(seen):
    """`modules_to_save` keeps the base's dtype, and is not what the adapter was asked to be in."""
    base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).bfloat16()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    finding = adapter.judge_dtype(seen(model=model), "float32")
    assert finding.observed == "float32"
    assert "copies trained beside it: 2 bfloat16" in finding.reason


def test_an_adapter_of_bare_parameters_needs_a_gradient(seen):
    """PEFT keeps those of an embedding so, and they call no hook: the layer's call alone is unknown."""
    base = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    (layer,) = adapter_layers(model)
    assert {name.rpartition(".lora_")[2] for name, _ in layer.weights()} == {
        "embedding_A.default",
        "embedding_B.default",
    }
    calls = {layer.name: [CALL]}
    assert attached.judge_attached(seen(model=model), True).observed is False
    assert attached.judge_attached(seen(model=model, adapter_calls=calls), True).status == "unknown"
    reached = frozenset({next(name for name, _ in layer.weights())})
    assert attached.judge_attached(seen(model=model, adapter_calls=calls, reached=reached), True).observed is True
    elsewhere = frozenset({"something.else"})
    assert attached.judge_attached(seen(model=model, adapter_calls=calls, reached=elsewhere), True).observed is False


def test_a_dropout_that_no_module_holds_is_unknown(seen):
    """LyCORIS draws inside the product; without one there is nothing to ask."""
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    for probability, status in ((0.1, "unknown"), (0.0, None)):
        configuration = peft.LoHaConfig(r=2, target_modules=["0"], rank_dropout=probability)
        finding = adapter.judge_dropout(seen(model=peft.get_peft_model(base, configuration)), 0.1)
        assert finding.status == status
    assert finding.against("lora.dropout", 0.1).status == "absent"
    assert "1 of 1 layers have no dropout" in finding.reason
    alone = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    assert adapter.judge_dtype(seen(model=alone), "float32").reason == "adapter weights: 2 float32"
