"""Random models for `random_models.py`: attention, storage and adapter, with the true value of each checked path.

The truth is recorded where a choice is made and never read from the model. The kind of an attention follows from its
code: on a CPU torch's scaled dot product is its flash kernel, unless the context forbids it; a softmax between two
products is eager.
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

WIDTH, HEADS, WORDS, PAD = 32, 2, 61, 0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Values that may be required of a path with a minimum share."""
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
    """Return a truth where these requirements hold and the free ones may hold."""
    return Truth(frozenset(holds), frozenset(free), hidden)


def at_least(share: float) -> Truth:
    """Return a truth where every minimum share up to this one holds."""
    return true(*(one for one in SHARES if one <= share))


@dataclass(frozen=True, slots=True)
class Attending:
    """How one layer attends; masks are none, causal (by flag), and explicit: additive, filled, boolean."""

    kind: str
    mask: str


def allowed(length: int, padding: Tensor | None, segments: Tensor | None) -> Tensor:
    """Return which token attends to which, [rows or 1, 1, length, length]: the past of its segment without padding."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if padding is not None:
        seen = seen & padding.bool()[:, None, None, :] | torch.eye(length, dtype=torch.bool)
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    return seen


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, how: Attending) -> Tensor:
    """Compute attention over [rows, heads, length, size]."""
    additive = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)
    if how.kind in SDPA:
        mask, causal = {"additive": additive, "boolean": seen}.get(how.mask), how.mask == "causal"
        with sdpa_kernel(SDPBackend.MATH) if how.kind == "math" else nullcontext():
            return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    einsum, query = how.kind == "eager by einsum", query / math.sqrt(query.shape[-1])
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) if einsum else torch.matmul(query, key.transpose(-1, -2))
    if how.mask == "additive":
        scores = scores + additive
    elif how.mask == "filled":
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = functional.softmax(scores, -1, dtype=torch.float32).to(scores.dtype)
    return torch.einsum("bhqk,bhkd->bhqd", weights, value) if einsum else torch.matmul(weights, value)


class SelfAttention(nn.Module):
    """Four projections and an attention between them."""

    def __init__(self, how: Attending) -> None:
        super().__init__()
        self.how = how
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        """Mix [rows, length, width]."""
        split = [
            one(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in (self.q_proj, self.k_proj, self.v_proj)
        ]
        return self.o_proj(attend(*split, seen, self.how).transpose(1, 2).flatten(2).to(hidden.dtype))


class Block(nn.Module):
    """A decoder layer that is recomputed in the backward pass, or not."""

    def __init__(self, how: Attending) -> None:
        super().__init__()
        self.attention, self.before, self.between = SelfAttention(how), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.recomputes, self.reentrant = False, False

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        """Transform [rows, length, width]."""
        hidden = hidden + self.attention(self.before(hidden), seen)
        return hidden + self.mlp(self.between(hidden))


class Decoder(nn.Module):
    """A language model of a few blocks; positions that restart separate packed records."""

    merges: int | None = None
    """The number of a record boundary that is dropped."""

    def __init__(self, hows: list[Attending]) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(WORDS, WIDTH), nn.ModuleList(Block(how) for how in hows)
        self.norm, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return logits, [rows, length, words], of ids, [rows, length]."""
        segments = None if position_ids is None else (position_ids == 0).cumsum(-1)
        if segments is not None and self.merges is not None:
            segments = segments - (segments > self.merges).long()
        seen, hidden = allowed(input_ids.shape[1], attention_mask, segments), self.embed(input_ids)
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden.requires_grad_()  # a reentrant checkpoint passes gradients only to inputs that require them
        for layer in self.layers:
            if layer.recomputes and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, seen, use_reentrant=layer.reentrant)
            else:
                hidden = layer(hidden, seen)
        return self.lm_head(self.norm(hidden))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How the weight of a layer is stored, and the dtype of its products; None: not defined."""

    bits: int
    compute: str | None
    quant: str = "none"
    double: bool | None = None


@dataclass(kw_only=True)
class Drawn:
    """A model and its known properties."""

    model: Any
    layers: list[Any]
    kinds: list[str]
    about: list[str]
    truths: dict[str, Truth]
    plain: bool = True
    """Whether it is of plain torch, not of transformers."""
    stored: dict[str, Stored] = field(default_factory=dict)

    def stores(self, *bits: int) -> bool:
        """Return whether any layer is stored in one of these bit widths."""
        return any(stored.bits in bits for stored in self.stored.values())


def draw_model(draw: random.Random) -> Drawn:
    """Build a torch or transformers model, quantise it or not, and add an adapter."""
    drawn = _plain(draw) if draw.random() < 0.7 else _transformers(draw)
    drawn.about += sorted({f"attention {kind}" for kind in drawn.kinds})
    _quantise(drawn, draw)
    _adapt(drawn, draw)
    return drawn


def _draw_kinds(draw: random.Random, kinds: tuple[str, ...]) -> list[str]:
    """Draw the kinds of one to three layers: one kind for all in most models."""
    one = draw.choice(kinds)
    return [one if draw.random() < 0.85 else draw.choice(kinds) for _ in range(draw.randint(1, 3))]


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


def _plain(draw: random.Random) -> Drawn:
    kinds, hows = _draw_kinds(draw, (*SDPA, *EAGER)), []
    first = draw.choice(("none", "additive"))
    for kind in kinds:  # its own mask in a third of the models
        masks = ("none", "causal", "additive", "boolean") if kind in SDPA else ("none", "additive", "filled")
        mask = first if len(kinds) > 1 and draw.random() < 0.7 else draw.choice(masks)
        hows.append(Attending(kind, mask))
    dtype = draw.choice(list(DTYPES))
    model = Decoder(hows).to(DTYPES[dtype])
    masks_seen = [how.mask if how.mask in ("none", "causal") else "explicit" for how in hows]
    truths = _attention_truth(kinds, masks_seen, dtype)
    return Drawn(model=model, layers=list(model.layers), kinds=kinds, about=["plain torch", dtype], truths=truths)


def _by_math(*given: Any, **options: Any) -> Any:
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa_attention_forward(*given, **options)


transformers.AttentionInterface.register("drawn_math", _by_math)
IMPLEMENTATIONS = {"flash": "sdpa", "math": "drawn_math", "eager by matmul": "eager"}
"""transformers' attention functions by kind."""


def _transformers(draw: random.Random) -> Drawn:
    family = draw.choice(["llama", "qwen2", "mistral", "gemma"])
    kinds, dtype = _draw_kinds(draw, tuple(IMPLEMENTATIONS)), draw.choice(list(DTYPES))
    config = transformers.AutoConfig.for_model(
        family, vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=len(kinds), num_attention_heads=HEADS,
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
    about = [f"transformers {family}", dtype]
    return Drawn(model=model, layers=layers, kinds=kinds, about=about, truths=truths, plain=False)


def _quantise(drawn: Drawn, draw: random.Random) -> None:
    """Quantise the linear layers of the blocks: all, or all but some."""
    dtype = next(name for name in DTYPES if name in drawn.about)
    how = draw.choice(["none", "none", "nf4", "nf4", "fp4", "int8"])
    linears = {
        name: module
        for name, module in drawn.model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    }
    drawn.stored = dict.fromkeys(linears, Stored(bits=32 if dtype == "float32" else 16, compute=dtype))
    drawn.about.append(how)
    skipped = draw.random() if draw.random() < 0.4 else 0.0
    double, compute = draw.random() < 0.5, draw.choice(list(DTYPES))
    for name, linear in linears.items():
        if how == "none" or draw.random() < skipped:
            continue
        sizes, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
        small: Any
        if how == "int8":
            small = bnb.nn.Linear8bitLt(*sizes, has_bias, has_fp16_weights=False)
            small.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
            drawn.stored[name] = Stored(bits=8, quant="int8", compute=None)
        else:
            small = bnb.nn.Linear4bit(*sizes, has_bias, compute_dtype=DTYPES[compute])
            small.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, compress_statistics=double, quant_type=how, module=small
            )
            drawn.stored[name] = Stored(bits=4, quant=how, double=double, compute=compute)
        small.bias = linear.bias
        drawn.model.set_submodule(name, small.to("cpu"))


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
FOR_QUANTISED = ("LoRA", "rank-stabilised LoRA", "DoRA", "IA3")
WITH_DROPOUT = ("LoRA", "rank-stabilised LoRA", "DoRA", "AdaLoRA")


def _adapt(drawn: Drawn, draw: random.Random) -> None:
    """Add an adapter to some or all linear layers, and remove some of these from the forward pass."""
    names = list(drawn.stored)
    if draw.random() < 0.5:
        chosen = {name.rpartition(".")[2] for name in names if draw.random() < 0.5}
        names = [name for name in names if name.rpartition(".")[2] in chosen] or names
    kinds = FOR_QUANTISED if drawn.stores(4, 8) else tuple(METHODS)
    if drawn.stores(8):
        kinds = tuple(kind for kind in kinds if kind != "DoRA")  # its norms lose the scales of 8-bit layers
    method, dropout = draw.choice(["LoRA", "LoRA", draw.choice(kinds)]), draw.choice([0.0, 0.05, 0.1])
    config = METHODS[method](dropout)
    config.target_modules = set(names)
    drawn.model = peft.get_peft_model(drawn.model, config, autocast_adapter_dtype=draw.random() < 0.8)
    drawn.about.append(method)
    drawn.truths |= _base_truth([drawn.stored[name] for name in names], list(drawn.stored.values()))
    drawn.truths["peft.dropout"] = true(dropout) if method in WITH_DROPOUT else true(free={0.0, 0.05, 0.1})
    dtypes = {str(value.dtype).removeprefix("torch.") for value in drawn.model.parameters() if value.requires_grad}
    drawn.truths["peft.dtype"] = true(*dtypes) if len(dtypes) == 1 else true()
    drawn.truths["peft.attached"] = drawn.truths["peft.learning"] = true(True)
    out = [name for name in names[1:] if draw.random() < 0.5]  # the first one stays: a step needs one
    if draw.random() < 0.2 and out:
        way = draw.choice(["disabled", "merged"] if not drawn.stores(4, 8) else ["disabled"])
        for name in out:
            layer = drawn.model.base_model.model.get_submodule(name)
            layer.merge() if way == "merged" else layer.enable_adapters(False)
        drawn.truths["peft.attached"] = drawn.truths["peft.learning"] = true(free={False})
        drawn.truths["peft.dropout"] = true(free={0.0, 0.05, 0.1})
        drawn.about.append(f"adapters {way}")


def _base_truth(targeted: list[Stored], every: list[Stored]) -> dict[str, Truth]:
    """Return the truth of the targeted layers; where others differ, only values that no layer has are wrong."""

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
