"""Random models for `random_models.py`: attention, storage and adapter, with the true value of each checked path.

The truth is recorded with each random choice and never read from the model. The backend of an attention follows from
its code: on a CPU torch's scaled dot product runs its flash kernel, unless the context forbids it; a softmax between
two products is eager.
"""

from __future__ import annotations

import copy
import math
import random
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward

WIDTH, HEADS, VOCABULARY, PAD = 32, 2, 61, 0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Candidate requirements of a path that takes a minimum share."""
SDPA, EAGER = ("flash", "math"), ("eager by matmul", "eager by einsum")


@dataclass(frozen=True, slots=True)
class Truth:
    """The requirements of a path that hold."""

    holds: frozenset[Any] = frozenset()
    free: frozenset[Any] = frozenset()
    """Requirements for which the definition of the path leaves open whether they hold."""
    hidden: bool = False
    """Whether `unknown` is also right, since the path cannot be observed."""


def true(*holds: Any, free: Any = (), hidden: bool = False) -> Truth:
    """Make a truth where these requirements hold and the free ones may hold."""
    return Truth(frozenset(holds), frozenset(free), hidden)


def at_least(share: float) -> Truth:
    """Make a truth where every minimum share up to this one holds."""
    return true(*(one for one in SHARES if one <= share))


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The attention of one layer. Masks are none, causal (a flag), or explicit: additive, filled, boolean."""

    kind: str
    mask: str


def visible_positions(length: int, padding: Tensor | None, segments: Tensor | None) -> Tensor:
    """Return a boolean mask [rows or 1, 1, length, length]: a token attends to the earlier tokens of its segment that
    are not padding."""
    visible = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if padding is not None:
        visible = visible & padding.bool()[:, None, None, :] | torch.eye(length, dtype=torch.bool)
    if segments is not None:
        visible = visible & (segments[:, None, :, None] == segments[:, None, None, :])
    return visible


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, spec: AttentionSpec) -> Tensor:
    """Compute attention over [rows, heads, length, size]."""
    additive = torch.zeros(visible.shape, dtype=query.dtype).masked_fill(~visible, torch.finfo(query.dtype).min)
    if spec.kind in SDPA:
        mask, causal = {"additive": additive, "boolean": visible}.get(spec.mask), spec.mask == "causal"
        with sdpa_kernel(SDPBackend.MATH) if spec.kind == "math" else nullcontext():
            return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    einsum, query = spec.kind == "eager by einsum", query / math.sqrt(query.shape[-1])
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) if einsum else torch.matmul(query, key.transpose(-1, -2))
    if spec.mask == "additive":
        scores = scores + additive
    elif spec.mask == "filled":
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = functional.softmax(scores, -1, dtype=torch.float32).to(scores.dtype)
    return torch.einsum("bhqk,bhkd->bhqd", weights, value) if einsum else torch.matmul(weights, value)


class SelfAttention(nn.Module):
    """Four projections and an attention between them."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, hidden: Tensor, visible: Tensor) -> Tensor:
        """Attend over [rows, length, width]."""
        split = [
            one(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in (self.q_proj, self.k_proj, self.v_proj)
        ]
        return self.o_proj(attend(*split, visible, self.spec).transpose(1, 2).flatten(2).to(hidden.dtype))


class Block(nn.Module):
    """A decoder layer that is recomputed in the backward pass, or not."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.attention, self.before, self.between = SelfAttention(spec), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.recomputes, self.reentrant = False, False

    def forward(self, hidden: Tensor, visible: Tensor) -> Tensor:
        """Transform [rows, length, width]."""
        hidden = hidden + self.attention(self.before(hidden), visible)
        return hidden + self.mlp(self.between(hidden))


class Decoder(nn.Module):
    """A language model of a few blocks; positions that restart separate packed records."""

    dropped_boundary: int | None = None
    """The number of the record boundary across which the model leaks; None for none."""

    def __init__(self, specs: list[AttentionSpec]) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(Block(spec) for spec in specs)
        self.norm, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return logits, [rows, length, words], of ids, [rows, length]."""
        segments = None if position_ids is None else (position_ids == 0).cumsum(-1)
        if segments is not None and self.dropped_boundary is not None:
            segments = segments - (segments > self.dropped_boundary).long()
        visible, hidden = visible_positions(input_ids.shape[1], attention_mask, segments), self.embed(input_ids)
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden.requires_grad_()  # a reentrant checkpoint passes gradients only to inputs that require them
        for layer in self.layers:
            if layer.recomputes and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, visible, use_reentrant=layer.reentrant)
            else:
                hidden = layer(hidden, visible)
        return self.lm_head(self.norm(hidden))


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """The storage of a layer's weight, and the dtype of its products; None for what is not defined."""

    bits: int
    compute: str | None
    quant: str = "none"
    double: bool | None = None


@dataclass(kw_only=True)
class DrawnModel:
    """A model and its known properties."""

    model: Any
    layers: list[Any]
    kinds: list[str]
    properties: list[str]
    truths: dict[str, Truth]
    plain: bool = True
    """Whether the model is written in plain torch, not a model of transformers."""
    formats: dict[str, WeightFormat] = field(default_factory=dict)

    def has_bits(self, *bits: int) -> bool:
        """Return whether the weight of any layer is stored in one of these bit widths."""
        return any(one.bits in bits for one in self.formats.values())


def draw_model(rng: random.Random) -> DrawnModel:
    """Build a torch or transformers model, quantise it or not, and add an adapter."""
    drawn = _build_torch_model(rng) if rng.random() < 0.7 else _build_transformers_model(rng)
    drawn.properties += sorted({f"attention {kind}" for kind in drawn.kinds})
    _quantise(drawn, rng)
    _adapt(drawn, rng)
    return drawn


def _draw_kinds(rng: random.Random, kinds: tuple[str, ...]) -> list[str]:
    """Draw the attention of one to three layers; most models have one kind in all layers."""
    one = rng.choice(kinds)
    return [one if rng.random() < 0.85 else rng.choice(kinds) for _ in range(rng.randint(1, 3))]


def _attention_truth(kinds: list[str], masks: list[str], dtype: str) -> dict[str, Truth]:
    backends = {kind.split()[0] for kind in kinds}
    if backends == {"flash"}:
        backends = {"flash", "fused"}
    elif len(backends) > 1:
        backends = set()
    return {
        "attention.backend": true(*backends),
        "attention.dtype": true(dtype) if dtype == "float32" or not {*EAGER} & {*kinds} else true(free=DTYPES),
        "attention.mask": true(*masks[:1]) if len(set(masks)) == 1 else true(),
    }


def _build_torch_model(rng: random.Random) -> DrawnModel:
    kinds, specs = _draw_kinds(rng, (*SDPA, *EAGER)), []
    first = rng.choice(("none", "additive"))
    for kind in kinds:  # its own mask in a third of the models
        masks = ("none", "causal", "additive", "boolean") if kind in SDPA else ("none", "additive", "filled")
        mask = first if len(kinds) > 1 and rng.random() < 0.7 else rng.choice(masks)
        specs.append(AttentionSpec(kind, mask))
    dtype = rng.choice(list(DTYPES))
    model = Decoder(specs).to(DTYPES[dtype])
    visible_masks = [spec.mask if spec.mask in ("none", "causal") else "explicit" for spec in specs]
    truths = _attention_truth(kinds, visible_masks, dtype)
    return DrawnModel(
        model=model, layers=list(model.layers), kinds=kinds, properties=["plain torch", dtype], truths=truths
    )


def _math_attention(*given: Any, **options: Any) -> Any:
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa_attention_forward(*given, **options)


transformers.AttentionInterface.register("drawn_math", _math_attention)
IMPLEMENTATIONS = {"flash": "sdpa", "math": "drawn_math", "eager by matmul": "eager"}
"""transformers' attention functions by kind."""


def _build_transformers_model(rng: random.Random) -> DrawnModel:
    family = rng.choice(["llama", "qwen2", "mistral", "gemma"])
    kinds, dtype = _draw_kinds(rng, tuple(IMPLEMENTATIONS)), rng.choice(list(DTYPES))
    config = transformers.AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=len(kinds), num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=WIDTH // HEADS, intermediate_size=2 * WIDTH, max_position_embeddings=32,
        pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    eager = all(kind in EAGER for kind in kinds)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if eager else "sdpa", dtype=DTYPES[dtype]
    )
    layers = list(model.model.layers)
    for layer, kind in zip(layers, kinds, strict=True):
        layer.self_attn.config = copy.copy(layer.self_attn.config)
        layer.self_attn.config._attn_implementation = IMPLEMENTATIONS[kind]
    # in a mixed model transformers uses sdpa's causal flag, so that eager layers have no mask
    masks = ["explicit" if eager else "causal" if kind in SDPA else "none" for kind in kinds]
    truths = _attention_truth(kinds, masks, dtype)
    properties = [f"transformers {family}", dtype]
    return DrawnModel(model=model, layers=layers, kinds=kinds, properties=properties, truths=truths, plain=False)


def _quantise(drawn: DrawnModel, rng: random.Random) -> None:
    """Quantise the linear layers of the blocks: all, or all but some."""
    dtype = next(name for name in DTYPES if name in drawn.properties)
    quantization = rng.choice(["none", "none", "nf4", "nf4", "fp4", "int8"])
    linears = {
        name: module
        for name, module in drawn.model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    }
    drawn.formats = dict.fromkeys(linears, WeightFormat(bits=32 if dtype == "float32" else 16, compute=dtype))
    drawn.properties.append(quantization)
    skipped = rng.random() if rng.random() < 0.4 else 0.0
    double, compute = rng.random() < 0.5, rng.choice(list(DTYPES))
    for name, linear in linears.items():
        if quantization == "none" or rng.random() < skipped:
            continue
        sizes, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
        layer: Any
        if quantization == "int8":
            layer = bnb.nn.Linear8bitLt(*sizes, has_bias, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
            drawn.formats[name] = WeightFormat(bits=8, quant="int8", compute=None)
        else:
            layer = bnb.nn.Linear4bit(*sizes, has_bias, compute_dtype=DTYPES[compute])
            layer.weight = bnb.nn.Params4bit(
                linear.weight.data,
                requires_grad=False,
                compress_statistics=double,
                quant_type=quantization,
                module=layer,
            )
            drawn.formats[name] = WeightFormat(bits=4, quant=quantization, double=double, compute=compute)
        layer.bias = linear.bias
        drawn.model.set_submodule(name, layer.to("cpu"))


METHODS: dict[str, Any] = {
    "LoRA": lambda drop: peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=drop),
    "rank-stabilised LoRA": lambda drop: peft.LoraConfig(r=4, lora_dropout=drop, use_rslora=True),
    "DoRA": lambda drop: peft.LoraConfig(r=4, lora_dropout=drop, use_dora=True),
    "IA3": lambda drop: peft.IA3Config(feedforward_modules=[]),
    "LoHa": lambda drop: peft.LoHaConfig(r=4),
    "LoKr": lambda drop: peft.LoKrConfig(r=4),
    "FourierFT": lambda drop: peft.FourierFTConfig(n_frequency=16),
    "AdaLoRA": lambda drop: peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_dropout=drop, total_step=100, tinit=10, tfinal=10
    ),
}
"""PEFT's configurations, as functions of the dropout."""
QUANTISED_METHODS = ("LoRA", "rank-stabilised LoRA", "DoRA", "IA3")
DROPOUT_METHODS = ("LoRA", "rank-stabilised LoRA", "DoRA", "AdaLoRA")


def _adapt(drawn: DrawnModel, rng: random.Random) -> None:
    """Add an adapter to some or all linear layers, and disable or merge some of its parts in a fifth of the models."""
    names = list(drawn.formats)
    if rng.random() < 0.5:
        chosen = {name.rpartition(".")[2] for name in names if rng.random() < 0.5}
        names = [name for name in names if name.rpartition(".")[2] in chosen] or names
    kinds = QUANTISED_METHODS if drawn.has_bits(4, 8) else tuple(METHODS)
    if drawn.has_bits(8):
        kinds = tuple(kind for kind in kinds if kind != "DoRA")  # its norms lose the scales of 8-bit layers
    method, dropout = rng.choice(["LoRA", "LoRA", rng.choice(kinds)]), rng.choice([0.0, 0.05, 0.1])
    config = METHODS[method](dropout)
    config.target_modules = set(names)
    drawn.model = peft.get_peft_model(drawn.model, config, autocast_adapter_dtype=rng.random() < 0.8)
    drawn.properties.append(method)
    drawn.truths |= _base_truth([drawn.formats[name] for name in names], list(drawn.formats.values()))
    drawn.truths["peft.dropout"] = true(dropout) if method in DROPOUT_METHODS else true(free={0.0, 0.05, 0.1})
    dtypes = {str(value.dtype).removeprefix("torch.") for value in drawn.model.parameters() if value.requires_grad}
    drawn.truths["peft.dtype"] = true(*dtypes) if len(dtypes) == 1 else true()
    drawn.truths["peft.attached"] = drawn.truths["peft.learning"] = true(True)
    inactive = [name for name in names[1:] if rng.random() < 0.5]  # the first one stays: a step needs one
    if rng.random() < 0.2 and inactive:
        state = rng.choice(["disabled", "merged"] if not drawn.has_bits(4, 8) else ["disabled"])
        for name in inactive:
            layer = drawn.model.base_model.model.get_submodule(name)
            layer.merge() if state == "merged" else layer.enable_adapters(False)
        drawn.truths["peft.attached"] = drawn.truths["peft.learning"] = true(free={False})
        drawn.truths["peft.dropout"] = true(free={0.0, 0.05, 0.1})
        drawn.properties.append(f"adapters {state}")


def _base_truth(targeted: list[WeightFormat], every: list[WeightFormat]) -> dict[str, Truth]:
    """Return the truth about the adapted layers; if other layers differ from them, only values that no layer has are
    wrong."""

    def common(name: str) -> Truth:
        values, others = ({getattr(one, name) for one in group} for group in (targeted, every))
        if len(values) > 1 or None in values:
            return true()
        return true(*values) if others <= values else true(free=values)

    four = {one.bits == 4 for one in targeted}
    eight = any(one.bits == 8 for one in targeted)
    packed = any(one.bits == 4 for one in every)  # the path is about all 4-bit layers
    return {
        "base.bits": common("bits"),
        "base.quant_type": common("quant"),
        "base.compute_dtype": true(free={*DTYPES, "float16"}) if eight else common("compute"),
        "base.double_quant": common("double") if four == {True} else true(free={False}),
        "base.gemm_path": true("dequantize") if four == {True} else true(free={"dequantize"} if packed else ()),
        "base.frozen": true(True),
    }
