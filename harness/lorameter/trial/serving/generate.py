"""Greedy generation with time stamps for every token, through transformers' own `generate`.

A streamer is handed each token as it is decided, which gives the time to the first token (prefill) and the time per
output token (decode) of the very call that a user makes; no second implementation of decoding is timed. Either the
number of new tokens is fixed and the end-of-sequence token ignored, which makes the cost of a token comparable; or the
model ends its answer itself, which is what a user waits for, and the number of tokens is part of the result.

A request may have several prompts of one length, so that nothing is padded and attention is what it is for one. All of
them get their tokens at once, one forward pass after the other, so that its times are those of each of its prompts.
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
    """Times of one request, in seconds, and the tokens it produced: for all of its prompts at once."""

    request_time_s: float
    first_token_time_s: float
    time_per_output_token_s: float
    """Mean over the tokens after the first; 0 where there is only one."""
    answers: tuple[tuple[int, ...], ...]
    """The tokens of each prompt, in their order."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Those of all answers, one after the other."""
        return tuple(token for answer in self.answers for token in answer)


class _Stamps(BaseStreamer):
    """Notes when each token arrives, of all prompts at once. `generate` first hands over the prompts, then every new
    token from the host's side (`.cpu()`), so on CUDA each stamp follows the device's own work."""

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
        """Nothing is buffered."""


@contextlib.contextmanager
def _without_end(model: Any) -> Iterator[None]:
    """No token ends the text. A request's own None would be filled in from the model's defaults, so those are changed
    for its duration; forbidding the token (`min_new_tokens`) would add work to every step and change the text."""
    kept = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None
    try:
        yield
    finally:
        model.generation_config.eos_token_id = kept


@contextlib.contextmanager
def _copied_head_input(model: Any) -> Iterator[None]:
    """The output head takes a copy of what it is given, laid out anew. A clone that keeps the strides would not do:
    they are what torch's linear does not fold."""

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
    """One greedy request for `prompt`, shape (prompts, length), of exactly `new_tokens` tokens for each.

    With `until_end` the model's end-of-sequence token ends it (and is the last of the tokens), at `new_tokens` at most;
    that is for one prompt. `variant` says how it is answered (`kv_cache`, `copy_head_input`); as transformers does by
    itself if left out. `adapters` names one for each prompt; the active one answers all of them if left out.

    Raises:
        RuntimeError: the model produced another number of tokens (a stop criterion outside our control), or not as
            many as there are prompts at a time.
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
