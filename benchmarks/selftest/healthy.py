"""Healthy runs: everyday training code, of which every claim is true.

Each is a `Twin` of something that could be mistaken for a fault: an optimizer that is given frozen parameters, a
warm-up that begins at a rate of 0, another model's calls inside the step. What needs a package that is not there is
skipped with the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from kernels_check.controls.small_run import fourbit

WORDS, ROWS, LENGTH, RATE = 96, 2, 12, 1e-2
RUNNING: dict[str, Any] = {"base.frozen": True, "lora.attached": True, "lora.learning": True, "compile": False}
"""True of any run that trains an adapter."""
PLAIN: dict[str, Any] = RUNNING | {
    "attention.backend": "flash", "base.bits": 32, "base.quant_type": "none", "checkpointing": False, "mode": "train",
    "optimizer.class": "torch.optim.AdamW", "optimizer.fused": False,
}  # fmt: skip
"""True of the plain run below."""


class SkippedError(Exception):
    """A twin that cannot be built here, with the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """A healthy run, ready to be verified."""

    model: Any
    step: Callable[[], object]
    required: Mapping[str, Any]
    batch: Mapping[str, Any] | None = None


MAKERS: dict[str, Callable[[], Twin]] = {}
"""Functions that build a twin anew, by its name."""


def twin(name: str) -> Callable[[Callable[[], Twin]], Callable[[], Twin]]:
    """Enter a function among the makers."""

    def enter(make: Callable[[], Twin]) -> Callable[[], Twin]:
        MAKERS[name] = make
        return make

    return enter


def llama(layers: int = 2, *, quant: str | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny Llama of random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, module in [*model.named_modules()]:
        if quant is not None and isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, last = name.rpartition(".")
            small = fourbit(module, quant_type=quant, compute=dtype)
            setattr(model.get_submodule(parent), last, small.to("cpu"))
    return model


def adapted(model: Any, **options: Any) -> Any:
    """With LoRA on the queries and values, unless told otherwise."""
    torch.manual_seed(4)
    options = {"r": 4, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    return peft.get_peft_model(model, peft.LoraConfig(**options)).train()


def words() -> Tensor:
    """A batch, [rows, length]."""
    torch.manual_seed(5)
    return torch.randint(3, WORDS, (ROWS, LENGTH))


def trained(model: Any) -> list[Any]:
    """Parameters that train."""
    return [value for value in model.parameters() if value.requires_grad]


def stepping(model: Any, optimizer: Any, **inputs: Any) -> Callable[[], None]:
    """The plainest step."""
    inputs = inputs or {"input_ids": (ids := words()), "labels": ids}

    def step() -> None:
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()

    return step


def plain(model: Any = None, make: Any = None, **required: Any) -> Twin:
    """The plain run, of another model or with another optimizer where given; a requirement of None is taken away."""
    model = adapted(llama()) if model is None else model
    optimizer = (make or (lambda given: torch.optim.AdamW(given, lr=RATE)))(trained(model))
    asked = {path: value for path, value in (PLAIN | required).items() if value is not None}
    return Twin(model=model, step=stepping(model, optimizer), required=asked)


@twin("quantised: NF4 in bfloat16, with a paged optimizer's plain sibling")
def _nf4() -> Twin:
    import bitsandbytes as bnb

    model = adapted(llama(quant="nf4", dtype=torch.bfloat16))
    return plain(
        model, lambda given: bnb.optim.AdamW8bit(given, lr=RATE),
        **{"base.bits": 4, "base.quant_type": "nf4", "base.double_quant": True, "base.compute_dtype": "bfloat16",
           "optimizer.class": "bitsandbytes.optim.AdamW8bit", "optimizer.fused": None},
    )  # fmt: skip


@twin("quantised: 8 bits, verified before its first step")
def _int8() -> Twin:
    import bitsandbytes as bnb

    model = llama(dtype=torch.bfloat16)
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, last = name.rpartition(".")
            small = bnb.nn.Linear8bitLt(module.in_features, module.out_features, False, has_fp16_weights=False)
            small.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            setattr(model.get_submodule(parent), last, small.to("cpu"))
    return plain(adapted(model), **{"base.bits": 8, "base.quant_type": "int8"})


def _recomputing(**options: Any) -> Twin:
    model = adapted(llama())
    model.base_model.model.gradient_checkpointing_enable(options)
    model.base_model.model.enable_input_require_grads()
    return plain(model, checkpointing=True)


@twin("recomputation: of the reentrant kind")
def _reentrant() -> Twin:
    return _recomputing(use_reentrant=True)


@twin("recomputation: of the kind without reentry")
def _not_reentrant() -> Twin:
    return _recomputing(use_reentrant=False)


@twin("recomputation: selective, products are kept")
def _selective() -> Twin:
    kept = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}

    def policy(context: Any, operator: Any, *given: Any, **options: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return _recomputing(use_reentrant=False, context_fn=functools.partial(create_selective_checkpoint_contexts, policy))
