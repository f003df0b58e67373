"""Model families: a table of the facts about architectures that config.json lacks.

Every number that is computed from a model's shape (parameters, FLOPs, memory, bytes read for a token) depends on the
linear layers of its blocks, which config.json does not name. They are known for the model types below; for any other
type none of these numbers is computed. A family like Llama is one entry; one with other layers needs a function that
returns them.

The formulas use a family's layers and their order: a block attends first and then expands, adds both results to its
stream, and normalises before each of them, in some families also after.
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
"""In the order of a forward pass; layers of one stage have the same input."""
Operand = Literal["query", "key", "value"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One linear layer of a block."""

    inputs: int
    outputs: int
    stage: Stage
    makes: frozenset[Operand] = frozenset()
    """Operands of the attention that are computed from its output alone."""


Layers = Mapping[str, Layer]
"""All linear layers of a block, by the name that target_modules would use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Facts about one model type."""

    model_type: str
    """As config.json calls it."""
    layers: Callable[[ModelShape], Layers]
    parents: tuple[str, ...] = ("self_attn", "mlp")
    """Modules of a block that contain them; a target may name one before the layer."""
    biased: frozenset[str] = frozenset()
    """Layers with a bias; one that trains needs the gradient of the layer's output, although its own is only a sum."""
    tied: bool = False
    """Whether the configuration class in transformers ties the head by default."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """PEFT's default target modules; empty where PEFT has none."""
    normed_heads: bool = False
    """Whether each head's query and key are normalised."""
    norms: int = 2
    """Number of norms of a block, each over its stream: before attention and feed-forward part, and after them where
    there are four."""
    shifted_norms: bool = False
    """Whether a norm multiplies by 1 plus its weight, which is a tensor of its own."""
    global_every: int = 0
    """Period of the blocks that attend to all positions, with a rotary embedding of their own; the others attend to a
    window. 0 where all blocks are alike."""
    package: str = ""
    """The package of transformers that defines it; empty if it is the model type."""
    preloaded: bool = False
    """Whether the zygote imports its module, since the catalogue has models of it."""

    @property
    def module(self) -> str:
        """The module of transformers that defines it."""
        package = self.package or self.model_type
        return f"transformers.models.{package}.modeling_{package}"


def llama_layers(shape: ModelShape) -> Layers:
    """Four projections around the attention, and a gated feed-forward part (Touvron et al. 2023, arXiv 2302.13971)."""
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
    """As Llama's, with one projection into the attention and one into the feed-forward part (Abdin et al. 2024, arXiv
    2404.14219)."""
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
"""By model type. A test compares each with the model that transformers builds and the targets that PEFT chooses."""
