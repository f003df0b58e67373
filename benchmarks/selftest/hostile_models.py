"""Doors of what a model is read from: its configuration, GGUF file, tokenizer and weights, and a place in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from functools import cache
from pathlib import Path

import hostile
from hostile_door import FREE_BYTES, MACHINE
from hostile_seeds import ROOT

from harness.models import catalogue, fetch, shapes
from harness.models.costs.memory import estimate_memory, stored_dtype
from harness.records import codec
from harness.run.measure import plan_study
from harness.studies.study_file import load_study
from harness.studies.workload import Workload
from kernels_check.visible import make_visible

CACHED = "smollm2-135m"
SMALL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 300,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def configs() -> list[bytes]:
    """The configurations of the catalogue."""
    return [path.read_bytes() for path in sorted((ROOT / "harness" / "models").glob("*.json"))]


def ggufs() -> list[bytes]:
    """The smallest file of a model."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def pair(key: str, value: int | str) -> bytes:
        return text(key) + (
            struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value)
        )

    about: dict[str, int | str] = {
        "general.architecture": "llama", "llama.embedding_length": 64, "llama.feed_forward_length": 128,
        "llama.block_count": 2, "llama.attention.head_count": 4, "llama.vocab_size": 300, "llama.context_length": 256,
    }  # fmt: skip
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(about))
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 64, 300, 0, 0)
    body = head + b"".join(pair(key, value) for key, value in about.items()) + tensor
    return [body + b"\0" * (-len(body) % 32) + b"\0" * (64 * 300 * 4)]


@cache
def tokenizer_files() -> list[bytes]:
    """The files of a small tokenizer, one a line."""
    import tokenizers
    import transformers

    import harness.trial.data.tokens  # noqa: F401 loaded before the processes are forked
    from harness.trial.data import tokenizers as ours

    for name in ("AutoTokenizer", "PreTrainedTokenizerFast"):  # loaded when they are named
        getattr(transformers, name)
    alphabet = {character: byte for byte, character in enumerate(ours._byte_characters())}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(["<s>", "</s>", "<pad>"])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    about = {**special, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256}
    files = (json.loads(model.to_str()), about, special)
    return [b"\n".join(json.dumps(file).encode() for file in files)]


@cache
def weights() -> list[bytes]:
    """The weights of a small model."""
    import safetensors.torch
    import torch
    import transformers

    import harness.trial.building.base_model  # noqa: F401 loaded before the processes are forked

    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**SMALL))
    named = {name: value.detach() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    return [safetensors.torch.save(named, metadata={"format": "pt"})]


def places_in_cache() -> list[bytes]:
    """What `fetch` writes down of a converted model."""
    files = {"config.json": hashlib.sha256(b"{}").hexdigest()}
    about = {"schema": 1, "source": "x", "source_sha256": "0" * 64, "sha256": files}
    return [json.dumps(about).encode()]


def spoil_weights(source, content: bytes) -> bytes:
    """The header spoilt as a document and its length made right again; or the bytes."""
    if source.random() < 0.3:
        return hostile.spoil_bytes(source, content)
    (length,) = struct.unpack_from("<Q", content)
    header = hostile.spoil_json(source, content[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def enter_config(folder: Path, content: bytes) -> str:
    """A folder with this configuration."""
    (folder / "config.json").write_bytes(content)
    return _look_at_model(str(folder))


def enter_gguf(folder: Path, content: bytes) -> str:
    """A GGUF file."""
    path = folder / "model.gguf"
    path.write_bytes(content)
    return _look_at_model(str(path))


def _look_at_model(model: str) -> str:
    source = catalogue.resolve(model)
    shape = shapes.shape(source)
    study = load_study("training-step", device="cpu").with_overrides(model=f"random:{model}")
    stored = stored_dtype(source)
    if shapes.unknown_layers(shape) is None:
        for phase in ("train", "generate"):
            for device in ("cpu", "cuda"):
                estimate = estimate_memory(
                    study.variants[0], study.workload, shape, phase=phase, device=device, stored=stored
                )
                codec.dumps(estimate)
    plan, notices = plan_study(study, MACHINE, free_bytes=FREE_BYTES)
    return make_visible(" ".join(notice.message for notice in notices)) + plan.why


def enter_tokenizer(folder: Path, content: bytes) -> str:
    """A model's folder with these files of its tokenizer; records are read and tokenised."""
    from harness.trial.data.tokens import prepare

    for name, line in zip(TOKENIZER, content.split(b"\n"), strict=False):
        (folder / name).write_bytes(line)
    (folder / "config.json").write_text(json.dumps(SMALL))
    workload = Workload(
        model=str(folder), data="synthetic", sequence_length=32, train_sequences=2, held_out_records=8,
        held_out_sequences=1, prompt_tokens=8,
    )  # fmt: skip
    return make_visible(str(prepare(workload, folder).records))


def enter_weights(folder: Path, content: bytes) -> str:
    """A model's folder with these weights; it is loaded."""
    from harness.trial.building.base_model import load_base

    (folder / "config.json").write_text(json.dumps(SMALL))
    (folder / "model.safetensors").write_bytes(content)
    variant = load_study("training-step", device="cpu").variants[0]
    load_base(catalogue.resolve(str(folder)), variant, device="cpu", seed=0)
    return ""


def enter_cache(folder: Path, content: bytes) -> str:
    """A model in the cache, of which this was written down."""
    os.environ["LORAMETER_CACHE"] = str(folder)
    place = catalogue.CATALOGUE[CACHED].directory
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    (place / catalogue.PROVENANCE_FILE).write_bytes(content)
    return make_visible(str(fetch.fetch(CACHED)))
