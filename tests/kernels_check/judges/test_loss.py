"""The tokens of a step weigh the same where the gradient that reaches each loss says so."""

from types import SimpleNamespace

import pytest
import torch

from kernels_check.controls.of_the_loss import accumulate
from kernels_check.judges.loss import judge_tokens
from kernels_check.observation.loss_tokens import LossPass, LossSeen


@pytest.fixture
def instrument():
    """The spy is enough: hooks tell."""
    return "spy"


def _passes(*counts, weights=None, tolerance=1e-3, told=False):
    weights = weights or [1 / sum(counts)] * len(counts)
    made = zip(counts, weights, strict=True)
    passes = (LossPass(tokens=n, positions=64, weight=w, tolerance=tolerance, told=told) for n, w in made)
    return SimpleNamespace(loss=lambda: LossSeen(passes=tuple(passes)))


@pytest.mark.parametrize(
    ("seen", "observed", "words"),
    [
        (_passes(30), True, "the loss is over 30 of 64 tokens; in one pass"),
        (_passes(30, 10), True, "in 2 passes of 30, 10; each weighs the same"),
        (_passes(30, 10, weights=[0.5 / 30, 0.5 / 10]), False, "3 times as much"),
        (_passes(30, 10, weights=[0.025, 0.0251]), False, "1 times as much"),
        (_passes(30, 10, weights=[0.025, 0.0251], tolerance=2e-2), True, "each weighs the same"),
        (_passes(20, 20, weights=[1 / 20, 1 / 20]), False, "add up to 2"),
        (_passes(20, 20, weights=[1024 / 40, 1024 / 40]), True, "each weighs the same"),
        (_passes(30, 0, weights=[1 / 30, 0.0]), False, "1 of 2 passes have none"),
        (_passes(30, 0, weights=[1 / 30, 0.0], told=True), True, "each weighs the same"),
        (_passes(30, 10, weights=[0.0, 0.1]), False, "0.1, others 0"),
    ],
)
def test_what_weights_say(seen, observed, words):
    """Equal ones are right whatever a scaler multiplies them by; a mean over nothing is not a number."""
    finding = judge_tokens(seen, True)
    assert finding.observed is observed
    assert words in finding.reason


def test_one_pass_is_counted_after_the_shift(training):
    """Tokens that carry no label are left out, and so is the first of each row."""
    run = training()
    ids = run.inputs["input_ids"]
    run.inputs = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(16) < 6, -100)}
    check = run.check("loss.tokens", True)
    assert check.met
    assert check.reason == "the loss is over 20 of 32 tokens; in one pass"


def test_a_loss_that_is_made_elsewhere_is_unknown(training):
    """From logits, without labels; and one of the program's own beside the model's."""
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

    def beside(run):
        loss = run.model(**run.inputs, labels=run.inputs["input_ids"]).logits.float().square().mean()
        loss.backward()
        return loss

    run.passes = beside
    check = run.check("loss.tokens", True)
    assert check.status == "unknown"
    assert "nothing went back through the loss" in check.reason
    assert run.check("loss.tokens").status == "not_applicable"


def test_an_evaluation_inside_the_step_is_no_pass(training):
    """Only what was trained on counts."""
    run = training()
    accumulate(run, told=True)
    train = run.passes

    def passes(run):
        with torch.no_grad():
            run.model(**run.inputs, labels=run.inputs["input_ids"])
        return train(run)

    run.passes = passes
    assert "in 2 passes of 24, 8" in run.check("loss.tokens", True).reason


def test_a_loss_of_an_unknown_kind_is_not_counted(training):
    """Whether it shifts is not guessed."""
    run = training()
    inner = run.model.get_base_model()
    inner.loss_function = lambda logits, labels, vocab_size, **_: logits.float().square().mean()
    check = run.check("loss.tokens", True)
    assert check.status == "unknown"
    assert "<lambda>" in check.reason
