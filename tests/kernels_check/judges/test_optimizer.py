"""Tests that the optimizer is judged by its class, its operators and the device of its state.

Tests of trained embeddings and norms: they count if an optimizer changed them or PEFT's replacements of them.

Tests that the gradient of each loss decides whether all tokens of a step have the same weight.

Tests that the attention of a request is judged by its own operators, in the terms of the step's requirement.
"""

import dataclasses
from types import SimpleNamespace

import bitsandbytes as bnb
import peft
import pytest
import torch
from negative_controls.adapter_faults import return_log_probs, with_embeddings
from negative_controls.small_run import SmallRun, backward
from transformers import LlamaConfig, LlamaForCausalLM

import kernels_check
from kernels_check.judges.attention import judge_request
from kernels_check.judges.batch import judge_tokens
from kernels_check.judges.optimizer import is_class
from kernels_check.observe.loss import LossPass, LossRecord
from kernels_check.observe.operators import AttentionCall
from kernels_check.observe.profile import StepProfile
from kernels_check.step_watch import REQUEST

ADAMW = ("torch.optim.adamw.AdamW", "torch.optim.adam.Adam", "torch.optim.optimizer.Optimizer", "builtins.object")


@pytest.mark.parametrize(
    ("classes", "required", "matches"),
    [
        (ADAMW, "torch.optim.AdamW", True),
        (ADAMW, "torch.optim.adamw.AdamW", True),
        (("mine.Tuned", *ADAMW), "torch.optim.AdamW", True),
        (("mine.Tuned", *ADAMW), "mine.Tuned", True),
        (ADAMW, "torch.optim.Adam", False),
        (ADAMW, "bitsandbytes.optim.AdamW", False),
        (ADAMW, "AdamW", False),
        (("bitsandbytes.optim.adamw.AdamW", *ADAMW[2:]), "torch.optim.AdamW", False),
    ],
)
def test_the_most_derived_class_and_its_package_decide(classes, required, matches):
    """The package and the last component of the most derived class decide; AdamW does not match Adam although torch
    derives it from Adam."""
    assert is_class(classes, required) is matches


def test_the_observed_class_is_its_full_path(training):
    """The observed class is a full path, since bitsandbytes has a class of the same short name."""
    run = training(make_optimizer=lambda parameters: bnb.optim.PagedAdamW32bit(parameters, lr=1e-3))
    check = run.check("optimizer.class", "bitsandbytes.PagedAdamW32bit")
    assert check.met
    assert check.observed == "bitsandbytes.optim.adamw.PagedAdamW32bit"
    assert run.check("optimizer.class", "torch.optim.AdamW").status == "fallback"


def test_no_optimizer_is_absent(training):
    """A step that updates nothing has no optimizer to judge."""
    run = training()

    def step():
        run.model(**run.inputs, labels=run.inputs["input_ids"]).loss.backward()

    required = {"optimizer.class": "torch.optim.AdamW", "peft.learning": True}
    checks = {check.path: check for check in run.verify(required, step)}
    assert checks["optimizer.class"].status == "absent"
    check = checks["peft.learning"]
    assert check.status == "unknown"
    assert "no torch.optim.Optimizer stepped in 8 calls" in check.reason
    assert "current_gradient_accumulation_steps" in check.reason


def test_plain_sgd_is_recognised_by_the_parameters_it_writes(training):
    """Plain SGD has no operator of its own and is recognised by the parameters that it writes."""
    run = training(quant=None, make_optimizer=lambda given: torch.optim.SGD(given, lr=1e-3))
    check = run.check("optimizer.fused", False)
    assert (check.met, check.observed) == (True, "loop")


def test_an_update_without_an_optimizer_is_unknown(training):
    """An update by hand or by a foreign optimizer is neither known as fused nor as a loop."""
    run = training(quant=None)
    values = [value for value in run.model.parameters() if value.requires_grad]

    def step():
        run.gradients()
        with torch.no_grad():
            for value in values:
                value -= 0.1 * value.grad

    for path, required in {"optimizer.fused": False, "optimizer.class": "torch.optim.SGD"}.items():
        check = run.check(path, required, step)
        assert (check.status, check.observed) == ("unknown", None)
        assert "8 parameters changed" in check.reason


def _full_training_run(*, tied, rate=1e-3):
    """Return a run that trains all parameters of a model without an adapter, with tied or untied embeddings."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied))
    inputs = {"input_ids": torch.randint(1, 48, (2, 8))}
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    return SmallRun(model=model, optimizer=optimizer, inputs=inputs)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_share_a_weight_count_once(tied):
    """Tied embeddings count as one, also without an adapter."""
    check = _full_training_run(tied=tied).check("embedding.trained", True)
    assert check.met
    assert check.reason.startswith("1 of 1" if tied else "2 of 2")


def test_frozen_parts_are_not_trained(training):
    """LoRA trains neither embeddings nor norms; that meets a requirement of false and is not applicable without a
    requirement."""
    run = training()
    checks = {check.path: check for check in run.verify({"embedding.trained": False})}
    assert checks["embedding.trained"].met
    assert (checks["norms.trained"].status, checks["norms.trained"].observed) == ("not_applicable", False)
    assert "0 of 5 norms updated" in checks["norms.trained"].reason


def test_copies_that_train_count_for_the_modules_they_replace(training):
    """The replaced originals stay frozen by design."""
    run = training(adapter=with_embeddings)
    check = run.check("embedding.trained", True)
    assert check.met
    assert check.reason.startswith("2 of 2 embeddings updated")
    tuning = peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM")
    norms = training(quant=None, dtype="float32", adapter=lambda: tuning)
    assert norms.check("norms.trained").observed == "2 of 5"


def test_a_rate_of_zero_is_unknown():
    """A learning rate of zero and a step without an optimizer are unknown."""
    check = _full_training_run(tied=True, rate=0.0).check("embedding.trained", True)
    assert (check.status, check.observed) == ("unknown", None)
    assert "the learning rate is 0" in check.reason
    run = _full_training_run(tied=True)
    run.optimizer.step = lambda: None
    assert "no torch.optim.Optimizer stepped" in run.check("embedding.trained", False).reason


def _passes(*counts, weights=None, tolerance=1e-3, mean=True, sums=None):
    weights = weights or [1 / sum(counts)] * len(counts)
    made = zip(counts, weights, sums or [0] * len(counts), strict=True)
    passes = (LossPass(tokens=n, positions=64, weight=w, tolerance=tolerance, mean=mean, sum=s) for n, w, s in made)
    return SimpleNamespace(loss=LossRecord(passes=tuple(passes)))


@pytest.mark.parametrize(
    ("record", "observed", "words"),
    [
        (_passes(30), True, "the loss is over 30 of 64 tokens; in one pass"),
        (_passes(30, 10), True, "in 2 passes of 30, 10; all tokens have the same weight"),
        (_passes(30, 10, weights=[0.5 / 30, 0.5 / 10]), False, "3 times as much"),
        (_passes(30, 10, weights=[0.025, 0.0251]), False, "1 times as much"),
        (_passes(30, 10, weights=[0.025, 0.0251], tolerance=2e-2), True, "all tokens have the same weight"),
        (_passes(20, 20, weights=[1 / 20, 1 / 20]), False, "add up to 2"),
        (_passes(20, 20, weights=[1 / 20, 1 / 20], mean=False), True, "the weights sum to 2"),
        (_passes(20, 20, weights=[1024 / 40, 1024 / 40]), True, "all tokens have the same weight"),
        (_passes(30, 0, weights=[1 / 30, 0.0]), False, "1 of 2 passes have none"),
        (_passes(30, 10, weights=[0.0, 0.1]), False, "0.1, others 0"),
        (_passes(20, 20, weights=[1 / 20 * 1.0011] * 2), True, "all tokens have the same weight; the weights sum to 2"),
        (_passes(20, 20, weights=[1 / 20 * 1.0009] * 2), False, "add up to 2"),
        (_passes(30, 10, weights=[1 / 30, 1 / 10], sums=[0, 1]), True, "each in one pass"),
        (_passes(30, 10, 30, weights=[0.5 / 30, 0.5 / 10, 1 / 30], sums=[0, 0, 1]), False, "3 times as much"),
        (_passes(20, 20, 20, weights=[1 / 20, 1 / 40, 1 / 40], sums=[0, 1, 1]), True, "the weights sum to 1"),
    ],
)
def test_losses_are_judged_by_the_weights_of_their_passes(record, observed, words):
    """Equal weights are right whatever factor a scaler applies; a mean over no tokens is undefined."""
    finding = judge_tokens(record, True)
    assert finding.observed is observed
    assert words in finding.reason


def test_a_loss_computed_outside_the_model_is_unknown(training):
    """A loss computed from logits without labels, and a custom loss in place of the model's, are unknown."""
    run = training()

    def from_logits(run):
        logits = run.model(input_ids=run.inputs["input_ids"]).logits
        targets = run.inputs["input_ids"][:, 1:].flatten()
        return backward(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets))

    run.passes = from_logits
    assert "its loss is computed elsewhere" in run.check("loss.tokens", True).reason

    run.passes = lambda run: backward(
        run.model(**run.inputs, labels=run.inputs["input_ids"]).logits.float().square().mean()
    )
    check = run.check("loss.tokens", True)
    assert check.status == "unknown"
    assert "no gradient flowed through the loss" in check.reason
    assert run.check("loss.tokens").status == "not_applicable"


def test_a_pass_whose_gradients_are_cleared_makes_the_next_unknown(training):
    """The cleared pass may have had another purpose, or its gradients may be stored elsewhere until the update."""
    run = training()

    def passes(run):
        for _ in range(2):
            run.optimizer.zero_grad(set_to_none=False)
            loss = run.one_pass()
        return loss

    run.passes = passes
    check = run.check("loss.tokens", True)
    assert check.status == "unknown"
    assert "removed before the next" in check.reason


def test_two_losses_that_go_back_at_once_are_two_passes_of_one_sum(training):
    """This holds for any order of autograd."""
    run = training()

    def passes(run):
        return backward(sum(run.model(**run.inputs, labels=run.inputs["input_ids"]).loss for _ in range(2)) / 2)

    run.passes = passes
    check = run.check("loss.tokens", True)
    assert check.reason.endswith("in 2 passes of 30, 30; all tokens have the same weight; the weights sum to 1")


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({}, "active", "the loss is over 44 of 64 tokens, in 2 passes of 30, 14; all tokens have the same weight"),
        ({"counted": False}, "fallback", "a mean of means"),
        ({"weigh": lambda scores: scores.exp().detach()}, "unknown", "the loss weights tokens individually"),
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


FLASH = AttentionCall(op="aten::_scaled_dot_product_flash_attention", backend="flash", direction="forward", mask=False)
CUDNN = dataclasses.replace(FLASH, op="aten::_scaled_dot_product_cudnn_attention", backend="cudnn")
MATH = dataclasses.replace(FLASH, op="aten::_scaled_dot_product_attention_math", backend="math")
BACKWARD = dataclasses.replace(MATH, direction="backward")


@pytest.fixture
def judge():
    """A function that judges the calls or the kernels of a request."""

    def judged(required, *calls, kernels=None):
        profile = StepProfile(attention=calls, fourbit=(), kernels=kernels or {})
        return judge_request(torch.nn.Identity(), profile, required).against(REQUEST, required)

    return judged


@pytest.mark.parametrize(
    ("required", "calls", "status", "observed"),
    [
        ("fused", (FLASH, FLASH), "active", "flash"),
        ("fused", (CUDNN, FLASH), "active", "cudnn+flash"),
        ("flash", (CUDNN,), "active", "cudnn"),
        ("fused", (FLASH, MATH), "fallback", "flash+math"),
        ("flash_attention_2", (MATH,), "fallback", "math"),
        ("eager", (FLASH,), "fallback", "flash"),
        (None, (MATH, FLASH), "active", "flash+math"),
        ("fused", (FLASH, BACKWARD), "active", "flash"),
    ],
)  # fmt: skip
def test_any_fused_backend_meets_the_requirement_of_a_request(judge, required, calls, status, observed):
    """Any fused backend is accepted, also one other than the step's; every call of the request counts, and no other."""
    check = judge(required, *calls)
    assert (check.path, check.status, check.observed) == ("request.attention", status, observed)


@pytest.mark.parametrize(("attention", "observed"), [("sdpa", "flash"), ("eager", "eager")])
def test_a_real_request_is_watched(training, attention, observed):
    """Prefill and one decoding step each have one call in each layer."""
    run = training(attention=attention, quant=None)
    run.model.eval()
    requests = []

    @torch.no_grad()
    def request():
        requests.append(1)
        prompt = run.inputs["input_ids"][:1, :6]
        run.model.generate(input_ids=prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False)

    check = kernels_check.watch_request(run.model, request, observed)
    assert check.met, check.reason
    layers = run.model.config.num_hidden_layers
    assert check.reason.startswith(f"forward: {2 * layers} {observed}")
    assert len(requests) == 1
    other = "eager" if observed == "flash" else "fused"
    check = kernels_check.watch_request(run.model, request, other)
    assert (check.status, check.observed) == ("fallback", observed)
