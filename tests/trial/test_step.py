"""Tests of training steps and evaluations of real quantised models.

Tests of step and request times of a whole model, estimated from two of its layers.

Tests of the stopwatch and of the resident bytes of a step.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from lorameter.machine.host import PeakMemoryTracker, host_bytes
from lorameter.models import catalogue
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building.base_model import evaluation_mode
from lorameter.trial.building.build import SharedBase, build
from lorameter.trial.building.quantizers import unpack_4bit
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.data.tokens import prepare
from lorameter.trial.memory import resident_bytes
from lorameter.trial.process import Stopwatch
from lorameter.trial.serving.server import generate
from lorameter.trial.step import TrainStep
from lorameter.trial.step_times import LAYERS, shorten_config, time_parts

WORKLOAD = Workload(
    sequence_length=64, batch_size=2, train_sequences=16, held_out_records=8, held_out_sequences=4, prompt_tokens=8
)  # fmt: skip
NF4 = LoraVariant(name="nf4", r=8, quantization="nf4", lora_dropout=0.1, learning_rate=3e-3)
PLAIN = LoraVariant(name="plain", r=8, dtype="float32", learning_rate=3e-3)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """The path of a file of tokens."""
    return prepare(WORKLOAD, tmp_path_factory.mktemp("tokens")).path


def build_step(variant, tokens):
    """Build a trainee of the variant; return it, its stream of batches and its training step."""
    request = TrialRequest(
        trial="t", variant=variant, role="variant", replicate=0, seed=1, workload=WORKLOAD, protocol=Protocol(),
        interleaving="replicates", measures=("steps",), device="cpu", threads=1, tokens_path=tokens, scratch="",
        log_path="",
    )  # fmt: skip
    torch.set_num_threads(1)
    trainee = build(request, steps=10, shared=SharedBase())
    stream = TokenStream(Path(tokens), WORKLOAD, variant, "cpu")
    return trainee, stream, TrainStep(trainee, stream, variant, "cpu")


def lora_b(model):
    return [p for name, p in model.named_parameters() if "lora_B" in name]


def test_a_step_equals_a_plain_loop(tokens):
    """Losses and adapter are bit-equal to those of a plain training loop."""
    trainee, stream, step = build_step(NF4, tokens)
    losses = [float(step()) for _ in range(2)]

    other, batches, _ = build_step(NF4, tokens)
    plain_losses = []
    for _ in range(2):
        loss = other.model(**batches.take(), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in other.model.parameters() if p.requires_grad], 1.0)
        other.optimizer.step()
        other.optimizer.zero_grad()
        plain_losses.append(float(loss.detach()))
    assert losses == plain_losses
    for measured, expected in zip(lora_b(trainee.model), lora_b(other.model), strict=True):
        assert torch.equal(measured, expected)
    assert stream.real_tokens == 2 * 2 * 64


def test_accumulation_of_two_takes_two_batches(tokens):
    """With accumulation of two, a step consumes two batches and reports their mean loss."""
    trainee, stream, step = build_step(dataclasses.replace(PLAIN, gradient_accumulation=2), tokens)
    with evaluation_mode(trainee.model):
        batch_losses = [float(step.loss(stream.take())) for _ in range(2)]
    stream.restore((0, 0, 0))
    assert float(step()) == pytest.approx(sum(batch_losses) / 2, rel=1e-5)
    assert stream.real_tokens == 2 * 2 * 64


def test_an_evaluation_changes_nothing_that_training_uses(tokens):
    """An evaluation leaves weights, modes and random state unchanged, also on a CPU that repacks 4-bit weights in eval
    mode; two evaluations agree, and training continues."""
    trainee, _, step = build_step(NF4, tokens)
    step()
    weight = next(p for p in trainee.model.parameters() if p.dtype == torch.uint8)
    stored, random_state = weight.clone(), torch.get_rng_state()
    modes = {name: module.training for name, module in trainee.model.named_modules()}
    first = step.held_out_loss()
    assert step.held_out_loss() == first
    assert torch.equal(weight, stored)
    assert torch.equal(random_state, torch.get_rng_state())
    assert modes == {name: module.training for name, module in trainee.model.named_modules()}
    before = [p.clone() for p in lora_b(trainee.model)]
    for _ in range(4):
        step()
    assert all(not torch.equal(old, new) for old, new in zip(before, lora_b(trainee.model), strict=True))
    assert step.held_out_loss() < first


def test_merged_and_unmerged_logits_agree(tokens):
    """After a packed 4-bit evaluation the weights are unpacked before the merge, so that the logits agree."""
    trainee, stream, step = build_step(dataclasses.replace(NF4, double_quant=False), tokens)
    for _ in range(6):
        step()
    trainee.model.eval()
    prompt = stream.prompts(0)
    with torch.no_grad():
        unmerged = trainee.model(prompt, use_cache=False).logits.float().flatten()
        unpack_4bit(trainee.model)
        trainee.model.merge_adapter()
        merged = trainee.model(prompt, use_cache=False).logits.float().flatten()
    assert torch.nn.functional.cosine_similarity(unmerged, merged, dim=0) > 0.98


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True, "bias": "lora_only", "target_modules": (), "autocast": "bfloat16"},
        {"optimizer": "paged_adamw_8bit", "schedule": "cosine", "warmup_ratio": 0.2},
        {"quantization": "nf4", "prepare_for_kbit": True, "autocast": "bfloat16", "gradient_checkpointing": True},
    ],
    ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items()),
)
def test_every_kind_of_variant_takes_steps(tokens, changes):
    """Each kind of variant has finite losses and an adapter that changes."""
    trainee, _, step = build_step(dataclasses.replace(PLAIN, dtype="bfloat16", **changes), tokens)
    before = [p.clone() for p in lora_b(trainee.model)]
    losses = [float(step()) for _ in range(2)]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert any(not torch.equal(old, new) for old, new in zip(before, lora_b(trainee.model), strict=True))


def test_generation_gives_the_requested_number_of_tokens(tokens):
    """Generation ignores the EOS token; time to first token and decoding time together do not exceed the total."""
    trainee, stream, _ = build_step(PLAIN, tokens)
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


def measure_times(folder, layers):
    """Return the times of a variant on the small model with the given number of layers."""
    config = json.loads(catalogue.CATALOGUE["tiny-llama"].config.read_text()) | {"num_hidden_layers": layers}
    for name in ("model", "scratch"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(config))
    workload = Workload(model=f"random:{folder / 'model'}", sequence_length=32, batch_size=2, new_tokens=4)
    request = TrialRequest(
        trial="t", variant=LoraVariant(name="one", r=4, quantization="nf4", gradient_checkpointing=True),
        role="variant", replicate=0, seed=1, workload=workload, protocol=Protocol(), interleaving="replicates",
        measures=("steps",), device="cpu", threads=1, tokens_path="", scratch=str(folder / "scratch"), log_path="",
    )  # fmt: skip
    return time_parts(request).values


def test_times_grow_with_the_number_of_layers(tmp_path):
    """Step, evaluation and request of 60 layers take several times as long as with two."""
    few, many = (measure_times(tmp_path, layers) for layers in (LAYERS, 60))
    assert few.keys() == many.keys() == {"load", "step", "evaluate", "request"}
    for part in ("step", "evaluate", "request"):
        assert many[part] > 4 * few[part] > 0, part


def test_a_shortened_configuration_lists_two_layers():
    """Lists of layers are shortened under any key, nested or not; other lists stay."""
    config = {"n_layer": 4, "layer_types": ["a", "b", "a", "b"], "architectures": ["Some"], "vocab_size": 7}
    short = {"n_layer": 2, "layer_types": ["a", "b"], "architectures": ["Some"], "vocab_size": 7}
    assert shorten_config(config, 4) == short
    assert shorten_config({"text_config": config, "kept": 1}, 4) == {"text_config": short, "kept": 1}


def test_a_lap_has_wall_and_cpu_time():
    """Sleeping takes wall time but no CPU time."""
    result, lap = Stopwatch("cpu")(lambda: time.sleep(0.05) or 7)
    assert result == 7
    assert lap.time_s >= 0.05 > lap.cpu_time_s


def test_the_host_peak_is_that_of_its_phase():
    """Freed memory counts for its own phase and not for the next one."""
    tracker = PeakMemoryTracker("cpu")
    tracker.begin()
    before = host_bytes("VmRSS")
    block = torch.ones(64 * 2**20 // 4)
    del block
    peak = tracker.peaks("load")["host_peak_load_bytes"]
    assert peak >= before + 60 * 2**20
    tracker.begin()
    assert tracker.peaks("train")["host_peak_train_bytes"] < peak - 30 * 2**20


def test_resident_bytes_are_exact_by_kind():
    """Frozen base, adapter, gradients and two Adam moments are exact to the byte; tied tensors count once."""
    model = nn.ModuleDict({"base": nn.Linear(8, 4, bias=False), "adapter": nn.Linear(4, 2, bias=False)})
    model["tied"] = nn.Linear(8, 4, bias=False)
    model["tied"].weight = model["base"].weight
    model["base"].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([model["adapter"].weight])
    model["adapter"](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert resident_bytes(model, optimizer) == {
        "base_weight_bytes": 8 * 4 * 4,
        "quantization_state_bytes": 0,
        "adapter_bytes": 4 * 2 * 4,
        "gradient_bytes": 4 * 2 * 4,
        "optimizer_state_bytes": 2 * 4 * 2 * 4 + 4,  # plus the step counter
        "paged_optimizer_state_bytes": 0,
    }


def test_the_scales_of_int8_layers_are_counted_after_a_forward():
    """bitsandbytes moves the scales, one float32 for each row, from the weight to the layer's state."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(32, 64), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    before = resident_bytes(layer, optimizer)
    layer(torch.randn(2, 64))
    after = resident_bytes(layer, optimizer)
    assert before["quantization_state_bytes"] == after["quantization_state_bytes"] == 32 * 4
    assert before["base_weight_bytes"] == after["base_weight_bytes"] == 32 * 64
