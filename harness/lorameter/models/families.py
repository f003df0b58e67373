"""Model families: what is known of an architecture in addition to its config, as one table.

Every number that is computed from a model's shape (parameters, FLOPs, memory, what a token reads) follows from the
linear layers of its blocks, and config.json does not name these. They are known for the model types below, and a type
that is not there is unknown to all of these numbers alike: none of them is guessed. A family like Llama is one entry;
one with other layers needs a function that gives them.

What the formulas take from a family is its layers and their order: a block attends first and then expands, adds both
to its stream, and normalises before each, and after it where the family says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lorameter.models.shapes import ModelShape

Stage = Literal["entering", "attended", "expanding", "contracting"]
"""What a linear layer takes: what enters the block, what its attention gives, what enters the feed-forward part, and
what is between the two halves of that."""
STAGES: tuple[Stage, ...] = ("entering", "attended", "expanding", "contracting")
"""In the order of a forward pass; layers of one stage take the same tensor."""
Operand = Literal["query", "key", "value"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One linear layer of a block."""

    inputs: int
    outputs: int
    stage: Stage
    makes: frozenset[Operand] = frozenset()
    """Operands of the attention that are made of its output alone."""


Layers = Mapping[str, Layer]
"""All linear layers of a block, by the name that target_modules would use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What is known of one model type."""

    model_type: str
    """As config.json calls it."""
    layers: Callable[[ModelShape], Layers]
    parents: tuple[str, ...] = ("self_attn", "mlp")
    """Modules of a block that hold them; a target may name one before the layer."""
    biased: frozenset[str] = frozenset()
    """Layers with a bias: one that trains draws the gradient down to it, though its own gradient is a sum."""
    tied: bool = False
    """Whether the configuration class in transformers ties the head when config.json does not say."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """What PEFT adapts where a variant names nothing; empty where PEFT wants them named."""
    normed_heads: bool = False
    """Whether each head's query and key are normalised."""
    norms: int = 2
    """Of a block, each over its stream: before attention and feed-forward part, and after them where there are four."""
    shifted_norms: bool = False
    """Whether a norm multiplies by 1 plus its weight, which is a tensor of its own."""
    global_every: int = 0
    """Of so many blocks one attends to all positions, by rotations of its own, and the others to a window; 0 where all
    blocks are alike."""
    package: str = ""
    """The package of transformers that defines it; empty where it has the type's name."""
    preloaded: bool = False
    """Whether the catalogue has models of it, for which its module is imported before any trial."""

    @property
    def module(self) -> str:
        """Where transformers defines it."""
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
"""By model type. A test holds each against the model that transformers builds and the targets that PEFT chooses."""
