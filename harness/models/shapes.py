"""A model's dimensions, read from its config.json or GGUF header before anything is loaded.

Plans, feasibility and forecasts need no more of a model than its widths and depth, and they run in processes that
must stay light: this module parses headers and JSON only and never imports torch. Families call the same dimension by
different names, and leave out what follows from the rest; both are settled here, once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UsageError, impossible
from harness.models.catalogue import ModelSource, config_file
from harness.models.families import FAMILIES, Family, Layers


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Dimensions of a decoder-only model; widths in elements, `context` in tokens."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    tied: bool | None
    """Whether the output head is the input embedding; None where neither the file nor `families` says."""
    architecture: str
    """The model type, as transformers and GGUF call it ("llama")."""


def shape(source: ModelSource) -> ModelShape:
    """The model's dimensions, from its config.json or its GGUF header.

    Raises:
        UsageError: the file cannot be had or read, or describes no decoder-only model.
    """
    if source.kind == "gguf":
        return _gguf_shape(source)
    path = config_file(source)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise impossible("catalogue", "model", source.label, f"{path} cannot be read ({error})", "Repair it.") from None
    return _config_shape(config.get("text_config") or config, source)


_SYNONYMS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "n_ctx"),
}
"""What config.json calls each dimension: today's name first, then GPT-2's, then OPT's."""

_GGUF_KEYS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("embedding_length",),
    "intermediate_size": ("feed_forward_length",),
    "layers": ("block_count",),
    "heads": ("attention.head_count",),
    "kv_heads": ("attention.head_count_kv",),
    "head_dim": ("attention.key_length",),
    "vocab_size": ("vocab_size",),
    "context": ("context_length",),
}
"""The same in GGUF, each after "ARCHITECTURE." (gguf specification, section "LLM")."""


def _config_shape(config: Mapping[str, Any], source: ModelSource) -> ModelShape:
    architecture = str(config.get("model_type", "unknown"))
    tied: bool | None = None
    if "tie_word_embeddings" in config:
        tied = bool(config["tie_word_embeddings"])
    elif architecture in FAMILIES:
        tied = FAMILIES[architecture].tied
    values = {key: _first(config, names) for key, names in _SYNONYMS.items()}
    return _complete(values, tied=tied, architecture=architecture, source=source)


def _gguf_shape(source: ModelSource) -> ModelShape:
    reader = open_gguf(Path(source.location))
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    metadata = {name: field.contents() for name, field in fields.items()}
    architecture = str(metadata.get("general.architecture", "unknown"))
    prefix = f"{architecture}."
    own = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    values = {key: _first(own, names) for key, names in _GGUF_KEYS.items()}
    names = {tensor.name: tensor for tensor in reader.tensors}
    if values["vocab_size"] is None and "token_embd.weight" in names:
        values["vocab_size"] = int(names["token_embd.weight"].shape[-1])
    return _complete(values, tied="output.weight" not in names, architecture=architecture, source=source)


def _first(mapping: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := mapping.get(name), int)), None)


def _complete(
    values: dict[str, int | None], *, tied: bool | None, architecture: str, source: ModelSource
) -> ModelShape:
    """Fill in what a config may leave out because it follows from the rest."""
    hidden, heads = values["hidden_size"], values["heads"]
    if hidden and heads:
        values["kv_heads"] = values["kv_heads"] or heads
        values["head_dim"] = values["head_dim"] or hidden // heads
        values["intermediate_size"] = values["intermediate_size"] or 4 * hidden  # GPT-2's default
    known = {key: value for key, value in values.items() if value is not None}
    if missing := sorted(values.keys() - known.keys()):
        raise impossible(
            "catalogue",
            "model",
            source.label,
            f"its configuration (model type {architecture!r}) gives no {', '.join(missing)}",
            "Use a decoder-only language model.",
        )
    return ModelShape(**known, tied=tied, architecture=architecture)


def open_gguf(path: Path) -> Any:
    """The file's `gguf.GGUFReader`; tensors are mapped, not read.

    Raises:
        UsageError: the package gguf is missing, or this is no GGUF file.
    """
    try:
        import gguf
    except ImportError:
        raise impossible(
            "catalogue", "model", str(path), "reading it needs the package gguf", "pip install 'lorameter[gguf]'"
        ) from None
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader indexes into the file and raises whatever that ends in
        raise impossible(
            "catalogue", "model", str(path), f"not a readable GGUF file ({error})", "Download it again."
        ) from None


class UnknownLayersError(UsageError):
    """A number was asked for that follows from layers which nobody has written down."""


def family_of(shape: ModelShape) -> Family:
    """What is known of the model's type.

    Raises:
        UnknownLayersError: nothing.
    """
    if unknown := unknown_layers(shape):
        raise UnknownLayersError(unknown)
    return FAMILIES[shape.architecture]


def unknown_layers(shape: ModelShape) -> str | None:
    """Why nothing can be computed from the model's layers, and what to do about it; None if they are known."""
    if shape.architecture in FAMILIES:
        return None
    return (
        f"the linear layers of model type {shape.architecture!r} are not known, only those of "
        f"{', '.join(sorted(FAMILIES))}; add an entry for it to harness/models/families.py"
    )


def linear_layers(shape: ModelShape) -> Layers:
    """The linear layers of one block, by the name that target_modules would use. Raises as `family_of` does."""
    return family_of(shape).layers(shape)


def linear_widths(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the same. Raises as `family_of` does."""
    return {name: (layer.inputs, layer.outputs) for name, layer in linear_layers(shape).items()}
