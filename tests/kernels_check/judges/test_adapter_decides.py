"""Every comparison of what is judged of the adapter decides something."""

import dataclasses

import pytest

from kernels_check.judges import attached, learning
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


def test_a_layer_that_skips_its_adapter_in_part_of_the_calls_is_unknown(seen, training):
    """The loss may rest on either; a reference without gradients is no such part."""
    run = training()
    calls = called(run.model)
    first = next(iter(calls))
    for with_gradients, status in ((True, "unknown"), (False, None)):
        skipped = dataclasses.replace(CALL, disabled=True, with_gradients=with_gradients)
        watched = seen(model=run.model, adapter_calls=calls | {first: [skipped, *calls[first]]})
        assert attached.judge_attached(watched, True).status == status
