"""The step's own packed calls are what is judged; a batch stands for them only if it is given the same."""

import pytest
import torch
from negative_controls.batch_controls import pack, pack_without_cache
from negative_controls.small_attention import SmallAttention, packed
from negative_controls.small_run import autocast

import kernels_check
from kernels_check.observation.inputs import ModelCall
from kernels_check.observation.packed_step import isolation_of_step


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


def test_every_mask_of_blocks_is_probed(training):
    """Each is made by hand, and one of them has lost a boundary."""
    run = training()
    numbers = torch.tensor([[0] * 6 + [1] * 10, [0] * 8 + [1] * 8])
    sound = (numbers[:, :, None] == numbers[:, None, :]).tril()[:, None]
    lost = torch.ones_like(sound).tril()
    positions = torch.tensor([[*range(6), *range(10)], [*range(8), *range(8)]])

    def step(*masks):
        run.optimizer.zero_grad()
        for mask in masks:
            given = {**run.inputs, "position_ids": positions, "attention_mask": mask, "use_cache": False}
            run.model(**given, labels=run.inputs["input_ids"]).loss.backward()
        run.optimizer.step()

    assert run.check("packing.isolated", True, lambda: step(sound, sound)).met
    assert run.check("packing.isolated", True, lambda: step(sound, lost)).status == "fallback"


def test_positional_arguments_and_a_way_round_the_wrapper(training):
    """The model inside is called, by position; its call is found and made again."""
    run = training()
    pack_without_cache(run)
    run.packed = None
    inner = run.model.get_base_model()

    def step(**more):
        run.optimizer.zero_grad()
        given = run.inputs
        inner(given["input_ids"], None, given["position_ids"], labels=given["input_ids"], **more).loss.backward()
        run.optimizer.step()

    assert run.check("packing.isolated", True, lambda: step(use_cache=False)).met
    assert run.check("packing.isolated", True, step).status == "fallback"


class _Wrapper(torch.nn.Module):
    """Calls its inputs what it likes, and returns the loss alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, words, places=None, position_ids=None, **more):
        positions = places if position_ids is None else position_ids
        return self.model(input_ids=words, position_ids=positions, labels=words, **more).loss


@pytest.mark.parametrize("name", ["places", "position_ids"])
def test_a_wrapper_with_names_of_its_own_is_looked_into(training, name):
    """What it calls tells tokens and positions, and returns what can be compared."""
    run = training(quant=None)
    pack_without_cache(run)
    wrapper = _Wrapper(run.model)

    def step(**more):
        run.optimizer.zero_grad()
        wrapper(run.inputs["input_ids"], **{name: run.inputs["position_ids"]}, **more).backward()
        run.optimizer.step()

    def judged(**more):
        checks = kernels_check.verify(wrapper, lambda: step(**more), {"packing.isolated": True, "padding.share": 0.1})
        return {check.path: check.status for check in checks}

    assert judged(use_cache=False)["packing.isolated"] == "active"
    assert judged(use_cache=False)["padding.share"] == "active"
    assert judged(use_cache=True)["packing.isolated"] == "fallback"


def test_the_autocast_of_the_step_is_that_of_the_probe(training, monkeypatch):
    """What runs in another precision may run by another path."""
    run = training(quant=None, dtype="float32")
    pack_without_cache(run)
    run.around = autocast
    seen = []
    run.model.get_base_model().lm_head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    assert run.check("packing.isolated", True).met
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    kernels_check.probe_isolation(run.model, run.packed)
    assert set(seen) == {torch.float32}


def test_no_call_seen_is_unknown():
    """What a model compiled in place is given was not seen."""
    seen = isolation_of_step(SmallAttention(), [])
    assert (seen.packed, "pass batch=" in seen.unclear) == (False, True)


def test_positions_that_do_not_fit_are_named():
    """By both shapes."""
    model = SmallAttention()
    call = ModelCall(module=model, arguments=packed(4, 4) | {"position_ids": torch.arange(5)})
    assert "position_ids of [5] does not fit" in isolation_of_step(model, [call]).unclear
