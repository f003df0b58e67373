"""The model of a drawn run: how it attends, how it is stored, what adapts it, what stands around it; and what is true.

The truth is written down where a choice is made, never read off the model afterwards.
"""

from __future__ import annotations

import copy
import random
from typing import Any

from drawn_adapter import adapt
from drawn_layers import BACKEND, HEADS, KINDS, UNRECOGNISABLE, WIDTH, WORDS, Attending, Decoder, masks_of, registered
from drawn_truth import DTYPES, Drawn, Stored, Truth, true
from torch import nn

from kernels_check.controls.small_run import fourbit

PAD = 0


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
    adapt(drawn, draw)
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
