"""A trial that is taken apart: the commands of `lorameter profile`, beside those of any trial.

What they find goes into files of the trial's folder: it is the evidence of one process, and no comparison takes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch

from harness.models.costs.peaks import Peak, Rate
from harness.records import codec
from harness.records.activity import ACCOUNTS, ACTIVITY, PEAKS
from harness.records.memory_account import MemoryPhase
from harness.records.record import Fragment
from harness.studies.command import words_of
from harness.studies.request import TrialRequest
from harness.trial.building.packing import unpack_4bit
from harness.trial.building.shared import SharedBase
from harness.trial.process import release_unused
from harness.trial.profiling.account import account, take_birth
from harness.trial.profiling.borders import BorderedStep, profiled, step_times, useful_tokens
from harness.trial.profiling.peak import measured_bandwidth, measured_product
from harness.trial.trial import Trial


class ProfiledTrial(Trial):
    """A solo trial, watched from its birth to its last token."""

    COMMANDS: ClassVar[tuple[str, ...]] = (*Trial.COMMANDS, *words_of("profiled trial"))

    def __init__(self, request: TrialRequest, shared: SharedBase) -> None:
        super().__init__(request, shared)
        self._birth = take_birth()

    def account(self, phase: MemoryPhase) -> Fragment:
        """Where the memory of a step or of a request goes; it is watched, so it is none of those that are timed."""
        request, trainee = self._request, self._built.trainee
        call = self._built.step if phase == "train" else self._serving.request
        release_unused(request.device)  # the check's records refer to each other, and would count as unexplained
        found = account(
            trainee.model, trainee.optimizer, call, birth=self._birth, device=request.device, phase=phase,
            compiled=request.variant.compile,
        )  # fmt: skip
        self._write(ACCOUNTS[phase], found)
        return Fragment()

    def profile(self) -> Fragment:
        """Where a step's time goes, and how many real tokens it holds; not yet what runs in it."""
        request, parts = self._request, self._built
        samples = step_times(parts.step, BorderedStep(parts.trainee, parts.stream, request), request.device)
        values = useful_tokens(parts.stream, request.workload.batch_size * request.variant.gradient_accumulation)
        return self._judged(Fragment(samples=samples, values=values), list(samples["train_loss"]))

    def peak(self, rates: Sequence[Rate]) -> Fragment:
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
        return Fragment()

    def activity(self) -> Fragment:
        """What runs in a step: the profiler's turn, after all else that a process is asked for. Training goes on."""
        request, parts = self._request, self._built
        unpack_4bit(parts.trainee.model)
        parts.trainee.model.train()
        bordered = BorderedStep(parts.trainee, parts.stream, request)
        self._write(ACTIVITY, profiled(bordered, request.device, Path(request.scratch)))
        return Fragment()

    def _write(self, name: str, found: object) -> None:
        (Path(self._request.scratch) / name).write_text(codec.dumps(found), encoding="utf-8")
