"""Every comparison of what is judged of the adapter decides something."""

import dataclasses

import peft
import pytest
import torch

from kernels_check.judges import adapter, attached, learning
from kernels_check.observation.adapter_calls import LayerCall
from kernels_check.observation.adapter_layers import adapter_layers
from kernels_check.observation.adapter_updates import ParameterUpdates
from kernels_check.observation.calls import Calls
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


def test_dropout_in_evaluation_is_none_whether_it_was_called_or_not(seen, training):
    """Random numbers in compiled code are not those of a dropout that is off; one that ran as off was off then."""
    run = training()
    calls = called(run.model)
    off = {name: [dataclasses.replace(one, ran=dict.fromkeys(one.ran, 0.0)) for one in calls[name]] for name in calls}
    switched_back = adapter.judge_dropout(seen(model=run.model, adapter_calls=off, regions=1, drew_random=True), 0.05)
    run.model.eval()
    uncalled = adapter.judge_dropout(seen(model=run.model, regions=1, drew_random=True), 0.05)
    for finding in (switched_back, uncalled):
        assert (finding.observed, finding.satisfies) == (0.0, False)
        assert "p=0.05 but in eval mode" in finding.reason
        assert "call model.train() before the step" in finding.reason


def test_an_evaluation_is_no_training(seen, training):
    """Where an optimizer stepped, or another layer was called in training; an answer trains nothing and counts."""
    run = training()
    calls = called(run.model)
    evaluated = called(run.model, aside=True, with_gradients=False)
    first = next(iter(calls))

    def judge(calls, steps):
        return attached.judge_attached(seen(model=run.model, adapter_calls=calls, optimizer_steps=steps), True)

    for alone, steps, layers in ((evaluated, 1, 4), (calls | {first: evaluated[first]}, 0, 1)):
        finding = judge(alone, steps)
        assert finding.observed is False
        assert f"adapter executed in an evaluation only, which trains nothing, in {layers} of 4" in finding.reason
    assert judge(evaluated, 0).observed is True
    assert judge({name: [*evaluated[name], *calls[name]] for name in calls}, 1).observed is True


def test_where_another_models_optimizer_stepped_an_evaluation_is_no_training(seen, training):
    """It may hold copies of this model's weights."""
    run = training()
    evaluated = called(run.model, aside=True, with_gradients=False)
    watched = {"model": run.model, "adapter_calls": evaluated, "optimizer_steps": 0}
    assert attached.judge_attached(seen(**watched, other_optimizers=("mine.Masters",)), True).observed is False
    assert attached.judge_attached(seen(**watched), True).observed is True


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "unknown"),
        ({"optimizer_steps": 0}, "active"),
        ({"gradients": {"a": GOOD}}, "fallback"),
        ({"gradients": {}}, "fallback"),
        ({"adapter_calls": {"q_proj": []}}, "fallback"),
    ],
)
def test_gradients_put_there_by_hand_beside_evaluations_leave_it_unknown(seen, training, changes, status):
    """Zeroth-order training looks like this, and so does a copy that is trained; neither is an adapter not executed."""
    run = training()
    watched = {
        "model": run.model,
        "adapter_calls": called(run.model, aside=True, with_gradients=False),
        "gradients": {"a": GOOD, "b": dataclasses.replace(GOOD, produced=False)},
        "optimizer_steps": 1,
    }
    check = attached.judge_attached(seen(**watched | changes), True).against("lora.attached", True)
    assert check.status == status
    assert ("zeroth-order" in check.reason) is (status == "unknown")
    dropped = adapter.judge_dropout(seen(**watched | changes), 0.05).against("lora.dropout", 0.05)
    assert (dropped.status == "unknown") is (status == "unknown")
    assert (dropped.reason == attached.BY_HAND) is (status == "unknown")


def test_gradients_put_there_by_hand_are_no_doubt_beside_a_forward_that_records_some(seen, training):
    """Nor of a layer that none of the forwards ran."""
    run = training()
    by_hand = {"a": dataclasses.replace(GOOD, produced=False)}
    sound, evaluated = called(run.model), called(run.model, aside=True, with_gradients=False)
    watched = {"model": run.model, "gradients": by_hand, "optimizer_steps": 1}
    assert attached.judge_attached(seen(**watched, adapter_calls=sound), True).observed is True
    first = next(iter(evaluated))
    finding = attached.judge_attached(seen(**watched, adapter_calls=evaluated | {first: []}), True)
    assert (finding.observed, finding.status) == (False, None)
    assert finding.reason.startswith(f"adapter not executed in 1 of 4 layers: {first}")


def test_a_call_below_no_grad_in_training_counts_where_it_is_all_there_is(seen, training):
    """The layers under a part that needs no gradient ran all the same."""
    run = training()
    calls = called(run.model, with_gradients=False)
    assert attached.judge_attached(seen(model=run.model, adapter_calls=calls), True).observed is True


def test_the_adapters_that_are_merged_are_named(seen, training):
    """Beside their layer, where they are merged still; of one that was merged in the call only, the layer."""
    run = training()
    first = adapter_layers(run.model)[0]
    in_the_call = called(run.model) | {first.name: [dataclasses.replace(CALL, merged=True)]}
    reason = attached.judge_attached(seen(model=run.model, adapter_calls=in_the_call), True).reason
    assert f"1 of 4 layers: {first.name} (call unmerge_adapter())" in reason
    first.module.merged_adapters.append("default")
    reason = attached.judge_attached(seen(model=run.model), True).reason
    assert f"1 of 4 layers: {first.name} (default) (call unmerge_adapter())" in reason
    assert "(default)" not in reason.partition("adapter not executed")[2]


@pytest.mark.parametrize(
    ("unhooked", "regions", "observed"), [((), 0, False), (("model.layers",), 0, True), ((), 1, True)]
)
def test_a_gradient_is_proof_of_a_layer_that_compiled_code_may_have_run(seen, training, unhooked, regions, observed):
    """It calls no hook there; where it was called and skipped its parts, a penalty is the likelier cause."""
    run = training()
    calls = called(run.model)
    first = adapter_layers(run.model)[0]
    watched = {
        "model": run.model,
        "reached": frozenset(name for name, _ in first.weights()),
        "modules": Calls(unhooked=frozenset(unhooked)),
        "regions": regions,
    }
    silent = {name: calls[name] for name in calls if name != first.name}
    assert attached.judge_attached(seen(adapter_calls=silent, **watched), True).observed is observed
    bypassed = silent | {first.name: [dataclasses.replace(CALL, ran={})]}
    assert attached.judge_attached(seen(adapter_calls=bypassed, **watched), True).observed is False


def own_lora(base):
    """A LoRA layer of a class of one's own."""
    holder = torch.nn.Module()
    holder.lora_A, holder.base_layer = torch.nn.Linear(4, 2), base
    return holder


def test_a_gradient_is_proof_of_a_layer_inside_another(seen):
    """What wraps it may read its weights and never call it; of one beside the others it is none."""
    model = torch.nn.Sequential(own_lora(own_lora(torch.nn.Linear(4, 4))), own_lora(torch.nn.Linear(4, 4)))
    outer, inner, beside = adapter_layers(model)
    assert inner.name.startswith(f"{outer.name}.")
    reached = frozenset(name for layer in (outer, inner, beside) for name, _ in layer.weights())

    def judge(*ran):
        calls = {layer.name: [dataclasses.replace(CALL, ran={f"{layer.name}.lora_A": 0.0})] for layer in ran}
        return attached.judge_attached(seen(model=model, adapter_calls=calls, reached=reached), True)

    assert judge(outer, beside).observed is True
    idle = judge(outer)
    assert (idle.observed, f"in 1 of 3 layers: {beside.name}" in idle.reason) == (False, True)


def test_the_adapter_that_ran_is_named(seen, training):
    """By its name, unless its class gives it none."""
    run = training()
    finding = attached.judge_attached(seen(model=run.model, adapter_calls=called(run.model)), True)
    assert finding.reason == "adapter default enabled, unmerged and executed in 4 layers"
    model = torch.nn.Sequential(own_lora(torch.nn.Linear(4, 4)))
    finding = attached.judge_attached(seen(model=model, adapter_calls=called(model)), True)
    assert finding.reason == "adapter of a class of its own enabled, unmerged and executed in 1 layer"


def test_what_lora_fa_freezes_is_not_asked_to_learn(seen, training):
    """It is said of how many; the same without its optimizer is a fault, with the remedy, which no other fault has."""
    run = training()
    weights = dict(pair for layer in adapter_layers(run.model) for pair in layer.weights())
    frozen = [name for name in weights if "lora_A" in name]
    for name in frozen:
        weights[name].requires_grad_(False)
    learning_half = [name for name in weights if name not in frozen]

    def judge(kind, learnt=LEARNT):
        stepped = dataclasses.replace(ADAMW, classes=(kind,), parameters=frozenset(map(id, weights.values())))
        watched = {"gradients": dict.fromkeys(learning_half, GOOD), "updates": dict.fromkeys(learning_half, learnt)}
        return learning.judge_learning(seen(model=run.model, optimizers=(stepped,), **watched), True)

    lora_fa = "peft.optimizers.lorafa.LoraFAOptimizer"
    assert judge(lora_fa).observed is True
    assert judge(lora_fa).reason.startswith("gradients reached 4 of 8 trainable parameters and updates moved all")
    assert judge(lora_fa).reason.endswith("; 4 of 8 kept frozen by LoRA-FA")
    other = judge("torch.optim.adamw.AdamW")
    assert (other.observed, "4 of 8 parameters frozen: " in other.reason) == (False, True)
    assert "load the adapter with is_trainable=True" in other.reason
    unmoved = judge(lora_fa, dataclasses.replace(LEARNT, moved=0, learnt=0))
    assert (unmoved.observed, "is_trainable" in unmoved.reason) == (False, False)


def test_a_value_that_cannot_be_compared_is_unknown_and_no_fault(judge):
    """Nothing was counted of it, which is not that nothing moved."""
    check = judge(update=ParameterUpdates(updates=2, unreadable="RuntimeError: no memory", rate=1e-3))
    assert check.status == "unknown"
    assert check.reason.startswith("1 of 8 parameters not comparable with what they were before")
    assert ";" not in check.reason


def test_a_thousandth_of_the_highest_rate_is_comparable_still(judge):
    """A gradient too small to show is an excuse there, and below it the rate is the cause."""
    faint = {"updates": 2, "fed": 2, "faint": 1}
    assert judge(update=ParameterUpdates(**faint, rate=1e-3 * 1e-3)).status == "active"
    assert judge(update=ParameterUpdates(**faint, rate=0.99e-6)).status == "fallback"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stuck": 2, "learnt": 0, "moved": 0}, "they round away in float32"),
        ({"fed": 0, "learnt": 0, "moved": 0}, "gradient gone or zero when the update was to use it"),
    ],
)
def test_what_did_not_move_is_told_once_with_its_cause(judge, changes, words):
    """Not again as merely unchanged."""
    reason = judge(update=dataclasses.replace(LEARNT, **changes)).reason
    assert words in reason
    assert "unchanged by updates" not in reason


def test_where_only_an_optimizer_of_other_parameters_stepped_the_adapters_were_given_to_none(judge):
    """Which is a fault, as no update at all is none."""
    other = judge(steps=0, other_optimizers=("mine.Masters",))
    assert (other.status, other.reason.startswith("8 of 8 parameters not given to the optimizer")) == ("fallback", True)
    assert judge(steps=0).status == "unknown"
