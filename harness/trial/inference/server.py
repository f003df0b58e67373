"""Warm requests to a trained model, one at a time, so that several variants can take turns between them.

Each has as many prompts as the workload says, but for those that the model ends itself, which have one.
"""

from __future__ import annotations

from typing import Any

from harness.studies.variant import Variant
from harness.studies.workload import Workload
from harness.trial.building import lora
from harness.trial.data.stream import TokenStream
from harness.trial.inference.generate import Request, generate

NAMES = ("request_time_s", "first_token_time_s", "time_per_output_token_s")


class Server:
    """Answers prompts by number, with the adapter beside the base or merged into it."""

    def __init__(self, model: Any, stream: TokenStream, workload: Workload, variant: Variant) -> None:
        self._model = model
        self._stream = stream
        self._workload = workload
        self._variant = variant
        self._served = 0
        self._answered = 0
        self._prefix = ""

    def warm_up(self, count: int) -> Request:
        """`count` requests that are not timed for the result, at least one; returns the first."""
        requests = [self._ask(index) for index in range(count)]
        return requests[0]

    def ask_shortly(self) -> None:
        """A request of two tokens, which has a prefill and one step of decoding; of none of the numbers."""
        self.ask_at(self._workload.prompt_tokens, 2)

    def ask_at(self, length: int, new_tokens: int) -> Request:
        """A request of its prompts' first `length` tokens, of none of the numbers of a run."""
        return generate(self._model, self._stream.prompts(0)[:, :length], new_tokens, variant=self._variant)

    def ask(self) -> Request:
        """The next request."""
        request = self._ask(self._served)
        self._served += 1
        return request

    def visit(self, count: int) -> None:
        """Answer the first `count` whole prompts once, untimed; the same tokens come again when they are asked.

        What plans a kernel for each length of the keys (cuDNN's attention, which torch prefers on Hopper) plans it
        when it meets the length first, for tens of milliseconds of the host. Whoever answered at lengths that nobody
        had visited would pay for it, and another variant, with an answer of another length, would not.
        """
        for index in range(min(count, self._stream.natural_prompt_count)):
            self.answer(index)

    def request(self) -> dict[str, tuple[float, ...]]:
        """The next request's times, in seconds, by metric."""
        request = self.ask()
        return {f"{self._prefix}{name}": (getattr(request, name),) for name in NAMES}

    def natural(self) -> tuple[int, Request]:
        """The next whole prompt's number, and the request that the model ends itself."""
        index = self._answered % self._stream.natural_prompt_count
        self._answered += 1
        return index, self.answer(index)

    def answer(self, index: int) -> Request:
        """The request for whole prompt `index`."""
        prompt = self._stream.natural_prompt(index)
        return generate(self._model, prompt, self._workload.natural_tokens, until_end=True, variant=self._variant)

    @property
    def answered(self) -> range:
        """Numbers of the whole prompts that were answered so far."""
        return range(min(self._answered, self._stream.natural_prompt_count))

    def merge(self, discard: int) -> None:
        """Merge the adapter and begin again with the first prompt, after `discard` requests."""
        lora.merge(self._model)
        self._prefix, self._served = "merged_", 0
        self.warm_up(discard)

    def _ask(self, index: int) -> Request:
        return generate(self._model, self._stream.prompts(index), self._workload.new_tokens, variant=self._variant)
