"""The model of a drawn run: how it attends, how it is stored, what adapts it, what stands around it; and what is true.

The truth is written down where a choice is made, never read off the model afterwards.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from drawn_layers import BACKEND, HEADS, KINDS, UNRECOGNISABLE, WIDTH, WORDS, Attending, Decoder, masks_of, registered
from torch import nn

from kernels_check.controls.small_run import fourbit

PAD = 0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What is true of one path."""

    holds: frozenset[Any] = frozenset()
    """Requirements that are met; any other is not."""
    free: frozenset[Any] = frozenset()
    """Requirements of which the words of the path do not say whether they are met."""
    hidden: bool = False
    """Whether nobody could see it, so that unknown is right, too."""


def true(*holds: Any, free: Any = (), hidden: bool = False) -> Truth:
    """Truth of a path for which these requirements hold."""
    return Truth(holds=frozenset(holds), free=frozenset(free), hidden=hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How the weight of one layer is stored, and what its products are computed in; None: not said."""

    bits: int
    quant: str = "none"
    double: bool | None = None
    compute: str | None


@dataclass(kw_only=True)
class Drawn:
    """A model and what is known of it; mutable while it is being built."""

    model: Any
    """What is verified."""
    adapted: Any
    """What PEFT returned: the model, or what is inside of it."""
    layers: list[Any]
    """Decoder layers, in their order."""
    truths: dict[str, Truth] = field(default_factory=dict)
    about: list[str] = field(default_factory=list)
    style: str = "plain"
    held: bool = False
    stored: dict[str, Stored] = field(default_factory=dict)
    targets: dict[str, Any] = field(default_factory=dict)
    """Adapted layers by name."""

    @property
    def eight(self) -> bool:
        """Whether any layer is stored in 8 bits."""
        return any(stored.bits == 8 for stored in self.stored.values())

    @property
    def small(self) -> bool:
        """Whether any layer is stored in fewer than 16 bits."""
        return any(stored.bits < 16 for stored in self.stored.values())


class Held(nn.Module):
    """Somebody's own module around a model, under a name that says nothing of what is in it."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, model)

    def forward(self, **inputs: Any) -> Any:
        """What the model gives."""
        return self.get_submodule(self.name)(**inputs)


def draw_model(draw: random.Random) -> Drawn:
    """Build a model: a plain one of torch, or one of transformers."""
    drawn = _plain(draw) if draw.random() < 0.7 else _transformers(draw)
    _quantise(drawn, draw)
    _adapt(drawn, draw)
    name = draw.choice([None, None, "inner", "lora_model", "base_model", "adapter.lora_A"])
    if name is not None:
        parts = name.split(".")
        for part in reversed(parts):
            drawn.model = Held(drawn.model, part)
            drawn.held = True
        drawn.about.append(f"held as {name}")
    return drawn


def _attending(draw: random.Random, kinds: tuple[str, ...]) -> list[str]:
    """Kinds of one to three layers: one for all in most models."""
    number = draw.randint(1, 3)
    one = draw.choice(kinds)
    return [one if draw.random() < 0.85 else draw.choice(kinds) for _ in range(number)]


def _attention_truth(kinds: list[str], masks: list[str], dtype: str, *, upcast: bool) -> dict[str, Truth]:
    backends = {BACKEND[kind] for kind in kinds}
    hand = UNRECOGNISABLE in kinds
    told: dict[str, Truth] = {"attention.backend": true(), "attention.dtype": true(), "attention.mask": true()}
    if hand:
        free = {"eager"} if backends <= {"eager", UNRECOGNISABLE} else set()
        told["attention.backend"] = true(free=free)
        told["attention.dtype"] = true(free={dtype})  # what nobody recognises has a dtype for all that
        told["attention.mask"] = true(free={"none", "causal", "explicit"})
        return told
    if len(backends) == 1:
        (backend,) = backends
        told["attention.backend"] = true(*(("flash", "fused") if backend == "flash" else (backend,)))
    told["attention.dtype"] = true(free={dtype, "float32"}) if upcast else true(dtype)
    if len(set(masks)) == 1:
        told["attention.mask"] = true(masks[0])
    return told


def _plain(draw: random.Random) -> Drawn:
    kinds = _attending(draw, KINDS)
    hows = [Attending(kind, draw.choice(masks_of(kind)), draw.random() < 0.3) for kind in kinds]
    if draw.random() < 0.7:  # otherwise a mask of its own in each layer
        first = hows[0].mask
        hows = [Attending(one.kind, first if first in masks_of(one.kind) else one.mask, one.upcast) for one in hows]
    dtype = draw.choice(list(DTYPES))
    model = Decoder(hows).to(DTYPES[dtype])
    upcast = any(BACKEND[how.kind] == "eager" and how.upcast for how in hows) and dtype == "bfloat16"
    drawn = Drawn(model=model, adapted=model, layers=list(model.layers))
    drawn.truths = _attention_truth(kinds, [how.seen_mask for how in hows], dtype, upcast=upcast)
    drawn.about += ["plain torch", dtype, *(f"attention {kind}" for kind in sorted(set(kinds)))]
    drawn.about += ["mixed attention"] if len({BACKEND[kind] for kind in kinds}) > 1 else []
    return drawn


def _transformers(draw: random.Random) -> Drawn:
    import transformers

    names = registered()
    family = draw.choice(["llama", "qwen2", "gpt2", "opt", "mistral", "gemma"])
    kinds = _attending(draw, tuple(names))
    small: dict[str, Any] = {
        "vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": len(kinds),
        "num_attention_heads": HEADS, "max_position_embeddings": 32, "pad_token_id": PAD, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    if family in ("llama", "qwen2", "mistral", "gemma"):
        small |= {"num_key_value_heads": HEADS, "head_dim": WIDTH // HEADS}
    if family == "gpt2":
        small |= {"attn_pdrop": 0.0, "n_inner": 2 * WIDTH}
    if family == "opt":
        small |= {"ffn_dim": 2 * WIDTH, "word_embed_proj_dim": WIDTH, "attention_dropout": 0.0}
    pruned = draw.random() < 0.2
    if pruned:
        small["num_hidden_layers"] += 1
    config = transformers.AutoConfig.for_model(family, **small)
    dtype = draw.choice(list(DTYPES))
    whole = "eager" if all(BACKEND[kind] == "eager" for kind in kinds) else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=whole, dtype=DTYPES[dtype])
    inner = model.base_model
    inner = getattr(inner, "decoder", inner)
    stack = "h" if family == "gpt2" else "layers"
    if pruned:
        setattr(inner, stack, getattr(inner, stack)[: len(kinds)])
    layers = list(getattr(inner, stack))
    for layer, kind in zip(layers, kinds, strict=True):
        attention = layer.attn if family == "gpt2" else layer.self_attn
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation = names[kind]
    # the mask that sdpa leaves to a flag is left out in eager, which then has none
    masks = ["causal" if BACKEND[kind] in ("flash", "math") else "none" for kind in kinds]
    if whole == "eager":
        masks = ["explicit"] * len(kinds)
    drawn = Drawn(model=model, adapted=model, layers=layers, style=family)
    drawn.truths = _attention_truth(
        kinds, masks, dtype, upcast="eager in 4 dimensions" in kinds and dtype == "bfloat16"
    )
    drawn.about += [f"transformers {family}", dtype, *(f"attention {kind}" for kind in sorted(set(kinds)))]
    drawn.about += ["mixed attention"] if len({BACKEND[kind] for kind in kinds}) > 1 else []
    drawn.about += ["pruned"] if pruned else []
    return drawn


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers of the blocks, by name; those that adapters leave alone are left out."""
    from transformers.pytorch_utils import Conv1D

    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and "lm_head" not in name
    }


def _quantise(drawn: Drawn, draw: random.Random) -> None:
    """Store linear layers in fewer bits: all, or all but some."""
    import bitsandbytes as bnb

    dtype = next(name for name in DTYPES if name in drawn.about)
    how = draw.choice(["none", "none", "nf4", "nf4", "fp4", "int8"])
    linears = _linears(drawn.model)
    whole = Stored(bits=32 if dtype == "float32" else 16, compute=dtype)
    drawn.stored = dict.fromkeys(linears, whole)
    if how == "none":
        return
    rows = [name for name, linear in linears.items() if type(linear) is nn.Linear]
    skipped = {name for name in rows if draw.random() < 0.3} if draw.random() < 0.4 else set()
    double, compute = draw.random() < 0.5, draw.choice(list(DTYPES))
    for name in sorted(set(rows) - skipped):
        linear: Any = linears[name]
        small: Any
        if how == "int8":
            small = bnb.nn.Linear8bitLt(
                linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
            )
            small.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
            drawn.stored[name] = Stored(bits=8, quant="int8", compute=None)
        else:
            small = fourbit(linear, quant_type=how, double=double, compute=DTYPES[compute])
            drawn.stored[name] = Stored(bits=4, quant=how, double=double, compute=compute)
        small.bias = linear.bias
        parent, _, last = name.rpartition(".")
        setattr(drawn.model.get_submodule(parent), last, small.to("cpu"))
    drawn.about += [how, *(["some layers skipped by the quantiser"] if skipped else [])]


FLOATING = {
    "LoRA": lambda names, drop: peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=drop, target_modules=names),
    "rank-stabilised LoRA": lambda names, drop: peft.LoraConfig(
        r=4, lora_dropout=drop, target_modules=names, use_rslora=True
    ),
    "DoRA": lambda names, drop: peft.LoraConfig(r=4, lora_dropout=drop, target_modules=names, use_dora=True),
    "IA3": lambda names, drop: peft.IA3Config(target_modules=names, feedforward_modules=[]),
    "LoHa": lambda names, drop: peft.LoHaConfig(r=4, target_modules=names),
    "LoKr": lambda names, drop: peft.LoKrConfig(r=4, target_modules=names),
    "OFT": lambda names, drop: peft.OFTConfig(r=0, oft_block_size=8, target_modules=names),
    "BOFT": lambda names, drop: peft.BOFTConfig(boft_block_size=8, target_modules=names),
    "HRA": lambda names, drop: peft.HRAConfig(r=4, target_modules=names),
    "FourierFT": lambda names, drop: peft.FourierFTConfig(n_frequency=16, target_modules=names),
    "MiSS": lambda names, drop: peft.MissConfig(r=4, target_modules=names),
    "AdaLoRA": lambda names, drop: peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_dropout=drop, target_modules=names, total_step=100, tinit=10, tfinal=10
    ),
}
"""Adapters by method, from names and a dropout to PEFT's configuration."""
QUANTISED = ("LoRA", "rank-stabilised LoRA", "DoRA", "IA3")
WITH_DROPOUT = ("LoRA", "rank-stabilised LoRA", "DoRA", "AdaLoRA")


def _adapt(drawn: Drawn, draw: random.Random) -> None:
    """Give the model an adapter, and break some of them."""
    names = list(drawn.stored)
    if draw.random() < 0.5:
        chosen = {name.rpartition(".")[2] for name in names if draw.random() < 0.5}
        names = [name for name in names if name.rpartition(".")[2] in chosen] or names
    square = all(_is_square(drawn.model.get_submodule(name)) for name in names)
    kinds = (
        list(QUANTISED)
        if drawn.small or drawn.style == "gpt2"
        else [kind for kind in FLOATING if square or kind not in ("MiSS", "BOFT", "HRA", "OFT")]
    )
    if drawn.eight:
        kinds.remove("DoRA")  # its norms lose the scales of 8-bit layers
    method = draw.choice(["LoRA", "LoRA", draw.choice(kinds)])
    dropout = draw.choice([0.0, 0.05, 0.1])
    options: dict[str, Any] = {"autocast_adapter_dtype": draw.random() < 0.8}
    drawn.adapted = drawn.model = peft.get_peft_model(drawn.model, FLOATING[method](names, dropout), **options)
    drawn.about += [method, f"{len(names)} targets" if len(names) < 4 else "4 targets or more"]
    base = [drawn.stored[name] for name in names]
    drawn.truths |= _base_truth(base, every=list(drawn.stored.values()))
    drawn.truths["lora.dropout"] = true(dropout) if method in WITH_DROPOUT else true(free={0.0, 0.05, 0.1})
    dtypes = {str(value.dtype).removeprefix("torch.") for value in drawn.adapted.parameters() if value.requires_grad}
    drawn.truths["lora.dtype"] = true(*dtypes) if len(dtypes) == 1 else true()
    layers = {name: drawn.adapted.base_model.model.get_submodule(name) for name in names}
    drawn.truths["lora.attached"] = drawn.truths["lora.learning"] = true(True)
    drawn.targets = layers
    if draw.random() < 0.2:
        _break(drawn, draw, method)


def _is_square(module: Any) -> bool:
    return getattr(module, "in_features", 0) == getattr(module, "out_features", 1)


def _break(drawn: Drawn, draw: random.Random, method: str) -> None:
    """Take some adapters out of the forward pass."""
    some = [name for name in drawn.targets if draw.random() < 0.5] or [next(iter(drawn.targets))]
    ways = ["disabled", "disabled"]
    if all(drawn.stored[name].bits >= 16 for name in drawn.stored):
        ways.append("merged")
    queries = [name for name in drawn.targets if name.endswith("attention.q_proj")]
    if queries and drawn.style == "plain":
        ways.append("bypassed")
    way = draw.choice(ways)
    if way == "disabled" and len(some) == len(drawn.targets):
        some.pop()  # with nothing that trains there is no step
        if not some:
            return
    if way == "bypassed":
        for name in queries:
            drawn.adapted.base_model.model.get_submodule(name.rpartition(".")[0]).bypassed = True
    for name in some if way != "bypassed" else ():
        layer = drawn.targets[name]
        if way == "disabled":
            layer.enable_adapters(False)
        else:
            layer.merge()
    drawn.truths["lora.attached"] = drawn.truths["lora.learning"] = true(free={False})
    if way == "bypassed":  # what the adapter's own layer would have multiplied is multiplied elsewhere
        drawn.truths["lora.dropout"] = true(free=drawn.truths["lora.dropout"].holds | drawn.truths["lora.dropout"].free)
    else:
        drawn.truths["lora.dropout"] = true(free={0.0, 0.05, 0.1})
    drawn.about.append(f"adapters {way}")


def _base_truth(targeted: list[Stored], every: list[Stored]) -> dict[str, Truth]:
    """Of the targeted layers; where others differ, only what is true of none is wrong."""

    def one(values: set[Any], others: set[Any]) -> Truth:
        if len(values) > 1 or None in values:
            return true()
        return true(*values) if others <= values else true(free=values)

    def both(take: Any) -> Truth:
        return one({take(one) for one in targeted}, {take(one) for one in every})

    four = {one.bits == 4 for one in targeted}
    eight = any(one.bits == 8 for one in targeted)
    told = {
        "base.bits": both(lambda stored: stored.bits),
        "base.quant_type": both(lambda stored: stored.quant),
        "base.compute_dtype": both(lambda stored: stored.compute),
        "base.double_quant": both(lambda stored: stored.double) if four == {True} else true(free={False}),
        "base.gemm_path": true("dequantize") if four == {True} else true(free={"dequantize"} if True in four else ()),
        "base.frozen": true(True),
    }
    if eight:
        told["base.compute_dtype"] = true(free=DTYPES.keys() | {"float16"})
    return told
