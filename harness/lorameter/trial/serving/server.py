"""Sends requests to a trained model one at a time, so that several variants can take turns between them.

Each request has the number of prompts of the workload; a request until EOS has one.

A server with several adapters on one base has two modes. In the switching mode one adapter is active, and PEFT's
`set_adapter` visits all layers to activate another. In the mixed mode each row of a batch names its adapter
(`adapter_names`). If the workload has several adapters, a request to the trained one is compared with a request after a
switch to another adapter, and with a request whose prompts name different adapters. All have the same prompts, in a
random order each time. A short request to the trained adapter precedes each of them, so that only the second one
follows a switch. The other adapters have random weights.

Generation is greedy, through transformers' own `generate`, with a time stamp for every token: a streamer receives each
token as it is chosen, which gives the time to first token (prefill) and the time per output token (decode) of an
ordinary call. Either the number of new tokens is fixed and the end-of-sequence token ignored, so that the cost of a
token is comparable; or the model ends its answer itself, as for a user, and the number of tokens is part of the result.

A request may have several prompts of the same length, so there is no padding and attention is as for a single prompt.
All prompts get their tokens in the same forward passes, so the times of the request are those of each prompt.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

import kernels_check
from lorameter.records.record import Failure, PartialRecord
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import Variant
from lorameter.trial.building import peft_methods
from lorameter.trial.building.build import BACKENDS, judge_checks
from lorameter.trial.data.stream import TokenStream

NAMES = ("request_time_s", "first_token_time_s", "time_per_output_token_s")
ROUNDING = 0.1
"""The effect of rounding on a token's logits, as a share of the effect of another adapter. In models with 4 and 30
layers with random weights, in bfloat16 and NF4, it was at most 0.011."""
SEED_DISTANCE = 1_009
"""Difference between the adapter seeds of two replicates: larger than the number of adapters on a base."""


class Server:
    """Answers prompts by number, with the adapter unmerged or merged into the base."""

    def __init__(self, model: Any, adapter: str, stream: TokenStream, request: TrialRequest) -> None:
        """`adapter` is the trained adapter. The seed of the request determines the weights of the others and all
        orders."""
        self._model = model
        self._adapters = [adapter]
        """Adapter names; the trained adapter comes first."""
        self._seed = request.seed
        self._random = random.Random(request.seed)
        self._stream = stream
        self._workload = request.workload
        self._variant = request.variant
        self._served = 0
        self._answered = 0
        self._prefix = ""

    def warm_up(self, count: int) -> Request:
        """Answer `count` (at least one) untimed requests; returns the first."""
        requests = [self._generate(self._stream.prompts(index)) for index in range(count)]
        return requests[0]

    def ask_short(self, new_tokens: int = 2) -> Request:
        """Make a request for a few tokens, by default for a prefill and one decoding step; no metric includes it."""
        return generate(self._model, self._stream.prompts(0), new_tokens, variant=self._variant)

    def ask(self) -> Request:
        """Make the next request."""
        request = self._generate(self._stream.prompts(self._served))
        self._served += 1
        return request

    def request(self) -> dict[str, tuple[float, ...]]:
        """Times of the next request and of the requests that are compared with it, in seconds by metric."""
        if len(self._adapters) == 1:
            return _times(self._prefix, self.ask())
        number, times = self._served, dict[str, tuple[float, ...]]()
        ways = ["", "switched_", "mixed_"] if self._workload.request_batch > 1 else ["", "switched_"]
        for way in self._random.sample(ways, len(ways)):
            self._activate(0)
            self.ask_short()
            if way == "switched_":
                times["switch_time_s"] = (self._switch(number),)
            names = self.name_rows(number) if way == "mixed_" else ()
            times |= _times(way, self._generate(self._stream.prompts(number), names))
        self._activate(0)
        self._served += 1
        return times

    # --- requests until EOS -------------------------------------------------------------------------------------------

    def open_ended(self) -> tuple[int, Request]:
        """Make the next request until EOS; returns the number of its whole prompt, and the request."""
        index = self._answered % self._stream.open_ended_prompt_count
        self._answered += 1
        return index, self.answer(index)

    def answer(self, index: int) -> Request:
        """The request until EOS for whole prompt `index`."""
        prompt = self._stream.open_ended_prompt(index)
        return generate(self._model, prompt, self._workload.open_ended_tokens, until_end=True, variant=self._variant)

    @property
    def answered(self) -> range:
        """Numbers of the answered whole prompts."""
        return range(min(self._answered, self._stream.open_ended_prompt_count))

    # --- several adapters ---------------------------------------------------------------------------------------------

    def attach_adapters(self) -> None:
        """Attach the other adapters, and make one request after a switch. Raises PEFT's exception if it fails."""
        for number in range(1, self._workload.adapters):
            name = f"{self._adapters[0]}-other{number}"
            peft_methods.attach_random(self._model, self._variant, name, self._seed * SEED_DISTANCE + number)
            self._adapters.append(name)
        self._model.eval()  # dropout modules added by PEFT are in train mode
        self._switch(0)
        self._generate(self._stream.prompts(0))
        self._activate(0)

    def name_rows(self, number: int) -> list[str]:
        """The adapter of each row in request `number`: in turn, starting with another one in each request, so that a
        batch contains as many different adapters as possible."""
        return [self._adapters[(number + row) % len(self._adapters)] for row in range(self._workload.request_batch)]

    def judge_mixed_rows(self) -> tuple[list[int], int]:
        """Rows of a mixed batch that were not answered by the adapter that they name, and the number of decisive rows,
        whose answer differs from those of all other adapters in the batch.

        A row must have the answer that its adapter gives alone. In 16 bits it may differ if two tokens are almost
        equally likely, since PEFT rounds differently in a mixed batch. So a different answer is accepted if the logits
        of its tokens are below the largest ones by an amount that is small compared with the effect of another adapter.
        """
        names, prompts = self.name_rows(0), self._stream.prompts(0)
        mixed = self._generate(prompts, names).answers
        answers = torch.tensor(mixed)
        order, alone, logits = list(dict.fromkeys(names)), list[Sequence[Sequence[int]]](), list[torch.Tensor]()
        for name in order:
            peft_methods.activate(self._model, name)
            alone.append(self._generate(prompts).answers)
            logits.append(answer_logits(self._model, prompts, answers).float().cpu())
        self._activate(0)
        wrong, decisive = [], 0
        for row, name in enumerate(names):
            index = order.index(name)
            other = (index or 2) - 1
            row_logits = logits[index][row]
            deficit = row_logits.amax(-1) - row_logits.gather(-1, answers[row].unsqueeze(-1)).squeeze(-1)
            effect = (row_logits - logits[other][row]).abs().amax(-1)
            if mixed[row] != alone[index][row] and bool((deficit > ROUNDING * effect).any()):
                wrong.append(row)
            decisive += all(found[row] != alone[index][row] for number, found in enumerate(alone) if number != index)
        return wrong, decisive

    def merge(self, discard: int) -> None:
        """Merge the adapter and restart with the first prompt, after `discard` requests."""
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
        """Activate one of the other adapters, in turn. Returns the seconds spent on the host."""
        name = self._adapters[1 + number % (len(self._adapters) - 1)]
        begin = time.perf_counter()
        self._model.set_adapter(name)
        return time.perf_counter() - begin

    def _generate(self, prompts: torch.Tensor, adapters: Sequence[str] = ()) -> Request:
        tokens = self._workload.new_tokens
        return generate(self._model, prompts, tokens, variant=self._variant, adapters=adapters)


def _times(prefix: str, request: Request) -> dict[str, tuple[float, ...]]:
    return {f"{prefix}{name}": (getattr(request, name),) for name in NAMES}


def answer_logits(model: Any, prompts: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """The logits from which each token of the answers is chosen, given all tokens before it; shape (prompts, tokens,
    vocabulary), in the model's dtype.

    Computed in one pass over prompts, shape (prompts, length), and answers, shape (prompts, tokens), without a cache.
    """
    tokens, count = torch.cat([prompts, answers.to(prompts)], dim=1), answers.shape[1] + 1
    forward = inspect.signature(peft_methods.unwrap(model).forward).parameters
    options = {"logits_to_keep": count} if "logits_to_keep" in forward else {}  # those of all tokens may not fit
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **options).logits
    return logits[:, -count:-1]  # type: ignore[no-any-return]


# --- checks -----------------------------------------------------------------------------------------------------------


def check_attention(fragment: PartialRecord, model: Any, server: Server, request: TrialRequest) -> PartialRecord:
    """The fragment with the check of a request's attention, which is observed in an additional request, since no
    training step shows it; it can make its trial invalid."""
    required = request.requirements.get("attention.backend", BACKENDS[request.variant.attention])
    return judge_checks(fragment, [kernels_check.watch_request(model, server.ask_short, required)], request)


def check_adapters(fragment: PartialRecord, server: Server, request: TrialRequest) -> PartialRecord:
    """Attach the adapters of the workload; the fragment is invalid if a row of a mixed batch is answered by another
    adapter than the one that it names, or if no row is decisive."""
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


def _copy_input(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Give a module a contiguous copy of its input. A clone with the same strides would not help: torch's linear does
    not fold them."""
    hidden, *rest = args
    return (hidden.clone(memory_format=torch.contiguous_format), *rest)


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
    stamps, defaults = _Stamps(), model.generation_config
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=0, use_cache=True)
    mask = torch.ones_like(prompt)
    if until_end:
        config.eos_token_id = defaults.eos_token_id
    if variant is not None and variant.kv_cache == "static":
        config.cache_implementation, config.disable_compile = "static", True
    options = {"adapter_names": list(adapters)} if adapters else {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if not until_end:
            # Without a token in the request, generate takes the model's own. Forbidding it (`min_new_tokens`) would add
            # work and change the text.
            stack.callback(setattr, defaults, "eos_token_id", defaults.eos_token_id)
            defaults.eos_token_id = None
        if variant is not None and variant.copy_head_input:
            stack.callback(model.get_output_embeddings().register_forward_pre_hook(_copy_input).remove)
        begin = time.perf_counter()
        model.generate(input_ids=prompt, attention_mask=mask, generation_config=config, streamer=stamps, **options)
        end = time.perf_counter()
    count = len(stamps.tokens)
    expected = 0 < count <= new_tokens if until_end else count == new_tokens
    if not expected or any(len(tokens) != len(prompt) for tokens in stamps.tokens):
        raise RuntimeError(
            f"generate returned {count} tokens instead of {new_tokens} for each of {len(prompt)} prompts"
        )
    return Request(
        request_time_s=end - begin,
        first_token_time_s=stamps.times[0] - begin,
        time_per_output_token_s=(stamps.times[-1] - stamps.times[0]) / max(1, len(stamps.tokens) - 1),
        answers=tuple(zip(*stamps.tokens, strict=True)),
    )
