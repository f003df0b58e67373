"""Greedy generation with time stamps for every token, through transformers' own `generate`.

A streamer is handed each token as it is decided, which gives the time to the first token (prefill) and the time per
output token (decode) of the very call that a user makes; no second implementation of decoding is timed. The number
of new tokens is fixed and the end-of-sequence token ignored, so that requests are comparable.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Times of one request, in seconds, and the tokens it produced."""

    request_time_s: float
    first_token_time_s: float
    time_per_output_token_s: float
    """Mean over the tokens after the first."""
    tokens: tuple[int, ...]


class _Stamps(BaseStreamer):
    """Notes when each token arrives. `generate` first hands over the prompt, then every new token from the host's side
    (`.cpu()`), so on CUDA each stamp follows the device's own work."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        now = time.perf_counter()
        if self._prompt:
            self._prompt = False
            return
        self.times.append(now)
        self.tokens += value.flatten().tolist()

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


def generate(model: Any, prompt: torch.Tensor, new_tokens: int) -> Request:
    """One greedy request of exactly `new_tokens` tokens for `prompt`, shape (1, length).

    Raises:
        RuntimeError: the model produced another number of tokens (a stop criterion outside our control).
    """
    stamps = _Stamps()
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=0, use_cache=True)
    mask = torch.ones_like(prompt)
    with torch.no_grad(), _without_end(model):
        begin = time.perf_counter()
        model.generate(input_ids=prompt, attention_mask=mask, generation_config=config, streamer=stamps)
        end = time.perf_counter()
    if len(stamps.tokens) != new_tokens:
        raise RuntimeError(f"generate gave {len(stamps.tokens)} tokens where {new_tokens} were asked for")
    return Request(
        request_time_s=end - begin,
        first_token_time_s=stamps.times[0] - begin,
        time_per_output_token_s=(stamps.times[-1] - stamps.times[0]) / (new_tokens - 1),
        tokens=tuple(stamps.tokens),
    )
