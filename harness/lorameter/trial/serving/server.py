"""Requests to a trained model, one at a time, so that several variants can take turns between them.

Each has as many prompts as the workload says; a request that the model ends itself has one.

A server of several adapters on one base has two ways. It switches: one adapter is active, and PEFT's `set_adapter`
walks over all layers to activate another. Or it mixes: each row of a batch names its adapter (`adapter_names`). Where
the workload has several adapters, a request of the trained one is sent together with what is compared with it: one
after a switch to another adapter, and one whose prompts name different ones. All have the same prompts, in an order
that is drawn anew each time, and before each a short request of the trained adapter is answered, so that all of them
come after the same thing and only one of them after a switch. The further adapters have random weights.
"""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

import kernels_check
from lorameter.records import codec
from lorameter.records.record import Failure, PartialRecord, judge_required
from lorameter.studies.request import TrialRequest
from lorameter.trial.building import peft_methods
from lorameter.trial.building.build import attention_of
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.serving.generate import Request, generate

NAMES = ("request_time_s", "first_token_time_s", "time_per_output_token_s")
ROUNDING = 0.1
"""What rounding explains of the effect of another adapter on the logits of a token. In models of 4 and 30 layers with
random weights, in bfloat16 and NF4, it was at most 0.011."""
SEED_DISTANCE = 1_009
"""Between the seeds of two replicates, of which no adapters are the same: more than a base may have."""


class Server:
    """Answers prompts by number, with the adapter unmerged or merged into the base."""

    def __init__(self, model: Any, adapter: str, stream: TokenStream, request: TrialRequest) -> None:
        """`adapter` is the trained one. The seed of the request draws the weights of the others, and orders."""
        self._model = model
        self._adapters = [adapter]
        """The trained one first."""
        self._seed = request.seed
        self._random = random.Random(request.seed)
        self._stream = stream
        self._workload = request.workload
        self._variant = request.variant
        self._served = 0
        self._answered = 0
        self._prefix = ""

    def warm_up(self, count: int) -> Request:
        """`count` requests that are not timed for the result, at least one; returns the first."""
        requests = [self._generate(self._stream.prompts(index)) for index in range(count)]
        return requests[0]

    def ask_at(self, length: int, new_tokens: int) -> Request:
        """A request of its prompts' first `length` tokens, of none of the numbers of a run."""
        return generate(self._model, self._stream.prompts(0)[:, :length], new_tokens, variant=self._variant)

    def ask_shortly(self) -> Request:
        """A request of two tokens, which has a prefill and one step of decoding; of none of the numbers."""
        return self.ask_at(self._workload.prompt_tokens, 2)

    def ask(self) -> Request:
        """The next request."""
        request = self._generate(self._stream.prompts(self._served))
        self._served += 1
        return request

    def request(self) -> dict[str, tuple[float, ...]]:
        """The next request's times, in seconds, by metric, and of those that are compared with it."""
        if len(self._adapters) == 1:
            return _times(self._prefix, self.ask())
        number, found = self._served, dict[str, tuple[float, ...]]()
        ways = ["", "switched_", "mixed_"] if self._workload.request_batch > 1 else ["", "switched_"]
        for way in self._random.sample(ways, len(ways)):
            self._activate(0)
            self.ask_shortly()
            if way == "switched_":
                found["switch_time_s"] = (self._switch(number),)
            names = self.name_rows(number) if way == "mixed_" else ()
            found |= _times(way, self._generate(self._stream.prompts(number), names))
        self._activate(0)
        self._served += 1
        return found

    # --- requests until EOS -------------------------------------------------------------------------------------------

    def visit(self, count: int) -> None:
        """Answer the first `count` whole prompts once, untimed; the same tokens come again when they are asked.

        What plans a kernel for each length of the keys (cuDNN's attention, which torch prefers on Hopper) plans it
        when it meets the length first, for tens of milliseconds of the host. A variant that answers at lengths
        without an earlier request would pay for it, and one with answers of another length would not.
        """
        for index in range(min(count, self._stream.open_ended_prompt_count)):
            self.answer(index)

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

    # --- several adapters ---------------------------------------------------------------------------------------------

    def attach_adapters(self) -> None:
        """Attach the other adapters, and ask once after a switch. Raises what PEFT raises if it cannot attach them."""
        for number in range(1, self._workload.adapters):
            name = f"{self._adapters[0]}-other{number}"
            peft_methods.attach_drawn(self._model, self._variant, name, self._seed * SEED_DISTANCE + number)
            self._adapters.append(name)
        self._model.eval()  # the dropout of what PEFT adds is in train mode, whatever the model is in
        self._switch(0)
        self._generate(self._stream.prompts(0))
        self._activate(0)

    def name_rows(self, number: int) -> list[str]:
        """The adapter of each row in request `number`: one after the other, with another one first each time. So a
        batch has as many different ones as it can, and over the requests all of them."""
        return [self._adapters[(number + row) % len(self._adapters)] for row in range(self._workload.request_batch)]

    def judge_mixed_rows(self) -> tuple[list[int], int]:
        """Rows of a mixed batch that are not answered by the adapters that they name, and how many rows show it: those
        whose answer no other adapter of the batch gives.

        A row is to get the answer that it gets where its adapter is the only one. In 16 bits it need not: PEFT rounds
        the two otherwise, and where two tokens are almost equally likely that decides. So an answer may differ if what
        the logits of its tokens lack to the largest ones is small against what another adapter does to the logits.
        """
        names, prompts = self.name_rows(0), self._stream.prompts(0)
        mixed = self._generate(prompts, names).answers
        answers = torch.tensor(mixed)
        order, alone, logits = list(dict.fromkeys(names)), list[Sequence[Sequence[int]]](), list[torch.Tensor]()
        for name in order:
            peft_methods.activate(self._model, name)
            alone.append(self._generate(prompts).answers)
            logits.append(self._answer_logits(prompts, answers.to(prompts.device)).cpu())
        self._activate(0)
        wrong, decisive = [], 0
        for row, name in enumerate(names):
            own = order.index(name)
            other = (own or 2) - 1
            ours = logits[own][row]
            lost = ours.amax(-1) - ours.gather(-1, answers[row].unsqueeze(-1)).squeeze(-1)
            effect = (ours - logits[other][row]).abs().amax(-1)
            if mixed[row] != alone[own][row] and bool((lost > ROUNDING * effect).any()):
                wrong.append(row)
            decisive += all(found[row] != alone[own][row] for number, found in enumerate(alone) if number != own)
        return wrong, decisive

    def _answer_logits(self, prompts: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """The logits of which the tokens of the answers are chosen; shape (prompts, tokens, vocabulary)."""
        tokens, count = torch.cat([prompts, answers], dim=1), answers.shape[1] + 1
        forward = inspect.signature(peft_methods.wrapped(self._model).forward).parameters
        kept = {"logits_to_keep": count} if "logits_to_keep" in forward else {}  # those of all tokens may not fit
        with torch.no_grad():
            mask = torch.ones_like(tokens)
            logits = self._model(input_ids=tokens, attention_mask=mask, use_cache=False, **kept).logits
        return logits[:, -count:-1].float()  # type: ignore[no-any-return]

    def merge(self, discard: int) -> None:
        """Merge the adapter and begin again with the first prompt, after `discard` requests."""
        if len(self._adapters) > 1:
            self._activate(0)
        for name in self._adapters[1:]:
            self._model.delete_adapter(name)
        del self._adapters[1:]
        peft_methods.merge(self._model)
        self._prefix, self._served = "merged_", 0
        self.warm_up(discard)

    def _activate(self, number: int) -> None:
        peft_methods.activate(self._model, self._adapters[number])

    def _switch(self, number: int) -> float:
        """Activate another adapter than the trained one, in turn. Returns seconds: all of them on the host."""
        name = self._adapters[1 + number % (len(self._adapters) - 1)]
        begin = time.perf_counter()
        self._model.set_adapter(name)
        return time.perf_counter() - begin

    def _generate(self, prompts: torch.Tensor, adapters: Sequence[str] = ()) -> Request:
        tokens = self._workload.new_tokens
        return generate(self._model, prompts, tokens, variant=self._variant, adapters=adapters)


def _times(prefix: str, request: Request) -> dict[str, tuple[float, ...]]:
    return {f"{prefix}{name}": (getattr(request, name),) for name in NAMES}


# --- checks -----------------------------------------------------------------------------------------------------------


def check_attention(fragment: PartialRecord, model: Any, server: Server, request: TrialRequest) -> PartialRecord:
    """The fragment with the check of the attention that a request runs, watched in one of its own, since no training
    step shows it; it may make its trial invalid as one of a step does."""
    required = attention_of(request.variant, request.requirements)
    check = kernels_check.watch_request(model, server.ask_shortly, required)
    seen = msgspec.structs.replace(fragment, checks=(codec.to_json(check),))
    name, fallback = request.variant.name, request.allow_fallback
    return judge_required(seen, {check.path: check.required}, name=name, allow_fallback=fallback)


def check_adapters(fragment: PartialRecord, server: Server, request: TrialRequest) -> PartialRecord:
    """The fragment of a server that has attached the adapters of the workload; invalid where a row of a mixed batch is
    answered by another adapter than the one that it names, or where none would show it."""
    adapters, rows = request.workload.adapters, request.workload.request_batch
    if adapters == 1 or fragment.status != "ok":
        return fragment
    server.attach_adapters()
    values = {**fragment.values, "adapters": float(adapters)}
    if rows == 1:
        return msgspec.structs.replace(fragment, values=values)
    wrong, decisive = server.judge_mixed_rows()
    values |= {"mixed_rows": float(rows), "mixed_rows_decisive": float(decisive)}
    fragment = msgspec.structs.replace(fragment, values=values)
    if wrong:
        message = (
            f"of {rows} prompts in one batch for {adapters} adapters, row {', '.join(map(str, wrong))} (from 0) got "
            "another answer than its adapter gives alone, and rounding does not explain it"
        )
        return fragment.failed("invalid", Failure(phase="generate", kind="MixedAnswers", message=message))
    if not decisive:
        message = (
            f"the {adapters} adapters give the same answers to all of {rows} prompts, so that nothing shows "
            "whether each is answered by its own; raise new_tokens"
        )
        return fragment.failed("invalid", Failure(phase="generate", kind="AdaptersAlike", message=message))
    return fragment
