"""Faults in some layers of a run, and healthy variations of a step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from negative_controls.small_run import SmallRun, wrap_step


def retry_pass(run: SmallRun, *, first: Callable[[], Any] = nullcontext, then: Callable[[], Any] = nullcontext) -> None:
    """Let the first pass of each step fail after its last block, within ``first``, and repeat it within ``then``."""
    failing: list[bool] = []

    def fail(*_: object) -> None:
        if failing:
            failing.pop()
            raise MemoryError("out of memory")

    def passes(run: SmallRun) -> Any:
        failing.append(True)
        with suppress(MemoryError), first():
            run.one_pass()
        with then():
            return run.one_pass()

    run.model.get_base_model().lm_head.register_forward_pre_hook(fail)
    run.passes = passes


def write_one_layer_by_hand(run: SmallRun) -> None:
    """Replace one attention by running means over the tokens, whose operators do not look like attention."""
    attention = _layers(run)[1].self_attn

    def forward(hidden_states: Any, **_: Any) -> Any:
        values = attention.v_proj(hidden_states).repeat(1, 1, 2)
        counts = torch.arange(1, values.shape[1] + 1, device=values.device).unsqueeze(-1)
        return attention.o_proj((values.float().cumsum(1) / counts).to(values.dtype)), None

    attention.forward = forward


def split_heads(run: SmallRun, *, by_hand: bool) -> None:
    """Compute attention in two halves of the heads; the second by scaled dot products or by exp and sum."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend_by_exp_and_sum(*states: Any) -> Any:
        # With three dimensions, no operator looks like attention.
        query, key, value = (one.flatten(0, 1) for one in states)
        weights = (query.unsqueeze(2) * key.unsqueeze(1)).sum(-1).mul(query.shape[-1] ** -0.5).exp().tril()
        weights = weights / weights.sum(-1, keepdim=True)
        return (weights.unsqueeze(-1) * value.unsqueeze(1)).sum(2).view(states[0].shape)

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> Any:
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in (key, value))
        first, second = zip(*(one.chunk(2, dim=1) for one in (query, key, value)), strict=True)
        halves = [
            scaled_dot_product_attention(*first, is_causal=True),
            attend_by_exp_and_sum(*second) if by_hand else scaled_dot_product_attention(*second, is_causal=True),
        ]
        return torch.cat(halves, dim=1).transpose(1, 2), None

    name = "half of the heads by hand" if by_hand else "two halves of the heads"
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    run.model.get_base_model().config._attn_implementation = name


def drop_attention(run: SmallRun, *, detached: bool = False) -> None:
    """Call SDPA in every layer and drop its result; with ``detached``, call it on other tensors."""
    for block in _layers(run):
        block.self_attn.forward = _by_hand(block.self_attn, partial(_attend_and_drop, detached=detached))


def _attend_and_drop(query: Any, key: Any, value: Any, *, detached: bool) -> Any:
    states = [one.detach() if detached else one for one in (query, key, value)]
    scaled_dot_product_attention(*states, is_causal=True)
    return value.cumsum(2) / value.shape[2]


def skip_attention(run: SmallRun) -> None:
    """Remove the attention of a block and keep its feed-forward part."""
    block = _layers(run)[1]
    block.forward = lambda hidden_states, **_: hidden_states + block.mlp(hidden_states)


def skip_feed_forward(run: SmallRun) -> None:
    """Replace a feed-forward part by the identity."""
    _layers(run)[1].mlp.forward = lambda x: x


def evaluate_inside(run: SmallRun) -> None:
    """Evaluate at the beginning of every step, as callbacks do."""

    def evaluate() -> None:
        run.model.eval()
        with torch.no_grad(), run.step_context():
            run.model(**run.inputs, use_cache=False)
        run.model.train()

    wrap_step(run, before=evaluate)


def use_eager_attention(run: SmallRun, *, fill: bool = False, through_float: bool = False) -> None:
    """Compute attention by products and a softmax, over all tokens; with ``fill``, mask future tokens."""
    for block in _layers(run):
        block.self_attn.forward = _by_hand(
            block.self_attn, partial(_attend_by_products, fill=fill, through_float=through_float)
        )


def fill_a_mask(run: SmallRun) -> None:
    """Compute attention by products and a softmax, with future tokens masked."""
    use_eager_attention(run, fill=True)


def _by_hand(attention: Any, attend: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    def forward(hidden_states: Any, **_: Any) -> Any:
        shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
        query = attention.q_proj(hidden_states).view(shape).transpose(1, 2)
        key, value = (part(hidden_states).view(shape).transpose(1, 2) for part in (attention.k_proj, attention.v_proj))
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
        return attention.o_proj(attend(query, key, value).transpose(1, 2).flatten(2)), None

    return forward


def _attend_by_products(query: Any, key: Any, value: Any, *, fill: bool, through_float: bool) -> Any:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if fill:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
    weights = scores.float().softmax(-1).to(value.dtype) if through_float else scores.softmax(-1)
    return weights @ value


def _layers(run: SmallRun) -> Any:
    return run.model.base_model.model.model.layers
