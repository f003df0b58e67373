"""Tests that a prepared base equals, in all bits and attributes, the base that a process would load itself.

Tests of several adapters on one base: each trial is bit-equal to the same trial alone.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
from pathlib import Path

import pytest
import torch

from lorameter.models import bases, catalogue
from lorameter.records import codec
from lorameter.records.os_errors import find_system_error
from lorameter.records.record import BaseSummary
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import BaseRequest, TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.building import base_cache, base_model
from lorameter.trial.building.build import SharedBase, base_digest
from lorameter.trial.building.quantizers import EightBit, FourBit
from lorameter.trial.data.tokens import prepare
from lorameter.trial.trial import Trial

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


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The folder of prepared bases."""
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


def base_request(model, variant, seed=1):
    """Return the request for a base."""
    return BaseRequest(
        workload=Workload(model=model, data_seed=seed), variant=variant, device="cpu", threads=1, log_path=""
    )


def make_base(request):
    """Make the base of a request and return its summary."""
    return codec.from_json(BaseSummary, base_cache.prepare_base(request).tokens["base"], "summary of a base")


def load_directly(model, variant, seed=1):
    """Load the base without the cache."""
    return base_model.load_base(catalogue.resolve(model), variant, device="cpu", seed=seed)


def load_both_ways(model, variant):
    """Return a base that is loaded directly, and one that is prepared and taken from the cache."""
    summary = make_base(base_request(model, variant))
    taken = base_cache.map_base(Path(summary.path), variant, "cpu")
    return load_directly(model, variant), taken


def tensors_of(model):
    """Return all tensors of a model by name: parameters, buffers, quantisation constants."""
    found = dict(model.named_buffers()) | {name: parameter.data for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        constants = EightBit(PLAIN).constants(parameter) | FourBit(PLAIN).constants(parameter)
        found |= {f"{name}.{key}": value for key, value in constants.items()}
    return found | {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def plain_attributes(thing):
    """Return attributes of a module, a model or a weight that are neither tensors nor modules."""
    kept = (bool, int, float, str, torch.dtype, type)
    return {
        key: value
        for key, value in vars(thing).items()
        if (isinstance(value, kept) or value is None) and key != "_is_hf_initialized"
    }


def assert_equal(ours, theirs):
    """Assert that tensors are bit-equal, and that attributes of the model, its modules and its weights are equal."""
    left, right = tensors_of(ours), tensors_of(theirs)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape, tensor.device) == (other.dtype, other.shape, other.device), name
        assert torch.equal(tensor, other), name
    modules = dict(theirs.named_modules())
    for name, module in ours.named_modules():
        assert type(module) is type(modules[name]), name
        assert plain_attributes(module) == plain_attributes(modules[name]), name
    parameters = dict(theirs.named_parameters())
    assert list(parameters) == [name for name, _ in ours.named_parameters()]
    for name, parameter in ours.named_parameters():
        assert type(parameter) is type(parameters[name]), name
        assert parameter.requires_grad == parameters[name].requires_grad, name
        assert plain_attributes(parameter) == plain_attributes(parameters[name]), name
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert getattr(ours, "hf_device_map", None) == getattr(theirs, "hf_device_map", None)
    assert type(getattr(ours, "hf_quantizer", None)) is type(getattr(theirs, "hf_quantizer", None))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_prepared_base_equals_one_that_is_loaded_from_its_files(saved, variant):
    """The test covers every quantisation, with and without double quantisation."""
    assert_equal(*load_both_ways(saved(), variant))


def test_transposed_layers_are_prepared(saved):
    """GPT-2 stores its weights transposed."""
    assert_equal(*load_both_ways(saved(GPT2), VARIANTS["nf4"]))


def test_a_process_that_writes_to_a_weight_changes_its_own_copy(saved):
    """Repacking and in-place changes affect neither the file nor other processes."""
    model, variant = saved(), VARIANTS["nf4"]
    folder = Path(make_base(base_request(model, variant)).path)
    base = base_cache.map_base(folder, variant, "cpu")
    with torch.no_grad():
        base(input_ids=torch.arange(8)[None])
        for parameter in base.parameters():
            parameter.data.zero_()
    assert_equal(load_directly(model, variant), base_cache.map_base(folder, variant, "cpu"))


def test_a_base_is_made_once(saved):
    """Another dtype or quantisation, and for random weights another seed, is another base."""
    model = saved()
    first, second = (make_base(base_request(model, VARIANTS["nf4"])) for _ in range(2))
    assert (first.conversions, first.quantisations) == (1, 1)
    assert (second.conversions, second.quantisations) == (0, 0)
    assert (first.path, first.hash) == (second.path, second.hash)
    assert make_base(base_request(model, VARIANTS["nf4"], seed=2)).path == first.path  # no weights were drawn
    others = {make_base(base_request(model, VARIANTS[name])).path for name in ("bfloat16", "float32", "nf4 single")}
    assert len(others | {first.path}) == 4
    drawn = {make_base(base_request("tiny-llama", PLAIN, seed)).path for seed in (1, 2)}
    assert len(drawn) == 2


def test_a_source_that_changed_is_another_base(saved):
    """This holds even if size and time stamp are unchanged."""
    model = saved()
    before = make_base(base_request(model, PLAIN))
    path = Path(model) / "model.safetensors"
    state = path.stat()
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x00\x3f")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    after = make_base(base_request(model, PLAIN))
    assert (after.conversions, after.hash == before.hash) == (1, False)


def trial_request(model, base):
    """Return the request of a trial that takes this prepared base."""
    return TrialRequest(
        trial="t", variant=PLAIN, role="variant", replicate=0, seed=0, workload=Workload(model=model, data_seed=1),
        protocol=Protocol(), interleaving="replicates", measures=("steps",), device="cpu", threads=1, tokens_path="",
        scratch="", log_path="", base=base,
    )  # fmt: skip


def test_a_trial_whose_base_is_missing_makes_its_own(saved):
    """The trial reports the conversion; the model is the same."""
    model = saved()
    summary = make_base(base_request(model, PLAIN))
    taken, made = base_cache.open_base(trial_request(model, summary.path))
    assert not made
    (Path(summary.path) / bases.TENSORS).unlink()  # mappings of the file stay valid
    (Path(summary.path) / bases.TENSORS).write_bytes(b"short")
    own, made = base_cache.open_base(trial_request(model, summary.path))
    assert made
    assert_equal(taken, own)
    assert base_cache.open_base(trial_request(model, ""))[1]


def test_a_full_disk_is_reported_with_its_remedy(saved, home, monkeypatch):
    """No file of the base is left."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(base_cache.torch, "save", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space") as refused:
        make_base(base_request(saved(), PLAIN))
    assert "Free space" in find_system_error(refused.value)
    assert not [path for path in home.iterdir() if path.is_dir()]


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
DORA = LoraVariant(
    name="dora", r=8, quantization="nf4", lora_dropout=0.1, learning_rate=3e-3, use_dora=True,
    target_modules=("q_proj", "v_proj"),
)  # fmt: skip
SWEEP = (LoraVariant(name="dropout", r=64, quantization="nf4", lora_dropout=0.5, learning_rate=3e-3), DORA)
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
    """With two adapters in shuffled turns, training losses and held-out losses are bit-equal."""
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
    assert [taken[0].values["base_loads"] for taken in fragments.values()] == [1, 0]
    alone = {variant.name: losses_alone(variant, tokens, check=variant.name == "dropout") for variant in sweep}
    assert {name: all_losses(taken) for name, taken in fragments.items()} == alone
    assert alone["dora"][0][2:] != alone["dropout"][0][2:]


def test_a_base_that_changed_makes_every_trial_on_it_invalid(tokens):
    """After a write to the base, no trial on it equals the trial alone."""
    shared = SharedBase()
    trials = [trial_on(shared, variant, tokens) for variant in SWEEP]
    for trial in trials:
        trial.run("build")
    model = trials[0].trainee.model
    norm = next(parameter for name, parameter in model.named_parameters() if "norm" in name)
    before = base_digest(model)
    with torch.no_grad():
        norm[0] += 1
    assert base_digest(model) != before
    closed = [trial.run("close") for trial in trials]
    assert {fragment.status for fragment in closed} == {"invalid"}
    assert closed[0].failure.kind == "BaseChanged"
