"""Greedy generation with a time stamp for every token, through transformers' own `generate`.

A streamer receives each token as it is chosen, which gives the time to first token (prefill) and the time per output
token (decode) of an ordinary call. Either the number of new tokens is fixed and the end-of-sequence token ignored, so
that the cost of a token is comparable; or the model ends its answer itself, as for a user, and the number of tokens is
part of the result.

A request may have several prompts of the same length, so there is no padding and attention is as for a single prompt.
All prompts get their tokens in the same forward passes, so the times of the request are those of each prompt.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from lorameter.studies.variant import Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Times of one request, in seconds, and its tokens, for all of its prompts together."""

    request_time_s: float
    first_token_time_s: float
    time_per_output_token_s: float
    """Mean over the tokens after the first; 0 if there is only one."""
    answers: tuple[tuple[int, ...], ...]
    """The tokens of each answer, in prompt order."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens of all answers, concatenated."""
        return tuple(token for answer in self.answers for token in answer)


class _Stamps(BaseStreamer):
    """Records the time at which each token arrives, for all prompts together. `generate` first passes the prompts, then
    every new token after a copy to the host (`.cpu()`), so on CUDA each time includes the device's work."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[list[int]] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        now = time.perf_counter()
        if self._prompt:
            self._prompt = False
            return
        self.times.append(now)
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        """Required by the interface; nothing is buffered."""


@contextlib.contextmanager
def _without_end(model: Any) -> Iterator[None]:
    """Ignore the end-of-sequence token. A value of None in the request would be replaced by the model's default, so the
    default is changed during the request; forbidding the token (`min_new_tokens`) would add work and change the
    text."""
    eos = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None
    try:
        yield
    finally:
        model.generation_config.eos_token_id = eos


@contextlib.contextmanager
def _copied_head_input(model: Any) -> Iterator[None]:
    """Give the output head a contiguous copy of its input. A clone with the same strides would not help: torch's linear
    does not fold them."""

    def copy(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *rest = args
        return (hidden.clone(memory_format=torch.contiguous_format), *rest)

    hook = model.get_output_embeddings().register_forward_pre_hook(copy)
    try:
        yield
    finally:
        hook.remove()


def generate(
    model: Any,
    prompt: torch.Tensor,
    new_tokens: int,
    *,
    until_end: bool = False,
    variant: Variant | None = None,
    adapters: Sequence[str] = (),
) -> Request:
    """Make one greedy request for `prompt`, shape (prompts, length), with exactly `new_tokens` tokens for each.

    With `until_end`, for one prompt, the answer ends with the model's end-of-sequence token, after at most
    `new_tokens`. `variant` sets options (`kv_cache`, `copy_head_input`); by default they are those of transformers.
    `adapters` names the adapter of each prompt, by default the active one.

    Raises:
        RuntimeError: the model produced another number of tokens (because of a stop criterion), or a step did not
            produce one token for each prompt.
    """
    stamps = _Stamps()
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=0, use_cache=True)
    mask = torch.ones_like(prompt)
    if until_end:
        config.eos_token_id = model.generation_config.eos_token_id
    if variant is not None and variant.kv_cache == "static":
        config.cache_implementation, config.disable_compile = "static", True
    named = {"adapter_names": list(adapters)} if adapters else {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if not until_end:
            stack.enter_context(_without_end(model))
        if variant is not None and variant.copy_head_input:
            stack.enter_context(_copied_head_input(model))
        begin = time.perf_counter()
        model.generate(input_ids=prompt, attention_mask=mask, generation_config=config, streamer=stamps, **named)
        end = time.perf_counter()
    if len(stamps.tokens) != new_tokens and not (until_end and 0 < len(stamps.tokens) < new_tokens):
        raise RuntimeError(f"generate gave {len(stamps.tokens)} tokens where {new_tokens} were asked for")
    if any(len(tokens) != len(prompt) for tokens in stamps.tokens):
        raise RuntimeError(f"generate did not give one token at a time for each of {len(prompt)} prompts")
    return Request(
        request_time_s=end - begin,
        first_token_time_s=stamps.times[0] - begin,
        time_per_output_token_s=(stamps.times[-1] - stamps.times[0]) / max(1, len(stamps.tokens) - 1),
        answers=tuple(zip(*stamps.tokens, strict=True)),
    )
