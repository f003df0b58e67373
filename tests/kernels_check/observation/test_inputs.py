"""The calls of a model are kept as they were made, each once, by the names of its arguments."""

from contextlib import ExitStack
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels_check.controls.small_attention import SmallAttention, packed
from kernels_check.observation import inputs
from kernels_check.observation.inputs import InputLog, find_tokens, names_tokens, training_calls

BATCH = packed(3, 3)


class Outer(nn.Module):
    """Holds a model as wrappers do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def logged(model, step):
    log = InputLog()
    with ExitStack() as hooks:
        log.attach(model, hooks)
        step()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    return log.calls


def test_positional_arguments_get_the_names_of_what_takes_them():
    """Also where a wrapper passes on whatever it is given."""
    model = Outer(SmallAttention())
    (call,) = logged(model, lambda: model(BATCH["input_ids"], BATCH["position_ids"]))
    assert list(call.arguments) == ["input_ids", "position_ids"]
    assert [list(inner.arguments) for inner in call.inside] == [["input_ids", "position_ids"]]
    assert call.module is model


@pytest.mark.parametrize("answer", ["tuple", "dict", "attribute"])
def test_the_loss_that_a_model_returns_is_looked_into(answer):
    """First in a tuple, or by its name; numbers that are none are passed over."""

    class Scored(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Linear(4, 5)

        def forward(self, rows, labels):
            scores = self.scores(rows)
            loss = nn.functional.cross_entropy(scores, labels)
            if answer == "tuple":
                return loss, scores
            return {"loss": loss, "scores": scores} if answer == "dict" else Answer(scores, loss)

    model = Scored()

    def step():
        answered = model(torch.ones(3, 4), labels=torch.tensor([0, 1, -100]))
        loss = answered["loss"] if answer == "dict" else answered[answer != "tuple"]
        loss.backward()

    (call,) = logged(model, step)
    (loss,) = call.losses
    assert [int(part.tokens) for part in loss.parts] == [2]


class Answer(NamedTuple):
    """A tuple whose first is not the loss."""

    scores: torch.Tensor
    loss: torch.Tensor


def test_a_call_past_the_wrapper_is_kept():
    """By the module that was called."""
    model = Outer(SmallAttention())
    (call,) = logged(model, lambda: model.model(**BATCH))
    assert call.module is model.model


def test_what_a_backward_pass_computes_again_is_no_call():
    """Checkpointing calls the model twice for one batch."""
    model = SmallAttention()

    def step():
        checkpoint(
            lambda ids: model(ids, BATCH["position_ids"]).logits, BATCH["input_ids"], use_reentrant=False
        ).sum().backward()

    assert len(logged(model, step)) == 1


def test_a_call_that_raises_does_not_hide_those_after_it():
    """It has ended, however it ended."""
    model = SmallAttention()

    def step():
        with pytest.raises(AttributeError):
            model(BATCH["input_ids"])
        model(**BATCH)

    assert len(logged(model, step)) == 2


def test_the_state_of_a_call_is_kept():
    """Mode, gradients and autocast; training is what gradients were recorded for."""
    model = SmallAttention()

    def step():
        model(**BATCH)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            model.eval()(**BATCH)

    first, second = calls = logged(model, step)
    assert (first.training, first.gradients, first.autocast) == (True, True, ())
    assert (second.training, second.gradients, second.autocast) == (False, False, (("cpu", torch.bfloat16),))
    assert training_calls(calls) == [first]
    assert training_calls([second]) == [second]


def test_tokens_are_found_by_name_or_by_what_they_are():
    """Labels, masks and positions are none."""
    ids = BATCH["input_ids"]
    assert find_tokens({"words": ids})[0] == "words"
    assert find_tokens({"inputs_embeds": torch.ones(1, 6, 4)})[0] == "inputs_embeds"
    assert find_tokens({"labels": ids, "segment_ids": ids, "words": ids})[0] == "words"
    assert find_tokens({"labels": ids, "attention_mask": ids}) is None
    assert find_tokens({"input_ids": ids[0]}) is None


def test_tokens_go_by_the_names_of_transformers():
    """Either of them; anything else is a name of the model's own."""
    assert names_tokens({"input_ids": BATCH["input_ids"]})
    assert names_tokens({"inputs_embeds": torch.ones(1, 6, 4), "input_ids": None})
    assert not names_tokens({"words": BATCH["input_ids"]})


def test_a_compiled_forward_gets_no_hooks_inside():
    """They would be compiled with it."""
    model = Outer(SmallAttention())
    model.forward = torch.compile(model.forward, backend="eager")
    with ExitStack() as hooks:
        InputLog().attach(model, hooks)
        assert (len(model._forward_hooks), len(model.model._forward_hooks)) == (1, 0)


class Anything(nn.Module):
    """Takes what it is given."""

    def forward(self, **given):
        """Nothing is computed."""


@pytest.mark.parametrize(
    ("value", "copied"),
    [
        (torch.ones(2, 3), True),
        (torch.ones(6), True),
        (torch.ones(7), False),
        (torch.ones(1, 2, 3), False),
        (torch.ones(2, 3, requires_grad=True), False),
    ],
)
def test_what_tells_tokens_is_copied_as_it_was(monkeypatch, value, copied):
    """Small and of two dimensions; features and what gradients go to would take their memory twice."""
    monkeypatch.setattr(inputs, "_COPIED_ELEMENTS", 6)
    model = Anything()
    (call,) = logged(model, lambda: model(value=value))
    assert (call.arguments["value"] is not value) is copied
    assert torch.equal(call.arguments["value"], value)
