"""A profiled trial: the commands of `lorameter profile`, in addition to those of any trial.

What they find goes into files of the trial's folder: it is the evidence of one process, and no comparison takes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch

from lorameter.errors import UsageError
from lorameter.models import catalogue, shapes
from lorameter.models.costs.flops import computed_tokens, training_flops
from lorameter.models.costs.modules import UncountedError, count_products, to_values
from lorameter.models.costs.peaks import Peak, Rate
from lorameter.records import codec
from lorameter.records.activity import (
    ACCOUNTS,
    ACTIVITY,
    MERGED_ACTIVITY,
    MERGED_TRACE,
    PEAKS,
    REQUEST_ACTIVITY,
    REQUEST_FACTS,
    REQUEST_PHASES,
    REQUEST_TRACE,
)
from lorameter.records.memory_account import MemoryPhase
from lorameter.records.record import PartialRecord
from lorameter.studies.request import TrialRequest, words_of
from lorameter.trial.building.packing import unpack_4bit
from lorameter.trial.building.shared import SharedBase
from lorameter.trial.process import release_unused
from lorameter.trial.profiling.memory import measure_breakdown, take_birth
from lorameter.trial.profiling.peak import measured_bandwidth, measured_product
from lorameter.trial.profiling.phases import (
    BorderedStep,
    pair_times,
    profiled,
    see_wanted,
    step_times,
    useful_tokens,
)
from lorameter.trial.profiling.requests import (
    BorderedRequest,
    first_token_peak,
    length_times,
    request_samples,
    see_request,
    weights_by_shape,
)
from lorameter.trial.trial import Trial

NEW_LENGTHS = 6
"""Prompt lengths without an earlier request; the median of fewer times has no interval."""


class ProfiledTrial(Trial):
    """An isolated trial, watched from its start to its last token."""

    COMMANDS: ClassVar[tuple[str, ...]] = (*Trial.COMMANDS, *words_of("profiled trial"))

    def __init__(self, request: TrialRequest, shared: SharedBase) -> None:
        super().__init__(request, shared)
        self._birth = take_birth()

    def memory_breakdown(self, phase: MemoryPhase) -> PartialRecord:
        """Where the memory of a step or of a request goes; it is watched, so it is none of those that are timed."""
        request, trainee = self._request, self._built.trainee
        call = self._built.step if phase == "train" else self._serving.request
        release_unused(request.device)  # the check's records refer to each other, and would count as unexplained
        found = measure_breakdown(
            trainee.model, trainee.optimizer, call, birth=self._birth, device=request.device, phase=phase,
            compiled=request.variant.compile,
        )  # fmt: skip
        self._write(ACCOUNTS[phase], found)
        return PartialRecord()

    def profile(self, *, budget_s: float) -> PartialRecord:
        """Where a step's time goes, and how many real tokens it holds; not yet what runs in it. Pairs take `budget_s`
        seconds."""
        request, parts = self._request, self._built
        bordered = BorderedStep(parts.trainee, parts.stream, request)
        samples = step_times(parts.step, bordered, request.device, budget_s=budget_s)
        values = useful_tokens(parts.stream, request.workload.batch_size * request.variant.gradient_accumulation)
        return self._judged(PartialRecord(samples=samples, values=values | self._count()), list(samples["timed_loss"]))

    def _count(self) -> dict[str, float]:
        """What a step multiplies, counted from the modules where no closed form says it. One step is watched for that,
        which is none of those that were timed; not a compiled one, which hooks would compile anew."""
        variant, workload, model = self._request.variant, self._request.workload, self._built.trainee.model
        with contextlib.suppress(UsageError):
            training_flops(shapes.shape(catalogue.resolve(workload.model)), variant, computed_tokens(variant, workload))
            return {}
        with contextlib.suppress(UncountedError):
            wanted = None if variant.compile else see_wanted(model, self._take_step)
            return to_values(count_products(model, wanted))
        return {}

    def peak(self, rates: Sequence[Rate]) -> PartialRecord:
        """What the device does at best; it fills caches and memory, so it comes when nothing else is timed.

        A rate for whose large product or copy the trial has left no memory is left out.
        """
        device, threads = self._request.device, self._request.threads
        peaks: dict[Rate, Peak] = {}
        for rate in rates:
            release_unused(device)
            with contextlib.suppress(torch.OutOfMemoryError):
                peaks[rate] = (
                    measured_bandwidth(device, threads=threads)
                    if rate == "memory"
                    else measured_product(device, rate, threads=threads)
                )
        self._write(PEAKS, peaks)
        return PartialRecord()

    def activity(self) -> PartialRecord:
        """What runs in a step: the profiler's turn, after all else that a process is asked for. Training goes on."""
        request, parts = self._request, self._built
        unpack_4bit(parts.trainee.model)
        parts.trainee.model.train()
        bordered = BorderedStep(parts.trainee, parts.stream, request)
        self._write(ACTIVITY, profiled(bordered, request.device, Path(request.scratch)))
        return PartialRecord()

    def profile_requests(self, *, merged: bool, budget_s: float) -> PartialRecord:
        """Where a request's time goes, of the adapter as it is served or, after `merge`, merged into the base."""
        prefix, serving = "merged_" if merged else "", self._serving
        bordered = BorderedRequest(self._built.trainee.model, serving.ask, self._request.device)
        found = pair_times(
            serving.ask, bordered, self._request.device, what="request", samples_of=request_samples,
            budget_s=budget_s,
        )  # fmt: skip
        return PartialRecord(samples={f"{prefix}{name}": times for name, times in found.items()})

    def request_facts(self) -> PartialRecord:
        """What a request finds and leaves: its cache, its logits, the mode of the model, the memory up to its first
        token, and the time of the first request at a new prompt length."""
        request, serving = self._request, self._serving
        model, length = self._built.trainee.model, request.workload.prompt_tokens
        memory = first_token_peak(lambda: serving.ask_at(length, 1), request.device)
        self._write(REQUEST_FACTS, see_request(model, serving.ask, request.device))
        lengths = list(range(max(1, length - NEW_LENGTHS), length))
        return PartialRecord(memory=memory, samples=length_times(lambda length: serving.ask_at(length, 2), lengths))

    def request_activity(self, *, merged: bool) -> PartialRecord:
        """What runs in a request."""
        request, model = self._request, self._built.trainee.model
        bordered = BorderedRequest(model, self._serving.ask, request.device)
        names = (MERGED_ACTIVITY, MERGED_TRACE) if merged else (REQUEST_ACTIVITY, REQUEST_TRACE)
        found = profiled(
            bordered, request.device, Path(request.scratch), trace=names[1], phase_names=REQUEST_PHASES,
            weights=weights_by_shape(model),
        )  # fmt: skip
        self._write(names[0], found)
        return PartialRecord()

    def _write(self, name: str, found: object) -> None:
        (Path(self._request.scratch) / name).write_text(codec.dumps(found), encoding="utf-8")
