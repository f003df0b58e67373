"""Tests that the gradient of each loss decides whether all tokens of a step have the same weight."""

from types import SimpleNamespace

import pytest
import torch
from negative_controls.loss_faults import return_log_probs

from kernels_check.judges.batch import judge_tokens
from kernels_check.observe.loss import LossPass, LossSeen


def _passes(*counts, weights=None, tolerance=1e-3, mean=True, sums=None):
    weights = weights or [1 / sum(counts)] * len(counts)
    made = zip(counts, weights, sums or [0] * len(counts), strict=True)
    passes = (LossPass(tokens=n, positions=64, weight=w, tolerance=tolerance, mean=mean, sum=s) for n, w, s in made)
    return SimpleNamespace(loss=LossSeen(passes=tuple(passes)))


@pytest.mark.parametrize(
    ("seen", "observed", "words"),
    [
        (_passes(30), True, "the loss is over 30 of 64 tokens; in one pass"),
        (_passes(30, 10), True, "in 2 passes of 30, 10; each weighs the same"),
        (_passes(30, 10, weights=[0.5 / 30, 0.5 / 10]), False, "3 times as much"),
        (_passes(30, 10, weights=[0.025, 0.0251]), False, "1 times as much"),
        (_passes(30, 10, weights=[0.025, 0.0251], tolerance=2e-2), True, "each weighs the same"),
        (_passes(20, 20, weights=[1 / 20, 1 / 20]), False, "add up to 2"),
        (_passes(20, 20, weights=[1 / 20, 1 / 20], mean=False), True, "all together 2"),
        (_passes(20, 20, weights=[1024 / 40, 1024 / 40]), True, "each weighs the same"),
        (_passes(30, 0, weights=[1 / 30, 0.0]), False, "1 of 2 passes have none"),
        (_passes(30, 10, weights=[0.0, 0.1]), False, "0.1, others 0"),
        (_passes(20, 20, weights=[1 / 20 * 1.0011] * 2), True, "each weighs the same, and all together 2"),
        (_passes(20, 20, weights=[1 / 20 * 1.0009] * 2), False, "add up to 2"),
        (_passes(30, 10, weights=[1 / 30, 1 / 10], sums=[0, 1]), True, "each in one pass"),
        (_passes(30, 10, 30, weights=[0.5 / 30, 0.5 / 10, 1 / 30], sums=[0, 0, 1]), False, "3 times as much"),
        (_passes(20, 20, 20, weights=[1 / 20, 1 / 40, 1 / 40], sums=[0, 1, 1]), True, "all together 1"),
    ],
)
def test_losses_are_judged_by_the_weights_of_their_passes(seen, observed, words):
    """Equal weights are right whatever factor a scaler applies; a mean over no tokens is undefined."""
    finding = judge_tokens(seen, True)
    assert finding.observed is observed
    assert words in finding.reason


def test_a_loss_computed_outside_the_model_is_unknown(training):
    """A loss computed from logits without labels, and a custom loss in place of the model's, are unknown."""
    run = training()

    def from_logits(run):
        logits = run.model(input_ids=run.inputs["input_ids"]).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), run.inputs["input_ids"][:, 1:].flatten()
        )
        loss.backward()
        return loss

    run.passes = from_logits
    assert "its loss is made elsewhere" in run.check("loss.tokens", True).reason

    def own_loss(run):
        loss = run.model(**run.inputs, labels=run.inputs["input_ids"]).logits.float().square().mean()
        loss.backward()
        return loss

    run.passes = own_loss
    check = run.check("loss.tokens", True)
    assert check.status == "unknown"
    assert "nothing went back through the loss" in check.reason
    assert run.check("loss.tokens").status == "not_applicable"


def test_a_pass_whose_gradients_are_cleared_leaves_the_next_in_doubt(training):
    """The cleared pass may have had another purpose, or its gradients may be stored elsewhere until the update."""
    run = training()

    def passes(run):
        for _ in range(2):
            run.optimizer.zero_grad(set_to_none=False)
            loss = run.model(**run.inputs, labels=run.inputs["input_ids"]).loss
            loss.backward()
        return loss

    run.passes = passes
    check = run.check("loss.tokens", True)
    assert check.status == "unknown"
    assert "gone before the next" in check.reason


def test_two_losses_that_go_back_at_once_are_two_passes_of_one_sum(training):
    """This holds for any order of autograd."""
    run = training()

    def passes(run):
        losses = [run.model(**run.inputs, labels=run.inputs["input_ids"]).loss for _ in range(2)]
        loss = sum(losses) / 2
        loss.backward()
        return loss

    run.passes = passes
    check = run.check("loss.tokens", True)
    assert check.reason.endswith("in 2 passes of 30, 30; each weighs the same, and all together 1")


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({}, "active", "the loss is over 44 of 64 tokens, in 2 passes of 30, 14; each weighs the same, and all"),
        ({"counted": False}, "fallback", "a mean of means"),
        ({"weigh": lambda scores: scores.exp().detach()}, "unknown", "the loss weighs each token by itself"),
    ],
)
def test_a_loss_of_log_probabilities_is_judged_by_their_gradients(training, options, status, words):
    """In TRL's SFTTrainer the model returns one token less and no loss for training."""
    run = training()
    ids = run.inputs["input_ids"]
    run.accumulated = [dict(run.inputs)]
    run.inputs = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(16) < 9, -100)}
    return_log_probs(run, **options)
    check = run.check("loss.tokens", True)
    assert check.status == status, check.reason
    assert words in check.reason
