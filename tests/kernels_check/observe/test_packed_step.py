"""The step's own packed calls are what is judged; a batch stands for them only if it is given the same."""

import pytest
import torch
from negative_controls.batch_controls import pack, pack_without_cache
from negative_controls.loss_controls import return_log_probs


@pytest.fixture
def instrument():
    """The probe's forwards are left to the profile."""
    return "profile"


def test_the_steps_own_call_is_judged_without_a_batch(training):
    """As it was made, in the mode in which it was made."""
    run = training()
    pack_without_cache(run)
    run.packed = None
    check = run.check("packing.isolated", True)
    assert check.met
    assert check.reason.endswith("4 records: perturbations changed no other logit, in train")
    pack(run, use_cache=None)
    run.packed = None
    check = run.check("packing.isolated", True)
    assert check.status == "fallback"
    assert "the step's own call, train: changing the first record" in check.reason


def test_a_model_that_returns_log_probabilities_is_judged_below_its_head(training):
    """One token less is returned, as by TRL's SFTTrainer: the hidden states tell."""
    run = training()
    pack_without_cache(run)
    run.packed = None
    return_log_probs(run)
    check = run.check("packing.isolated", True)
    assert check.met, check.reason
    pack(run, use_cache=None)
    run.packed = None
    check = run.check("packing.isolated", True)
    assert check.status == "fallback"
    assert "changing the first record" in check.reason


@pytest.mark.parametrize(
    "more", [{"use_cache": True}, {"use_cache": None}, {"attention_mask": torch.ones(2, 16, dtype=torch.long)}]
)
def test_a_batch_does_not_stand_for_another_call(training, more):
    """The batch is isolated, and what the step passes is not."""
    run = training()
    pack_without_cache(run)
    sound = dict(run.packed)
    assert run.check("packing.isolated", True).met
    run.inputs |= more
    run.packed = sound
    check = run.check("packing.isolated", True)
    assert check.status == "fallback"
    assert "the step's own call, train: changing the first record" in check.reason
    assert "eval" not in check.reason


def test_a_step_that_passes_no_positions_is_judged_by_the_batch_of_the_same_tokens(training):
    """The batch tells where its records lie."""
    run = training()
    inputs = dict(run.inputs)
    pack_without_cache(run)
    run.inputs = inputs
    check = run.check("packing.isolated", True)
    assert check.status == "fallback"
    assert "the step's own call" in check.reason
    run.inputs = {"input_ids": inputs["input_ids"].flip(0)}
    check = run.check("packing.isolated", True)
    assert check.status == "unknown"
    assert "position_ids is not given in the step and a tensor of 2 dimensions in batch" in check.reason
    assert "use_cache is not given in the step and False in batch" in check.reason


def test_a_step_whose_rows_happen_to_hold_one_record_each(training):
    """It is called as the batch is, which is packed."""
    run = training()
    pack_without_cache(run)
    ids = run.inputs["input_ids"].flip(0)
    run.inputs = {**run.inputs, "input_ids": ids, "position_ids": torch.arange(16).repeat(2, 1)}
    check = run.check("packing.isolated", True)
    assert check.met
    assert "the step's own rows held a record each" in check.reason
    run.packed = None
    check = run.check("packing.isolated", True)
    assert check.status == "unknown"
    assert "no call of the step tells of two records in a row" in check.reason


def test_nothing_is_probed_that_nobody_asked_for(training):
    """Neither a batch nor a requirement: forwards cost."""
    run = training()
    pack_without_cache(run)
    run.packed = None
    assert "packing.isolated" not in [check.path for check in run.verify({})]


def test_every_call_of_the_step_counts(training):
    """The second of two accumulated batches is given a cache."""
    run = training()
    pack_without_cache(run)

    def step(*ways):
        run.optimizer.zero_grad()
        for way in ways:
            run.model(**run.inputs | way, labels=run.inputs["input_ids"]).loss.backward()
        run.optimizer.step()

    sound = run.check("packing.isolated", True, lambda: step({}, {}))
    assert sound.met
    assert "1 of 2 calls of the step were probed, the others pack nothing or are called alike" in sound.reason
    assert run.check("packing.isolated", True, lambda: step({}, {"use_cache": True})).status == "fallback"

    def evaluates():
        step({})
        with torch.no_grad():
            run.model(**run.inputs | {"use_cache": True})

    assert run.check("packing.isolated", True, evaluates).met
