"""Tests of several adapters on one base: each trial is bit-equal to the same trial alone."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch

from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building.build import SharedBase, base_digest
from lorameter.trial.data.tokens import prepare
from lorameter.trial.trial import Trial

SMALL = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 128,
    "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
"""A model of two layers; a third would add nothing to a test of states and random numbers."""
WORKLOAD = Workload(
    sequence_length=64, batch_size=1, train_sequences=16, held_out_records=8, held_out_sequences=2, prompt_tokens=8,
    new_tokens=4,
)  # fmt: skip
PROTOCOL = Protocol(warmup_steps_min=2, warmup_steps_max=2, turns=3, steps_per_turn=1, generate_warmup=0)
NF4 = LoraVariant(name="r8", r=8, quantization="nf4", lora_dropout=0.1, learning_rate=3e-3)
SWEEP = (
    NF4,
    dataclasses.replace(NF4, name="dropout", r=64, lora_dropout=0.5),
    dataclasses.replace(NF4, name="dora", use_dora=True, target_modules=("q_proj", "v_proj")),
)
CASES = {
    "nf4": {},
    "prepared": {"prepare_for_kbit": True, "autocast": "bfloat16"},
    "checkpointing": {"gradient_checkpointing": True},
    "plain": {"quantization": "none", "dtype": "float32"},
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """The workload on the small model and its token file, for all trials."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "config.json").write_text(json.dumps(SMALL))
    workload = dataclasses.replace(WORKLOAD, model=f"random:{folder}")
    return workload, prepare(workload, folder).path


def trial_on(shared, variant, tokens, interleaving="shared-base"):
    torch.set_num_threads(1)
    workload, path = tokens
    request = TrialRequest(
        trial=variant.name, variant=variant, role="variant", replicate=0, seed=1, workload=workload, protocol=PROTOCOL,
        interleaving=interleaving, measures=("steps", "requests"), device="cpu", threads=1,
        tokens_path=path, scratch="", log_path="",
    )  # fmt: skip
    return Trial(request, shared)


def losses_alone(variant, tokens, *, check):
    trial = trial_on(SharedBase(), variant, tokens, interleaving="replicates")
    fragments = [trial.run("build")]
    if check:
        fragments.append(trial.run("verify"))
    fragments += [trial.run("warm_up"), *(trial.run("turn", steps=1) for _ in range(3)), trial.run("finish_training")]
    return all_losses(fragments)


def all_losses(fragments):
    assert {fragment.status for fragment in fragments} == {"ok"}
    names = ("warmup_loss", "timed_loss", "remaining_loss")
    losses = [loss for fragment in fragments for name in names for loss in fragment.samples.get(name, ())]
    held_out = [fragment.values[key] for fragment in fragments for key in sorted(fragment.values) if "held" in key]
    return losses, held_out


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "prepared" else pytest.mark.selftest) for case in CASES]
)
def test_every_trial_is_bit_equal_to_the_same_trial_alone(case, tokens):
    """With three adapters in shuffled turns, training losses and held-out losses are bit-equal."""
    sweep = [dataclasses.replace(variant, **CASES[case]) for variant in SWEEP]
    shared, shuffler = SharedBase(), random.Random(3)
    trials = {variant.name: trial_on(shared, variant, tokens) for variant in sweep}
    fragments = {name: [] for name in trials}
    for command in ("build", "verify", "warm_up"):
        for name, trial in trials.items():
            fragments[name].append(trial.run(command))
    for _ in range(3):
        for name in shuffler.sample(list(trials), len(trials)):
            fragments[name].append(trials[name].run("turn", steps=1))
    for command in ("finish_training", "begin_generate", "request", "close"):
        for name, trial in trials.items():
            fragments[name].append(trial.run(command))
    assert shared.loads == 1
    alone = {variant.name: losses_alone(variant, tokens, check=variant.name == "dropout") for variant in sweep}
    assert {name: all_losses(taken) for name, taken in fragments.items()} == alone
    assert alone["r8"][0][2:] != alone["dropout"][0][2:]


def test_a_base_that_changed_makes_every_trial_on_it_invalid(tokens):
    """After a write to the base, no trial on it equals the trial alone."""
    shared = SharedBase()
    trials = [trial_on(shared, variant, tokens) for variant in SWEEP[:2]]
    for trial in trials:
        trial.run("build")
    model = trials[0]._built.trainee.model
    norm = next(parameter for name, parameter in model.named_parameters() if "norm" in name)
    before = base_digest(model)
    with torch.no_grad():
        norm[0] += 1
    assert base_digest(model) != before
    closed = [trial.run("close") for trial in trials]
    assert {fragment.status for fragment in closed} == {"invalid"}
    assert closed[0].failure.kind == "BaseChanged"
