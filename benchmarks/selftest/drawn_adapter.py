"""The adapter of a drawn model: a method of PEFT on some layers, whole or partly taken out of the forward pass."""

from __future__ import annotations

import random
from typing import Any

import peft
from drawn_truth import DTYPES, Drawn, Stored, Truth, true

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


def adapt(drawn: Drawn, draw: random.Random) -> None:
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
    passes = way == "merged" and drawn.style == "plain"  # its hidden states want a gradient anyway
    if way != "bypassed" and not passes and len(some) == len(drawn.targets):
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
