"""Model families: a table of the facts about architectures that config.json lacks.

Every number computed from a model's shape (parameters, FLOPs, memory, bytes read per token) depends on the linear
layers of its blocks, which config.json does not list. The table has them for the model types below; for other types
these numbers are not computed. A family like Llama is one entry; a family with other layers needs a function that
returns them.

The formulas use a family's layers and their order: a block first runs attention and then the feed-forward part, adds
both results to the residual stream, and normalises before each of them, in some families also after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lorameter.models.shapes import ModelShape

Stage = Literal["entering", "attended", "expanding", "contracting"]
"""The input of a linear layer: that of the block, the output of its attention, the input of the feed-forward part, or
the tensor between the two halves of that part."""
STAGES: tuple[Stage, ...] = ("entering", "attended", "expanding", "contracting")
"""Stages in the order of a forward pass; layers of one stage have the same input."""
Operand = Literal["query", "key", "value"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One linear layer of a block."""

    inputs: int
    outputs: int
    stage: Stage
    makes: frozenset[Operand] = frozenset()
    """Operands of the attention that are computed only from its output."""


Layers = Mapping[str, Layer]
"""All linear layers of a block, by their names in target_modules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Facts about one model type."""

    model_type: str
    """The model type in config.json."""
    layers: Callable[[ModelShape], Layers]
    parents: tuple[str, ...] = ("self_attn", "mlp")
    """Modules of a block that contain the layers; a target may name one before the layer."""
    biased: frozenset[str] = frozenset()
    """Layers with a bias; a bias that trains needs the gradient of the layer's output, of which its own gradient is a
    sum."""
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
    package: str = ""
    """The transformers package that defines it; empty if its name is the model type."""
    preloaded: bool = False
    """Whether the zygote imports its module, because the catalogue has such models."""

    @property
    def module(self) -> str:
        """The transformers module that defines it."""
        package = self.package or self.model_type
        return f"transformers.models.{package}.modeling_{package}"


def llama_layers(shape: ModelShape) -> Layers:
    """Layers of Llama: four attention projections, and a gated feed-forward part (Touvron et al. 2023, arXiv
    2302.13971)."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "q_proj": Layer(inputs=hidden, outputs=query, stage="entering", makes=frozenset({"query"})),
        "k_proj": Layer(inputs=hidden, outputs=key, stage="entering", makes=frozenset({"key"})),
        "v_proj": Layer(inputs=hidden, outputs=key, stage="entering", makes=frozenset({"value"})),
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
        "qkv_proj": Layer(
            inputs=hidden, outputs=query + 2 * key, stage="entering", makes=frozenset({"query", "key", "value"})
        ),
        "o_proj": Layer(inputs=query, outputs=hidden, stage="attended"),
        "gate_up_proj": Layer(inputs=hidden, outputs=2 * inner, stage="expanding"),
        "down_proj": Layer(inputs=inner, outputs=hidden, stage="contracting"),
    }


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="gemma", layers=llama_layers, tied=True, shifted_norms=True, preloaded=True),
        Family(
            model_type="gemma3_text",
            layers=llama_layers,
            tied=True,
            normed_heads=True,
            norms=4,
            shifted_norms=True,
            global_every=6,
            package="gemma3",
        ),
        Family(model_type="llama", layers=llama_layers, preloaded=True),
        Family(model_type="mistral", layers=llama_layers, preloaded=True),
        Family(model_type="phi3", layers=phi3_layers, targets=()),
        Family(
            model_type="qwen2",
            layers=llama_layers,
            biased=frozenset({"q_proj", "k_proj", "v_proj"}),
            preloaded=True,
        ),
        Family(model_type="qwen3", layers=llama_layers, normed_heads=True),
        Family(model_type="smollm3", layers=llama_layers, tied=True, targets=()),
    )
}
"""By model type. A test compares each with the model that transformers builds and with PEFT's default targets."""
