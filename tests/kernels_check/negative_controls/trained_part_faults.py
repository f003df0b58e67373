"""Faults and healthy variations of training embeddings and norms with an adapter."""

from __future__ import annotations

from typing import Any

from negative_controls.small_run import SmallRun


def with_embeddings() -> Any:
    """Return LoRA with fully trained copies of both embeddings, as used for new tokens."""
    import peft

    return peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", modules_to_save=["embed_tokens", "lm_head"]
    )


def train_the_embedding(run: SmallRun, *, masked: bool = False) -> None:
    """Let both embeddings train, with weight decay.

    Args:
        run: to be changed.
        masked: whether a hook multiplies their gradients by zero, as a token mask without a match does.
    """
    weights = [run.model.get_input_embeddings().weight, run.model.get_output_embeddings().weight]
    for weight in weights:
        weight.requires_grad_(True)
        if masked:
            weight.register_hook(lambda gradient: gradient * 0)
    run.optimizer.add_param_group({"params": weights, "lr": 0.01, "weight_decay": 0.1})


def train_norms(run: SmallRun, *, only: str = "norm.weight", forgotten: bool = False, rate: float = 0.01) -> None:
    """Let norms train, and give them to the optimizer or forget to.

    Args:
        run: to be changed.
        only: suffix of the names of the trained norms.
        forgotten: whether the optimizer is left unchanged.
        rate: their learning rate.
    """
    norms = [value for name, value in run.model.named_parameters() if name.endswith(only)]
    for value in norms:
        value.requires_grad_(True)
    if not forgotten:
        run.optimizer.add_param_group({"params": norms, "lr": rate})
