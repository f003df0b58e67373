"""Every comparison of what is judged of the adapter decides something."""

import dataclasses

import pytest

from kernels_check.judges import adapter, attached, learning
from kernels_check.observe.adapter import adapter_layers
from kernels_check.observe.learning import GradientSeen, ParameterUpdates
from kernels_check.observe.optimizer import OptimizerSeen
from kernels_check.observe.targets import LayerCall

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
        ({"stuck": 2, "learnt": 0, "moved": 0, "idle": 1}, "fallback", "round away in float32"),
        ({"stuck": 2, "learnt": 0, "moved": 0, "idle": 2}, "unknown", "the optimizer may be warming up"),
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
