"""Controls of what is trained beside an adapter: embeddings and norms."""

from __future__ import annotations

from functools import partial
from typing import Any

from negative_controls import bypassed_adapter
from negative_controls.control import Control, small
from negative_controls.small_run import SmallRun


def with_embeddings() -> Any:
    """LoRA, and copies of both embeddings that are trained whole, as for new tokens."""
    import peft

    return peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", modules_to_save=["embed_tokens", "lm_head"]
    )


def with_tokens() -> Any:
    """LoRA, and a few tokens of the vocabulary that are trained alone, as for new ones."""
    import peft

    return peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", trainable_token_indices=[1, 2, 3]
    )


def read_the_tokens(run: SmallRun) -> None:
    """Let the batch hold each of the tokens that are trained."""
    run.inputs["input_ids"][0, :3] = run.inputs["input_ids"].new_tensor([1, 2, 3])


def train_the_embedding(run: SmallRun, *, masked: bool = False) -> None:
    """Let both embeddings train, with weight decay.

    Args:
        run: to be changed.
        masked: whether a hook multiplies their gradients by zero, as a mask of tokens does that matches none.
    """
    weights = [run.model.get_input_embeddings().weight, run.model.get_output_embeddings().weight]
    for weight in weights:
        weight.requires_grad_(True)
        if masked:
            weight.register_hook(lambda gradient: gradient * 0)
    run.optimizer.add_param_group({"params": weights, "lr": 0.01, "weight_decay": 0.1})


def rename_the_norm(run: SmallRun, *, train: bool = True) -> None:
    """Give the last norm a class of one's own, whose name says nothing of norms.

    Args:
        run: to be changed.
        train: whether its weight trains, too.
    """
    norm = run.model.get_base_model().model.norm
    norm.__class__ = type("Scaled", (type(norm),), {})
    if train:
        train_norms(run, only="model.norm.weight")


def train_norms(run: SmallRun, *, only: str = "norm.weight", forgotten: bool = False, rate: float = 0.01) -> None:
    """Let norms train, and give them to the optimizer or forget to.

    Args:
        run: to be changed.
        only: ends of the names of those that train.
        forgotten: whether the optimizer is left as it was.
        rate: their learning rate.
    """
    norms = [value for name, value in run.model.named_parameters() if name.endswith(only)]
    for value in norms:
        value.requires_grad_(True)
    if not forgotten:
        run.optimizer.add_param_group({"params": norms, "lr": rate})


TRAINED_PARTS: tuple[Control, ...] = (
    Control(
        name="embeddings that are saved with the adapter and left out of the optimizer",
        path="embedding.trained",
        required=True,
        fault=small(bypassed_adapter.optimise_factors_only, adapter=with_embeddings),
        healthy=small(adapter=with_embeddings),
        words=("0 of 2 embeddings updated", "modules_to_save", "not given to an optimizer"),
    ),
    Control(
        name="a head that trains where the embeddings were to stay",
        path="embedding.trained",
        required=False,
        fault=small(adapter=bypassed_adapter.with_a_head),
        healthy=small(),
        words=("1 of 2 embeddings updated", "embed_tokens.weight (frozen)"),
    ),
    Control(
        name="norms that require gradients and are left out of the optimizer",
        path="norms.trained",
        required=True,
        fault=small(partial(train_norms, forgotten=True), quant=None, dtype="float32"),
        healthy=small(train_norms, quant=None, dtype="float32"),
        words=("0 of 5 norms updated", "not given to an optimizer"),
    ),
    Control(
        name="one norm of five that trains",
        path="norms.trained",
        required=True,
        fault=small(partial(train_norms, only="model.norm.weight"), quant=None, dtype="float32"),
        healthy=small(train_norms, quant=None, dtype="float32"),
        words=("1 of 5 norms updated", "input_layernorm.weight (frozen)"),
    ),
    Control(
        name="updates of norms that bfloat16 rounds away",
        path="norms.trained",
        required=True,
        fault=small(partial(train_norms, rate=1e-5), quant=None),
        healthy=small(partial(train_norms, rate=1e-5), quant=None, dtype="float32"),
        words=("0 of 5 norms updated", "rounded away: keep it in float32"),
    ),
    Control(
        name="tokens that train where the embeddings were to stay",
        path="embedding.trained",
        required=False,
        fault=small(read_the_tokens, adapter=with_tokens),
        healthy=small(read_the_tokens),
        words=("1 of 2 embeddings updated", "3 of 96 tokens", "lm_head.weight (frozen)"),
    ),
    Control(
        name="embeddings that nothing but weight decay moves",
        path="embedding.trained",
        required=True,
        fault=small(partial(train_the_embedding, masked=True), quant=None, dtype="float32"),
        healthy=small(train_the_embedding, quant=None, dtype="float32"),
        words=("0 of 2 embeddings updated", "moved without a gradient"),
    ),
    Control(
        name="a norm of one's own class that trains where the norms were to stay",
        path="norms.trained",
        required=False,
        fault=small(rename_the_norm, quant=None, dtype="float32"),
        healthy=small(partial(rename_the_norm, train=False), quant=None, dtype="float32"),
        words=("1 of 5 norms updated", "input_layernorm.weight (frozen)"),
    ),
)
