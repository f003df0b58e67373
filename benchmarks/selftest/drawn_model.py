"""The model of a drawn run: how it attends, how it is stored, what adapts it, what stands around it; and what is true.

The truth is written down where a choice is made, never read off the model afterwards.
"""

from __future__ import annotations

import copy
import random
from typing import Any

from drawn_adapter import adapt
from drawn_layers import BACKEND, HEADS, KINDS, UNRECOGNISABLE, WIDTH, WORDS, Attending, Decoder, masks_of, registered
from drawn_storage import quantise
from drawn_truth import DTYPES, Drawn, Truth, true
from torch import nn

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
    quantise(drawn, draw)
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
