"""The first requests of a trial, and its warm requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorameter.records.record import PartialRecord
from lorameter.trial.building import peft_methods
from lorameter.trial.building.quantizers import is_packed
from lorameter.trial.process import release_unused
from lorameter.trial.serving.server import Server, check_adapters, check_attention

if TYPE_CHECKING:
    from lorameter.trial.trial import Trial


def begin_generate(trial: Trial) -> PartialRecord:
    """Run the first request and the discarded ones after it. The optimizer's state is released."""
    trainee, protocol = trial.trainee, trial.request.protocol
    trainee.model.eval()
    if trial.request.variant.merge_adapter:
        peft_methods.merge(trainee.model)
    trainee.optimizer.state.clear()  # a server has no optimizer state, so the peak must exclude it
    release_unused(trial.request.device)
    if trial.alone:
        trial.gauge.begin()
    trial.server = Server(trainee.model, trainee.adapter, trial.stream, trial.request)
    first = trial.server.warm_up(1 + protocol.generate_warmup)
    values = {
        "new_tokens": float(trial.request.workload.new_tokens),
        "request_batch": float(trial.request.workload.request_batch),
        "packed_4bit_decode": float(is_packed(trainee.model)),
    }
    values |= {"first_call_time_s": first.request_time_s} if trial.alone else {}
    if "open_ended" in trial.request.measures and trial.request.device.startswith("cuda"):
        # cuDNN's attention, which torch prefers on Hopper, plans a kernel at the first occurrence of each key
        # length, in tens of milliseconds on the host, which would distort comparisons of answers of other lengths.
        for index in range(min(protocol.open_ended_requests, trial.stream.open_ended_prompt_count)):
            trial.server.answer(index)
    fragment = PartialRecord(values=values, tokens={"completion": list(first.tokens)})
    if not trial.alone:
        fragment = check_attention(fragment, trainee.model, trial.server, trial.request)
    return check_adapters(fragment, trial.server, trial.request)


def request(trial: Trial) -> PartialRecord:
    """Run one warm request, with the unmerged adapter or, after `merge`, the merged one."""
    return PartialRecord(samples=trial.server.request())
