"""The shapes of models: dimensions from config.json, and the layers of known families.

Plans, feasibility and forecasts need only a model's widths and depth, and run in processes that must start fast: this
module parses JSON and never imports torch. Families use different names for the same dimension, and omit dimensions
that follow from others; this module resolves both.

Every number computed from a model's shape (parameters, memory) depends on the linear layers of its blocks, which
config.json does not list. The table has them for the model types below; for other types these numbers are not computed.
A family like Llama is one entry; a family with other layers needs a function that returns them.

The formulas use a family's layers and their order: a block first runs attention and then the feed-forward part, adds
both results to the residual stream, and normalises before each of them, in some families also after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lorameter.errors import UsageError, refused_value, shorten
from lorameter.models.catalogue import ModelSource, config_file
from lorameter.records import codec, fileio
from lorameter.records.codec import NotReadableError


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
    """Whether the output head is the input embedding; None if unknown."""
    architecture: str
    """The model type in transformers ("llama")."""


def shape(source: ModelSource) -> ModelShape:
    """The model's dimensions, from its config.json.

    Raises:
        UsageError: the file cannot be loaded or read, or does not describe a decoder-only model.
    """
    config: Mapping[str, Any] = read_config(source)
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) and text else config
    architecture = str(config.get("model_type", "unknown"))
    family = FAMILIES.get(architecture)
    tied = config.get("tie_word_embeddings", None if family is None else family.tied)
    values = {
        key: next((value for name in names if type(value := config.get(name)) is int), None)
        for key, names in _SYNONYMS.items()
    }
    hidden, heads = values["hidden_size"], values["heads"]
    if hidden and heads:  # dimensions that a configuration may omit, because they follow from others
        values["kv_heads"] = values["kv_heads"] or heads
        values["head_dim"] = values["head_dim"] or hidden // heads
        values["intermediate_size"] = values["intermediate_size"] or 4 * hidden  # GPT-2's default
    known = {key: value for key, value in values.items() if value is not None and value >= 1}
    if missing := sorted(values.keys() - known.keys()):
        why = f"its configuration (model type {shorten(architecture, 60)!r}) gives no {', '.join(missing)}"
        raise refused_value("catalogue", "model", source.label, why, "Use a decoder-only language model.")
    return ModelShape(**known, tied=tied, architecture=architecture)


def read_config(source: ModelSource) -> dict[str, Any]:
    """The content of a model's config.json. Raises `UsageError` if it cannot be loaded or read."""
    path = config_file(source)
    try:
        return codec.from_json(dict[str, Any], fileio.read_json(path), str(path))
    except (NotReadableError, UsageError) as error:
        raise refused_value(
            "catalogue", "model", source.label, f"{path} cannot be read ({error})", "Repair it."
        ) from None


LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
"""Keys of the number of decoder layers in config.json."""
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "layers": LAYER_KEYS,
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "n_ctx"),
}
"""Keys of each dimension in config.json: current ones first, then GPT-2's, then OPT's."""


class UnknownLayersError(UsageError):
    """Raised for a number that depends on unknown layers."""


def find_family(shape: ModelShape) -> Family:
    """The family of the model's type. Raises `UnknownLayersError` if it is unknown."""
    if unknown := unknown_layers(shape):
        raise UnknownLayersError(unknown)
    return FAMILIES[shape.architecture]


def unknown_layers(shape: ModelShape) -> str | None:
    """Why the model's layers are unknown, and the remedy; None if they are known."""
    if shape.architecture in FAMILIES:
        return None
    return (
        f"the linear layers of model type {shorten(shape.architecture, 60)!r} are not known, only those of "
        f"{', '.join(sorted(FAMILIES))}; add an entry for it to harness/lorameter/models/shapes.py"
    )


def linear_layers(shape: ModelShape) -> Layers:
    """The linear layers of one block, by their names in target_modules. Raises as `find_family` does."""
    return find_family(shape).layers(shape)


def linear_widths(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Input and output widths of these layers. Raises as `find_family` does."""
    return {name: (layer.inputs, layer.outputs) for name, layer in linear_layers(shape).items()}


def linear_elements(shape: ModelShape) -> int:
    """Weights of these layers in all blocks. Raises as `find_family` does."""
    return shape.layers * sum(inputs * outputs for inputs, outputs in linear_widths(shape).values())


Stage = Literal["entering", "attended", "expanding", "contracting"]
"""The input of a linear layer: that of the block, the output of its attention, the input of the feed-forward part, or
the tensor between the two halves of that part. Layers of one stage have the same input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One linear layer of a block."""

    inputs: int
    outputs: int
    stage: Stage


Layers = Mapping[str, Layer]
"""All linear layers of a block, by their names in target_modules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Facts about one model type."""

    layers: Callable[[ModelShape], Layers]
    tied: bool = False
    """Whether the transformers configuration class ties the head by default."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """PEFT's default target modules; empty if PEFT has none."""
    normed_heads: bool = False
    """Whether each head's query and key are normalised."""
    norms: int = 2
    """Number of norms of a block: before attention and before the feed-forward part, and also after them if there are
    four."""
    shifted_norms: bool = False
    """Whether a norm multiplies by 1 plus its weight, which is a separate tensor."""
    global_every: int = 0
    """Period of the blocks with global attention, which have their own rotary embedding; the others attend to a window.
    0 if all blocks are the same."""


def llama_layers(shape: ModelShape) -> Layers:
    """Layers of Llama: four attention projections, and a gated feed-forward part (Touvron et al. 2023, arXiv
    2302.13971)."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "q_proj": Layer(inputs=hidden, outputs=query, stage="entering"),
        "k_proj": Layer(inputs=hidden, outputs=key, stage="entering"),
        "v_proj": Layer(inputs=hidden, outputs=key, stage="entering"),
        "o_proj": Layer(inputs=query, outputs=hidden, stage="attended"),
        "gate_proj": Layer(inputs=hidden, outputs=inner, stage="expanding"),
        "up_proj": Layer(inputs=hidden, outputs=inner, stage="expanding"),
        "down_proj": Layer(inputs=inner, outputs=hidden, stage="contracting"),
    }


def phi3_layers(shape: ModelShape) -> Layers:
    """Layers of Phi-3: as Llama's, with one fused input projection for attention and one for the feed-forward part
    (Abdin et al. 2024, arXiv 2404.14219)."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "qkv_proj": Layer(inputs=hidden, outputs=query + 2 * key, stage="entering"),
        "o_proj": Layer(inputs=query, outputs=hidden, stage="attended"),
        "gate_up_proj": Layer(inputs=hidden, outputs=2 * inner, stage="expanding"),
        "down_proj": Layer(inputs=inner, outputs=hidden, stage="contracting"),
    }


FAMILIES: Mapping[str, Family] = {
    "gemma": Family(layers=llama_layers, tied=True, shifted_norms=True),
    "gemma3_text": Family(
        layers=llama_layers, tied=True, normed_heads=True, norms=4, shifted_norms=True, global_every=6
    ),
    "llama": Family(layers=llama_layers),
    "mistral": Family(layers=llama_layers),
    "phi3": Family(layers=phi3_layers, targets=()),
    "qwen2": Family(layers=llama_layers),
    "qwen3": Family(layers=llama_layers, normed_heads=True),
    "smollm3": Family(layers=llama_layers, tied=True, targets=()),
}
"""By the model type in config.json. A test compares each with the model that transformers builds, and with PEFT's
default targets."""
