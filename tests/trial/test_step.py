"""Training and evaluation as they really are: real layers, real quantisation, the traps of this CPU included."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from kernels_check import probe_isolation
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building.build import SharedBase, build, seed_everything
from lorameter.trial.building.peft_methods import attach
from lorameter.trial.building.quantising import evaluating, unpack_4bit
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.data.tokens import prepare
from lorameter.trial.serving.generate import generate
from lorameter.trial.step import TrainStep, model_inputs

WORKLOAD = Workload(
    sequence_length=64, batch_size=2, train_sequences=16, held_out_records=8, held_out_sequences=4, prompt_tokens=8
)  # fmt: skip
NF4 = LoraVariant(name="nf4", r=8, quantization="nf4", lora_dropout=0.1, learning_rate=3e-3)
PLAIN = LoraVariant(name="plain", r=8, dtype="float32", learning_rate=3e-3)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Token files by layout."""
    folder = tmp_path_factory.mktemp("tokens")
    packed = prepare(WORKLOAD, folder).path
    padded = prepare(dataclasses.replace(WORKLOAD, layout="padded", sequence_length=512), folder).path
    joined = prepare(dataclasses.replace(WORKLOAD, layout="joined"), folder).path
    return {"packed": packed, "padded": padded, "joined": joined}


def setting(variant, tokens, layout="packed"):
    workload = dataclasses.replace(WORKLOAD, layout=layout)
    request = TrialRequest(
        trial="t", variant=variant, role="variant", replicate=0, seed=1, workload=workload, protocol=Protocol(),
        interleaving="replicates", measures=("steps",), device="cpu", threads=1, tokens_path=tokens[layout], scratch="",
        log_path="",
    )  # fmt: skip
    torch.set_num_threads(1)
    trainee = build(request, steps=10, shared=SharedBase())
    stream = TokenStream(Path(tokens[layout]), workload, variant, "cpu")
    return trainee, stream, TrainStep(trainee, stream, variant, "cpu")


def lora_b(model):
    return [p for name, p in model.named_parameters() if "lora_B" in name]


@pytest.mark.parametrize("variant", [NF4, PLAIN], ids=["nf4", "plain"])
def test_a_step_is_what_a_bare_loop_does(variant, tokens):
    """Losses and adapter are bit-equal to those of a loop written out by hand."""
    trainee, stream, step = setting(variant, tokens)
    losses = [float(step()) for _ in range(3)]

    other, batches, _ = setting(variant, tokens)
    by_hand = []
    for _ in range(3):
        loss = other.model(**batches.take(), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in other.model.parameters() if p.requires_grad], 1.0)
        other.optimizer.step()
        other.optimizer.zero_grad()
        by_hand.append(float(loss.detach()))
    assert losses == by_hand
    for ours, theirs in zip(lora_b(trainee.model), lora_b(other.model), strict=True):
        assert torch.equal(ours, theirs)
    assert stream.real_tokens == 3 * 2 * 64


def test_gradient_accumulation_takes_that_many_batches(tokens):
    """One step over two batches consumes both and has their mean loss."""
    trainee, stream, step = setting(dataclasses.replace(PLAIN, gradient_accumulation=2), tokens)
    with evaluating(trainee.model):
        each = [float(step.loss(stream.take())) for _ in range(2)]
    stream.restore((0, 0, 0))
    assert float(step()) == pytest.approx(sum(each) / 2, rel=1e-5)
    assert stream.real_tokens == 2 * 2 * 64


def test_training_goes_on_learning_after_an_evaluation(tokens):
    """On a CPU that repacks 4-bit weights in eval, the held-out loss leaves training and the base as they were."""
    trainee, _, step = setting(NF4, tokens)
    step()
    weight = next(p for p in trainee.model.parameters() if p.dtype == torch.uint8)
    stored = weight.clone()
    first = step.held_out_loss()
    assert torch.equal(weight, stored)
    before = [p.clone() for p in lora_b(trainee.model)]
    for _ in range(8):
        step()
    assert all(not torch.equal(old, new) for old, new in zip(before, lora_b(trainee.model), strict=True))
    assert step.held_out_loss() < first


def test_an_evaluation_moves_nothing_that_training_uses(tokens):
    """Modes, RNG and optimizer are as before; two evaluations agree, so dropout is off."""
    trainee, _, step = setting(NF4, tokens)
    step()
    modes = {name: module.training for name, module in trainee.model.named_modules()}
    random_state = torch.get_rng_state()
    assert step.held_out_loss() == step.held_out_loss()
    assert torch.equal(random_state, torch.get_rng_state())
    assert modes == {name: module.training for name, module in trainee.model.named_modules()}
    assert any(modes.values())


def logits(model, prompt):
    with torch.no_grad():
        return model(prompt, use_cache=False).logits.float().flatten()


def cosine(left, right):
    return float(torch.nn.functional.cosine_similarity(left, right, dim=0))


@pytest.mark.parametrize("double_quant", [True, False])
def test_merged_and_unmerged_logits_agree(tokens, double_quant):
    """After a packed 4-bit evaluation, unpacking first keeps the merged adapter right."""
    trainee, stream, step = setting(dataclasses.replace(NF4, double_quant=double_quant), tokens)
    for _ in range(6):
        step()
    trainee.model.eval()
    prompt = stream.prompts(0)
    unmerged = logits(trainee.model, prompt)
    unpack_4bit(trainee.model)
    trainee.model.merge_adapter()
    assert cosine(unmerged, logits(trainee.model, prompt)) > 0.98


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_records_are_isolated_in_training_and_evaluation(tokens, attention):
    """The perturbation probe: changing one record changes no logit of another, in both modes."""
    trainee, stream, _ = setting(dataclasses.replace(NF4, attention=attention), tokens)
    check = probe_isolation(trainee.model, model_inputs(stream.packed_batch()))
    assert check.met, check.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"target_modules": ()},
        {"optimizer": "paged_adamw_8bit"},
        {"gradient_checkpointing": True},
        {"autocast": "bfloat16"},
        {"schedule": "cosine", "warmup_ratio": 0.2},
        {"quantization": "nf4", "prepare_for_kbit": True, "autocast": "bfloat16", "gradient_checkpointing": True},
    ],
    ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items()),
)
def test_every_kind_of_variant_takes_steps(tokens, changes):
    """Whatever a variant can say, it trains: finite losses and an adapter that moves."""
    trainee, _, step = setting(dataclasses.replace(PLAIN, dtype="bfloat16", **changes), tokens)
    before = [p.clone() for p in lora_b(trainee.model)]
    losses = [float(step()) for _ in range(2)]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert any(not torch.equal(old, new) for old, new in zip(before, lora_b(trainee.model), strict=True))


def test_generation_gives_the_asked_number_of_tokens_whatever_eos_is(tokens):
    """Fixed length although the model's own next token is made its end, and each time stamp is a part of the whole."""
    trainee, stream, _ = setting(PLAIN, tokens)
    trainee.model.eval()
    first = generate(trainee.model, stream.prompts(0), 2).tokens[0]
    trainee.model.generation_config.eos_token_id = first
    ended = trainee.model.generate(input_ids=stream.prompts(0), max_new_tokens=5, do_sample=False)
    assert ended.shape[1] == stream.prompts(0).shape[1] + 1
    request = generate(trainee.model, stream.prompts(0), 5)
    assert len(request.tokens) == 5
    assert trainee.model.generation_config.eos_token_id == first
    assert 0 < request.first_token_time_s < request.request_time_s
    decode = request.time_per_output_token_s * 4
    assert request.first_token_time_s + decode <= request.request_time_s


def test_the_seed_fixes_the_adapter():
    """Equal seeds give equal adapters on equal bases; another seed another one."""
    from lorameter.models import catalogue
    from lorameter.trial.building.base_model import load_base

    def factors(seed):
        base = load_base(catalogue.resolve("tiny-llama"), PLAIN, device="cpu", seed=0)
        seed_everything(seed)
        return [p.clone() for n, p in attach(base, PLAIN).named_parameters() if "lora_A" in n]

    one, again, other = factors(1), factors(1), factors(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
