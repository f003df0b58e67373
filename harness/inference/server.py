"""Warm requests to a trained model, one at a time, so that several variants can take turns between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from harness.inference.generate import Request, generate
from harness.training.build import unpack_4bit

NAMES = ("request_time_s", "first_token_time_s", "time_per_output_token_s")


class Server:
    """Answers prompts by number, with the adapter beside the base or merged into it."""

    def __init__(self, model: Any, prompt: Callable[[int], torch.Tensor], new_tokens: int) -> None:
        self._model = model
        self._prompt = prompt
        self._new_tokens = new_tokens
        self._served = 0
        self._prefix = ""

    def warm_up(self, count: int) -> Request:
        """`count` requests that are not timed for the result, at least one; returns the first."""
        requests = [self._ask(index) for index in range(count)]
        return requests[0]

    def request(self) -> dict[str, tuple[float, ...]]:
        """The next request's times, in seconds, by metric."""
        request = self._ask(self._served)
        self._served += 1
        return {f"{self._prefix}{name}": (getattr(request, name),) for name in NAMES}

    def merge(self, discard: int) -> None:
        """Merge the adapter and begin again with the first prompt, after `discard` requests."""
        unpack_4bit(self._model)
        self._model.merge_adapter()
        self._prefix, self._served = "merged_", 0
        self.warm_up(discard)

    def _ask(self, index: int) -> Request:
        return generate(self._model, self._prompt(index), self._new_tokens)
