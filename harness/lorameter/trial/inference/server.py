"""Warm requests to a trained model, one at a time, so that several variants can take turns between them.

Each has as many prompts as the workload says, but for those that the model ends itself, which have one.

Where the workload has several adapters, a request of the trained one is asked together with what is compared with it:
one after a switch to another adapter, and one whose prompts name different ones. All are of the same prompts, in an
order that is drawn anew each time, and before each a short request of the trained adapter is answered, so that all of
them come after the same thing and only one of them after a switch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from lorameter.studies.request import TrialRequest
from lorameter.trial.building import lora
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.inference.adapters import Adapters
from lorameter.trial.inference.generate import Request, generate
from lorameter.trial.inference.mixing import MixedRows, check_rows

NAMES = ("request_time_s", "first_token_time_s", "time_per_output_token_s")


class Server:
    """Answers prompts by number, with the adapter unmerged or merged into the base."""

    def __init__(self, model: Any, adapter: str, stream: TokenStream, request: TrialRequest) -> None:
        """`adapter` is the trained one. The seed of the request draws the weights of the others, and orders."""
        self._model = model
        self._adapter = adapter
        self._seed = request.seed
        self._adapters: Adapters | None = None
        self._drawn = random.Random(request.seed)
        self._stream = stream
        self._workload = request.workload
        self._variant = request.variant
        self._served = 0
        self._answered = 0
        self._prefix = ""

    def warm_up(self, count: int) -> Request:
        """`count` requests that are not timed for the result, at least one; returns the first."""
        requests = [self._ask(index) for index in range(count)]
        return requests[0]

    def ask_shortly(self) -> Request:
        """A request of two tokens, which has a prefill and one step of decoding; of none of the numbers."""
        return self.ask_at(self._workload.prompt_tokens, 2)

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
        when it meets the length first, for tens of milliseconds of the host. A variant that answers at lengths
        without an earlier request would pay for it, and one with answers of another length would not.
        """
        for index in range(min(count, self._stream.open_ended_prompt_count)):
            self.answer(index)

    def request(self) -> dict[str, tuple[float, ...]]:
        """The next request's times, in seconds, by metric, and of those that are compared with it."""
        if self._adapters is None:
            return _times(self._prefix, self.ask())
        number, found = self._served, dict[str, tuple[float, ...]]()
        asked = [self._ask_alone, self._ask_switched]
        asked += [self._ask_mixed] if self._workload.request_batch > 1 else []
        for ask in self._drawn.sample(asked, len(asked)):
            lora.activate(self._model, self._adapter)
            self.ask_shortly()
            found |= ask(self._adapters, number)
        lora.activate(self._model, self._adapter)
        self._served += 1
        return found

    def hold_adapters(self) -> None:
        """Attach the other adapters, and ask once in each way."""
        self._adapters = Adapters(
            self._model, self._variant, trained=self._adapter, count=self._workload.adapters, seed=self._seed
        )
        self._ask_switched(self._adapters, 0)
        lora.activate(self._model, self._adapter)

    def check_mixing(self) -> MixedRows | None:
        """Whether prompts that name different adapters are answered by them; None where a request has one prompt."""
        adapters, count = self._adapters, self._workload.request_batch
        if adapters is None or count == 1:
            return None

        def mixed(prompts: torch.Tensor, names: Sequence[str]) -> Request:
            return self._generate(prompts, names)

        def alone(prompts: torch.Tensor, name: str) -> Request:
            lora.activate(self._model, name)
            return self._generate(prompts)

        return check_rows(
            self._model, adapters, self._stream.prompts(0), adapters.rows(0, count), mixed=mixed, alone=alone
        )

    def _ask_alone(self, adapters: Adapters, number: int) -> dict[str, tuple[float, ...]]:
        return _times("", self._ask(number))

    def _ask_switched(self, adapters: Adapters, number: int) -> dict[str, tuple[float, ...]]:
        switch = adapters.switch(adapters.other(number))
        return {"switch_time_s": (switch,), **_times("switched_", self._ask(number))}

    def _ask_mixed(self, adapters: Adapters, number: int) -> dict[str, tuple[float, ...]]:
        prompts = self._stream.prompts(number)
        return _times("mixed_", self._generate(prompts, adapters.rows(number, len(prompts))))

    def open_ended(self) -> tuple[int, Request]:
        """The next whole prompt's number, and the request that the model ends itself."""
        index = self._answered % self._stream.open_ended_prompt_count
        self._answered += 1
        return index, self.answer(index)

    def answer(self, index: int) -> Request:
        """The request for whole prompt `index`."""
        prompt = self._stream.open_ended_prompt(index)
        return generate(self._model, prompt, self._workload.open_ended_tokens, until_end=True, variant=self._variant)

    @property
    def answered(self) -> range:
        """Numbers of the whole prompts that were answered so far."""
        return range(min(self._answered, self._stream.open_ended_prompt_count))

    def merge(self, discard: int) -> None:
        """Merge the adapter and begin again with the first prompt, after `discard` requests."""
        if self._adapters is not None:
            self._adapters.detach()
            self._adapters = None
        lora.merge(self._model)
        self._prefix, self._served = "merged_", 0
        self.warm_up(discard)

    def _ask(self, index: int) -> Request:
        return self._generate(self._stream.prompts(index))

    def _generate(self, prompts: torch.Tensor, adapters: Sequence[str] = ()) -> Request:
        tokens = self._workload.new_tokens
        return generate(self._model, prompts, tokens, variant=self._variant, adapters=adapters)


def _times(prefix: str, request: Request) -> dict[str, tuple[float, ...]]:
    return {f"{prefix}{name}": (getattr(request, name),) for name in NAMES}
