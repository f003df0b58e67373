"""A base that was prepared is, to the bit and in every mark, the one that a process would have made itself."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch

from lorameter.models import bases, catalogue, shapes
from lorameter.models.costs.memory import estimate_memory
from lorameter.records.os_errors import find_system_error
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import BaseRequest, TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building import base_cache, base_model, peft_methods
from lorameter.trial.memory import resident_tensors, storage_bytes
from lorameter.trial.profiling.memory import read_pages

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 192,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
    "max_position_embeddings": 128, "tie_word_embeddings": True, "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 320}
PLAIN = LoraVariant()
VARIANTS = {
    "bfloat16": PLAIN,
    "float32": LoraVariant(dtype="float32"),
    "int8": LoraVariant(quantization="int8"),
    "nf4": LoraVariant(quantization="nf4"),
    "nf4 single": LoraVariant(quantization="nf4", double_quant=False),
    "fp4": LoraVariant(quantization="fp4", compute_dtype="float32"),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Where bases lie."""
    monkeypatch.setenv(bases.ENV_BASES, str(tmp_path / "bases"))
    return tmp_path / "bases"


@pytest.fixture
def saved(tmp_path):
    """A function that saves a random model and returns its directory."""

    def save(config=LLAMA, name="model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        source = catalogue.resolve(f"random:{tmp_path / name}")
        base_model.load_base(source, PLAIN, device="cpu", seed=1).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def asked(model, variant, seed=1):
    """The request for a base."""
    return BaseRequest(
        workload=Workload(model=model, data_seed=seed), variant=variant, device="cpu", threads=1, log_path=""
    )


def directly(model, variant, seed=1):
    """The base as a process makes it itself."""
    return base_model.load_base(catalogue.resolve(model), variant, device="cpu", seed=seed)


def both(model, variant):
    """A base that was made directly, and one that was prepared and taken."""
    summary = base_cache.prepare(asked(model, variant))
    taken = base_cache.take(Path(summary.path), variant, "cpu")
    return directly(model, variant), taken


def tensors_of(model):
    """All that is stored of it, by name: parameters, buffers that are saved and that are not, constants."""
    return base_cache._tensors(model) | {
        name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)
    }


def plain_marks(thing):
    """What a module, a model or a weight says of itself, less tensors, modules and what only loading reads."""
    kept = (bool, int, float, str, torch.dtype, type)
    return {
        key: value
        for key, value in vars(thing).items()
        if (isinstance(value, kept) or value is None) and key != "_is_hf_initialized"
    }


def assert_alike(ours, theirs):
    """Bit for bit and mark for mark."""
    left, right = tensors_of(ours), tensors_of(theirs)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape, tensor.device) == (other.dtype, other.shape, other.device), name
        assert torch.equal(tensor, other), name
    modules = dict(theirs.named_modules())
    for name, module in ours.named_modules():
        assert type(module) is type(modules[name]), name
        assert plain_marks(module) == plain_marks(modules[name]), name
    parameters = dict(theirs.named_parameters())
    assert list(parameters) == [name for name, _ in ours.named_parameters()]
    for name, parameter in ours.named_parameters():
        assert type(parameter) is type(parameters[name]), name
        assert parameter.requires_grad == parameters[name].requires_grad, name
        assert plain_marks(parameter) == plain_marks(parameters[name]), name
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert getattr(ours, "hf_device_map", None) == getattr(theirs, "hf_device_map", None)
    assert type(getattr(ours, "hf_quantizer", None)) is type(getattr(theirs, "hf_quantizer", None))


@every_variant
def test_a_prepared_base_equals_one_of_its_files(saved, variant):
    """Of a checkpoint: none, int8, nf4, fp4, with and without double quantisation."""
    assert_alike(*both(saved(), variant))


@pytest.mark.parametrize("variant", [PLAIN, VARIANTS["int8"], VARIANTS["nf4"]], ids=["bfloat16", "int8", "nf4"])
def test_a_base_of_other_files_is_prepared_alike(saved, gguf_file, variant):
    """Of layers that store their weights transposed, and of a file that has to be dequantised first."""
    assert_alike(*both(saved(GPT2), variant))
    assert_alike(*both(str(gguf_file), variant))


@pytest.mark.parametrize("variant", [PLAIN, VARIANTS["int8"], VARIANTS["nf4"]], ids=["bfloat16", "int8", "nf4"])
def test_a_prepared_base_trains_and_answers_alike(saved, variant):
    """Loss, gradients, and the answer after a repacking forward are the same numbers."""

    def work(base):
        torch.manual_seed(3)
        model = peft_methods.attach(base, dataclasses.replace(variant, r=4)).train()
        tokens = torch.arange(32)[None]
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.eval()
        with torch.no_grad():
            return [loss.detach(), *gradients, model(input_ids=tokens).logits]

    ours, theirs = both(saved(), variant)
    for left, right in zip(work(ours), work(theirs), strict=True):
        assert torch.equal(left, right)


def test_a_base_is_made_once(saved):
    """The second time it is found; another seed, type or quantisation is another base."""
    model = saved()
    first, second = (base_cache.prepare(asked(model, VARIANTS["nf4"])) for _ in range(2))
    assert (first.conversions, first.quantisations) == (1, 1)
    assert (second.conversions, second.quantisations) == (0, 0)
    assert (first.path, first.hash) == (second.path, second.hash)
    assert base_cache.prepare(asked(model, VARIANTS["nf4"], seed=2)).path == first.path  # nothing was drawn
    others = {base_cache.prepare(asked(model, variant)).path for variant in VARIANTS.values()}
    assert len(others) == len(VARIANTS)
    drawn = {base_cache.prepare(asked("tiny-llama", PLAIN, seed)).path for seed in (1, 2)}
    assert len(drawn) == 2


def test_a_source_that_changed_is_another_base(saved):
    """Even where its size and its time are what they were."""
    model = saved()
    before = base_cache.prepare(asked(model, PLAIN))
    path = Path(model) / "model.safetensors"
    state = path.stat()
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x00\x3f")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    after = base_cache.prepare(asked(model, PLAIN))
    assert (after.conversions, after.hash == before.hash) == (1, False)


def trial_request(model, base):
    """A trial's, as far as its base is concerned."""
    return TrialRequest(
        trial="t", variant=PLAIN, role="variant", replicate=0, seed=0, workload=Workload(model=model, data_seed=1),
        protocol=Protocol(), interleaving="replicates", measures=("steps",), device="cpu", threads=1, tokens_path="",
        scratch="", log_path="", base=base,
    )  # fmt: skip


def test_a_trial_whose_base_has_gone_makes_its_own(saved):
    """It is slower and says so; the model is the same."""
    model = saved()
    summary = base_cache.prepare(asked(model, PLAIN))
    taken, made = base_cache.base_of(trial_request(model, summary.path))
    assert not made
    (Path(summary.path) / bases.TENSORS).unlink()  # what has it mapped keeps it
    (Path(summary.path) / bases.TENSORS).write_bytes(b"short")
    own, made = base_cache.base_of(trial_request(model, summary.path))
    assert made
    assert_alike(taken, own)
    assert base_cache.base_of(trial_request(model, ""))[1]


def test_nobody_writes_into_what_is_shared(saved):
    """A weight that is changed in place is the process's own from then on, and repacking leaves the file alone."""
    model = saved()
    for variant in (PLAIN, VARIANTS["nf4"]):
        summary = base_cache.prepare(asked(model, variant))
        folder = Path(summary.path)
        base = base_cache.take(folder, variant, "cpu")
        with torch.no_grad():
            base(input_ids=torch.arange(8)[None])
            for parameter in base.parameters():
                parameter.data.zero_()
        assert_alike(directly(model, variant), base_cache.take(folder, variant, "cpu"))


def test_the_estimate_counts_what_repacking_leaves_in_memory(saved):
    """After an evaluating forward pass each 4-bit layer has a copy of its own, and the mapped originals stay."""
    variant, model = VARIANTS["nf4"], saved()
    base = base_cache.take(Path(base_cache.prepare(asked(model, variant)).path), variant, "cpu")
    if not next(one for one in base.modules() if isinstance(one, bnb.nn.Linear4bit)).support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes repacks 4-bit weights on CPUs with AVX512-BF16 alone")

    pages = read_pages().files
    file = next(path for path in pages if path.endswith(bases.TENSORS))
    with torch.no_grad():
        base(input_ids=torch.arange(8)[None])
    now, tensors = read_pages(), resident_tensors(base, None)
    assert file not in {now.file_at(weight.data_ptr()) for weight in tensors["linear_weights"]}
    assert now.files[file] >= pages[file]
    shape = shapes.shape(catalogue.resolve(model))
    kinds = estimate_memory(variant, Workload(model=model), shape, phase="generate", repacks=True).kinds
    for kind in ("linear_weights", "quantization_state"):
        assert kinds[kind] == pytest.approx(sum(map(storage_bytes, tensors[kind])), rel=0.01)


def full(*_):
    """As a disk says it."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_stays_full_is_a_refusal(saved, home, monkeypatch):
    """Of the system, with what to do about it; nothing is left."""
    monkeypatch.setattr(base_cache, "_write_tensors", full)
    with pytest.raises(OSError, match="No space") as refused:
        base_cache.prepare(asked(saved(), PLAIN))
    assert "Free space" in find_system_error(refused.value)
    assert not [path for path in home.iterdir() if path.is_dir()]
