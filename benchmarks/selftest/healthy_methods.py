"""Healthy runs of the methods of PEFT: every type that it has, and LoRA in its variants, on the tiny Llama."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from healthy import MAKERS, PLAIN, RATE, ROWS, SkippedError, Twin, llama, stepping, trained, twin, words

ON = ["q_proj", "v_proj"]
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
REQUIRED = {
    path: value
    for path, value in PLAIN.items()
    if path not in ("base.bits", "base.quant_type", "attention.backend")  # some methods wrap none, or bring attention
}
METHODS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules=ON, **CAUSAL),
    "LoRA of all linear layers": lambda: peft.LoraConfig(r=4, target_modules="all-linear", **CAUSAL),
    "rank-stabilised LoRA": lambda: peft.LoraConfig(r=4, target_modules=ON, use_rslora=True, **CAUSAL),
    "DoRA": lambda: peft.LoraConfig(r=4, target_modules=ON, use_dora=True, **CAUSAL),
    "PiSSA": lambda: peft.LoraConfig(r=4, target_modules=ON, init_lora_weights="pissa", **CAUSAL),
    "LoRA with biases of B": lambda: peft.LoraConfig(r=4, target_modules=ON, lora_bias=True, **CAUSAL),
    "LoRA and the whole head": lambda: peft.LoraConfig(r=4, target_modules=ON, modules_to_save=["lm_head"], **CAUSAL),
    "LoRA of one layer": lambda: peft.LoraConfig(r=4, target_modules=ON, layers_to_transform=[1], **CAUSAL),
    "LoRA of embeddings": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", *ON], **CAUSAL),
    "LoRA and trainable tokens": lambda: peft.LoraConfig(
        r=4, target_modules=ON, trainable_token_indices=words().unique().tolist(), **CAUSAL
    ),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=ON, **CAUSAL),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=ON, **CAUSAL),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=50, tfinal=50, total_step=200, target_modules=ON, **CAUSAL
    ),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL
    ),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=16, target_modules=ON, **CAUSAL),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=ON, **CAUSAL),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=ON, **CAUSAL),
    "VeRA": lambda: peft.VeraConfig(r=8, target_modules=ON, **CAUSAL),
    "RandLoRA": lambda: peft.RandLoraConfig(r=8, target_modules=ON, **CAUSAL),
    "VB-LoRA": lambda: peft.VBLoRAConfig(r=4, num_vectors=12, vector_length=32, target_modules=ON, **CAUSAL),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=32, target_modules=ON, **CAUSAL),
    "WaveFT": lambda: peft.WaveFTConfig(n_frequency=32, target_modules=ON, **CAUSAL),
    "C3A": lambda: peft.C3AConfig(block_size=16, target_modules=ON, **CAUSAL),
    "SHiRA": lambda: peft.ShiraConfig(r=4, target_modules=ON, **CAUSAL),
    "MiSS": lambda: peft.MissConfig(r=4, target_modules=ON, **CAUSAL),
    "RoAd": lambda: peft.RoadConfig(group_size=16, target_modules=ON, **CAUSAL),
    "DeLoRA": lambda: peft.DeloraConfig(r=4, target_modules=ON, **CAUSAL),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], **CAUSAL),
    "trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=words().unique().tolist(), **CAUSAL),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, **CAUSAL),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "multitask prompt tuning": lambda: peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=3, num_tasks=2, num_ranks=1, **CAUSAL
    ),
    "context-aware prompt tuning": lambda: peft.CPTConfig(
        cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4], **CAUSAL
    ),
    "cartridge": lambda: peft.CartridgeConfig(num_virtual_tokens=3, num_frozen_tokens=1, **CAUSAL),
    "adaption prompts": lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, **CAUSAL),
    "AdaMSS": lambda: peft.AdamssConfig(r=4, target_modules=ON, **CAUSAL),
    "BEFT": lambda: peft.BeftConfig(target_modules=ON, **CAUSAL),
    "DEFT": lambda: peft.DeftConfig(r=4, target_modules=ON, **CAUSAL),
    "FRoD": lambda: peft.FrodConfig(target_modules=ON, **CAUSAL),
    "GLoRA": lambda: peft.GloraConfig(r=4, target_modules=ON, **CAUSAL),
    "GraLoRA": lambda: peft.GraloraConfig(r=4, hybrid_r=2, target_modules=ON, **CAUSAL),
    "HiRA": lambda: peft.HiraConfig(r=4, target_modules=ON, **CAUSAL),
    "Lily": lambda: peft.LilyConfig(r=4, stride_A=1, num_B=2, target_modules=ON, **CAUSAL),
    "OSF": lambda: peft.OSFConfig(effective_rank=8, target_modules=ON, **CAUSAL),
    "PEANuT": lambda: peft.PeanutConfig(r=4, target_modules=ON, **CAUSAL),
    "Poly": lambda: peft.PolyConfig(r=4, n_tasks=2, n_skills=2, target_modules=ON, **CAUSAL),
    "PSOFT": lambda: peft.PsoftConfig(r=4, target_modules=ON, **CAUSAL),
    "PVeRA": lambda: peft.PveraConfig(r=8, target_modules=ON, **CAUSAL),
    "ShadowPEFT": lambda: peft.ShadowConfig(shadow_num_hidden_layers=1, **CAUSAL),
    "supertuning": lambda: peft.SupertuningConfig(target_modules=ON, **CAUSAL),
    "TinyLoRA": lambda: peft.TinyLoraConfig(r=2, u=8, target_modules=ON, **CAUSAL),
    "Uni-LoRA": lambda: peft.UniLoraConfig(r=4, theta_d_length=64, target_modules=ON, **CAUSAL),
}
"""Configurations by method."""
MORE_INPUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "multitask prompt tuning": lambda: {"task_ids": torch.arange(ROWS)},
    "Poly": lambda: {"task_ids": torch.arange(ROWS)},
    "context-aware prompt tuning": lambda: {"input_type_mask": torch.full_like(words(), 4)},
}
"""What a method's forward takes beside tokens and labels."""


def _run_of(name: str) -> Twin:
    torch.manual_seed(4)
    base = llama()
    try:
        model = peft.get_peft_model(base, METHODS[name]()).train()
    except ImportError as error:
        raise SkippedError(str(error)) from error
    more = MORE_INPUTS.get(name, dict)()
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)
    step = stepping(model, optimizer, input_ids=words(), labels=words(), **more)
    return Twin(model=model, step=step, required=REQUIRED)


for _name in METHODS:
    MAKERS[f"PEFT: {_name}"] = functools.partial(_run_of, _name)


@twin("PEFT: X-LoRA")
def _xlora() -> Twin:
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: str(Path(folder, name)) for name in ("0", "1")}
        for path in paths.values():
            peft.get_peft_model(
                llama(), peft.LoraConfig(r=4, target_modules=ON, init_lora_weights=False, **CAUSAL)
            ).save_pretrained(path)
        config = peft.XLoraConfig(hidden_size=64, xlora_depth=2, xlora_size=16, adapters=paths, **CAUSAL)
        model = peft.get_peft_model(llama(use_cache=False), config).train()
    return Twin(model=model, step=stepping(model, torch.optim.AdamW(trained(model), lr=RATE)), required=REQUIRED)
