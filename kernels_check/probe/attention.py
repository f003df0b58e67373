"""Attention paths, tried as a Llama layer of transformers calls them, forward and backward.

Queries, keys and values are random, in bfloat16, causal, [2, 4, 256, 64]; the reference is attention written out in
double precision, the plain path the ``eager`` function of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from kernels_check.judges.attention import KERNEL_BACKENDS
from kernels_check.probe.attempt import (
    Executed,
    Try,
    against_same_precision,
    cast,
    paired,
    step_of,
    watch,
    with_gradients,
)
from kernels_check.probe.result import Attempt
from kernels_check.rules import attention_backend

_ROWS, _HEADS, _TOKENS, _SIZE = 2, 4, 256, 64


@cache
def _inputs(device: str) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    shape = (_ROWS, _HEADS, _TOKENS, _SIZE)
    return {name: torch.randn(shape, generator=generator).to(device, torch.bfloat16) for name in "qkv"}


def _written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention in the precision of its inputs."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(_SIZE)
    hidden = torch.ones(_TOKENS, _TOKENS, dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value


def _layer(implementation: str, device: str) -> Any:
    """The attention of a small Llama; transformers raises here where it cannot provide ``implementation``."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=_HEADS * _SIZE,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.bfloat16)
    return model.to(device).train().model.layers[0].self_attn


def _function(implementation: str, device: str) -> Callable[..., Tensor]:
    """The attention function that the layer calls, from queries, keys and values to outputs of the same shape."""
    layer = _layer(implementation, device)
    mask: Any = None
    if implementation == "eager":
        from transformers.models.llama.modeling_llama import eager_attention_forward as forward

        hidden = torch.ones(_TOKENS, _TOKENS, dtype=torch.bool, device=device).triu(1)
        mask = torch.zeros(1, 1, _TOKENS, _TOKENS, dtype=torch.bfloat16, device=device).masked_fill(
            hidden, torch.finfo(torch.bfloat16).min
        )
    else:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        forward = ALL_ATTENTION_FUNCTIONS[implementation]
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def causal(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return query >= key

        mask = create_block_mask(causal, None, None, _TOKENS, _TOKENS, device=device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = forward(layer, query, key, value, mask, scaling=layer.scaling, dropout=0.0)[0]
        return output.transpose(1, 2)

    return attend


def _try(
    device: str,
    *,
    backend: str,
    implementation: str,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Attempt:
    inputs = _inputs(device)
    bare = step_of(_function(implementation, device), inputs)

    def step() -> Mapping[str, Tensor]:
        with around():
            return bare()

    found = step()
    executed = watch(step)
    seen = backends(executed)
    evidence = ", ".join(_named(executed)) or "no attention operator or kernel"
    if seen != {backend}:
        return Attempt(ran=False, evidence=evidence)
    plain = with_gradients(_written_out, inputs)
    exact = with_gradients(_written_out, cast(inputs, torch.float64))
    speed = paired(step, step_of(_function("eager", device), inputs), "eager")
    return Attempt(ran=True, evidence=evidence, exactness=against_same_precision(found, plain, exact), speed=speed)


def backends(executed: Executed) -> set[str]:
    """Every attention implementation that an operator or a kernel belongs to."""
    by_operator = {attention_backend(name) for name in executed.operators} - {None}
    by_kernel = {KERNEL_BACKENDS[rule] for rule in executed.kernels if rule in KERNEL_BACKENDS}
    # Where kernels show the version of flash, they overrule its operator, which is the same for all.
    if "flash" in by_operator and by_kernel & {"flash_attention_3", "flash_attention_4"}:
        by_operator.discard("flash")
    return {str(name) for name in by_operator | by_kernel}


def _named(executed: Executed) -> list[str]:
    operators = [name for name in executed.operators if attention_backend(name) and "ackward" not in name]
    return sorted(operators) + sorted(rule for rule in executed.kernels if rule.startswith("ATT-"))


def _sdpa(name: str, backend: str) -> Try:
    def attempt(device: str) -> Attempt:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        only = partial(sdpa_kernel, getattr(SDPBackend, name))
        return _try(device, backend=backend, implementation="sdpa", around=only)

    return attempt


TRIES: Mapping[str, Try] = {
    "SDPA flash": _sdpa("FLASH_ATTENTION", "flash"),
    "SDPA cuDNN": _sdpa("CUDNN_ATTENTION", "cudnn"),
    "SDPA memory-efficient": _sdpa("EFFICIENT_ATTENTION", "efficient"),
    "SDPA math": _sdpa("MATH", "math"),
    "flash-attn 2 package": partial(_try, backend="flash_attention_2", implementation="flash_attention_2"),
    "flash-attn 3 package": partial(_try, backend="flash_attention_3", implementation="flash_attention_3"),
    "flash-attn 4 package": partial(_try, backend="flash_attention_4", implementation="flash_attention_4"),
    "flex attention": partial(_try, backend="flex", implementation="flex_attention"),
}
