"""Small runs of models with other structures than the Llama of ``small_run``, and faults in a part of them.

They are an encoder-decoder with cross-attention, experts that are adapted as parameters, and dense layers of a model
type with experts. A check that assumes the structure of a Llama counts each of them wrongly.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch

from negative_controls.small_run import SmallRun, backward

_LORA: dict[str, Any] = {"r": 4, "lora_dropout": 0.0}
_SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def encoder_decoder() -> SmallRun:
    """Return a Bart of two layers in each half: six attentions, of which two attend to the encoder's output."""
    from transformers import AutoModelForSeq2SeqLM, BartConfig

    torch.manual_seed(7)
    halves = {
        f"{half}_{what}": size
        for half in ("encoder", "decoder")
        for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    config = BartConfig(vocab_size=96, d_model=32, max_position_embeddings=64, **halves)
    ids = torch.randint(3, 96, (2, 12))
    return _run(AutoModelForSeq2SeqLM.from_config(config), {"input_ids": ids, "labels": ids})


def experts(*, misspelt: bool = False) -> SmallRun:
    """Return a Mixtral whose experts are adapted as parameters."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(7)
    config = MixtralConfig(vocab_size=96, num_key_value_heads=2, num_local_experts=4, **_SIZES)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.dwon_proj" if misspelt else "mlp.experts.down_proj"]
    ids = torch.arange(1, 33).reshape(2, 16)
    model = AutoModelForCausalLM.from_config(config)
    return _run(model, {"input_ids": ids, "labels": ids}, targets=["q_proj"], target_parameters=names)


def dense(*, layers: int = 2, of_experts: bool = False) -> SmallRun:
    """Return a DeepSeek-V3 of dense layers, followed by expert layers if there are fewer than two.

    Args:
        layers: the number of dense layers.
        of_experts: whether the targets also include a name of its dense layers that PEFT takes for an expert's.
    """
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    torch.manual_seed(7)
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 2,
        "moe_intermediate_size": 16,
    }
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    sizes = {"vocab_size": 96, "num_key_value_heads": 4, "first_k_dense_replace": layers}
    config = DeepseekV3Config(**sizes, **_SIZES, **experts, **heads)
    ids = torch.arange(1, 33).reshape(2, 16)
    targets = ["q_a_proj", "kv_b_proj", *(["down_proj"] if of_experts else [])]
    return _run(AutoModelForCausalLM.from_config(config), {"input_ids": ids, "labels": ids}, targets=targets)


def cross_attend_eagerly(run: SmallRun) -> None:
    """Run the cross-attention of the decoder's last layer eagerly."""
    attention = [module for path, module in run.model.named_modules() if path.endswith("encoder_attn")][-1]
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = "eager"


def _run(model: Any, inputs: dict[str, Any], *, targets: Any = ("q_proj", "v_proj"), **options: Any) -> SmallRun:
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets), **_LORA, **options)).train()
    optimizer = torch.optim.AdamW([value for value in adapted.parameters() if value.requires_grad], lr=1e-2)
    return SmallRun(
        model=adapted, optimizer=optimizer, inputs=inputs, passes=lambda run: backward(run.model(**run.inputs).loss)
    )
