"""Measures a training: samples of its steps, peaks of memory, the energy of a GPU, the FLOPs of a step.

A quantity that one step lacks is left out for all steps. With several ranks, rank 0 writes the run, and the slowest
rank determines the time of each step.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lorameter.attach.batches import sum_known
from lorameter.attach.launch import WRAP
from lorameter.attach.observer import NotMeasuredError, Phase, StepReading, TrainingInfo
from lorameter.errors import LorameterError
from lorameter.machine.host import PeakMemoryTracker
from lorameter.machine.reading import Reading
from lorameter.machine.telemetry import energy_between, open_torch_gpu
from lorameter.models.costs.flops import StepProducts, StepTokens, count_products
from lorameter.models.costs.peaks import Rate, stated_peak
from lorameter.records.fileio import write_whole
from lorameter.records.os_errors import describe_error
from lorameter.records.record import Failure, Notice, Status

Columns = dict[str, list[float | None]]
"""Samples by their names in a record; None for a step without a value."""
_TIMED = {
    "step_time_s": "step_time_s",
    "step_cpu_time_s": "cpu_time_s",
    "data_time_s": "data_time_s",
    "forward_time_s": "forward_time_s",
    "backward_time_s": "backward_time_s",
    "optimizer_time_s": "optimizer_time_s",
    "gradient_norm": "gradient_norm",
    "timed_loss": "loss",
    "step_tokens": "real_tokens",
}
"""Fields of a reading, by the name of their samples of timed steps."""
_SUMMED = {
    "turn_sequences": "sequences",
    "turn_tokens": "real_tokens",
    "turn_padded_tokens": "padding_tokens",
}
"""Fields of a reading that are summed, by the name of their samples of turns."""


def turn_columns(turn: Sequence[StepReading]) -> Columns:
    """Samples of the timed steps of one turn, one value per step, and the sums of the turn."""
    columns: Columns = {name: [getattr(one, field) for one in turn] for name, field in _TIMED.items()}
    for name, field in _SUMMED.items():
        columns[name] = [sum_known([getattr(one, field) for one in turn])]
    return columns


def untimed_columns(phase: str, readings: Sequence[StepReading]) -> Columns:
    """Losses and real tokens of the other steps of a phase."""
    return {
        f"{phase}_loss": [one.loss for one in readings],
        f"{phase}_tokens": [one.real_tokens for one in readings],
    }


def complete_columns(columns: Columns) -> dict[str, tuple[float, ...]]:
    """The samples for which every step has a value."""
    return {
        name: tuple(float(value) for value in found if value is not None)
        for name, found in columns.items()
        if found and None not in found
    }


MAX_TIMED = 10_000
"""Maximum timed steps that are kept: a record is read completely, and later steps of a long training add little."""
WAIT_S = 10.0
"""Maximum time for which rank 0 waits for the files of the other ranks, which end at the same time."""
RankStep = tuple[float, int | None, int | None, int | None]
"""The time of a step on one rank in seconds, and its sequences, real tokens and padding."""


class Ranks:
    """The steps of one rank, and for rank 0 those of the others.

    Ranks wait for each other inside a step, so their times are close; a collective operation of the meter would add
    another wait and could hang. So each rank writes its steps to a file when it ends, and rank 0 reads the files. The
    ranks find the common folder without communication: they are children of one launcher.
    """

    def __init__(self, run: Path, training: TrainingInfo) -> None:
        wrapped = os.environ.get(WRAP)
        launched = run.with_name(f".ranks-{os.getppid()}-{os.environ.get('MASTER_PORT', '')}")
        self._folder = Path(wrapped) / "ranks" if wrapped else launched
        self._folder.mkdir(parents=True, exist_ok=True)
        self._rank, self._ranks = training.rank, training.ranks
        self._steps: list[RankStep] = []

    def add(self, reading: StepReading) -> None:
        """Add a step."""
        if len(self._steps) < 2 * MAX_TIMED:  # the timed steps are among them
            step = reading.step_time_s, reading.sequences, reading.real_tokens, reading.padding_tokens
            self._steps.append(step)

    def write(self) -> None:
        """Write the steps for rank 0, when the training has ended or is no longer measured."""
        write_whole(self._folder / f"{self._rank}.json", msgspec.json.encode(self._steps).decode())

    def merge(
        self, samples: Mapping[str, tuple[float, ...]], timed: Iterable[int], notices: list[Notice]
    ) -> dict[str, tuple[float, ...]]:
        """The samples of rank 0, with the time of each timed step from its slowest rank, and the tokens of all ranks.
        Waits for the files of the other ranks.

        A notice names ranks without a file, or with fewer steps; the tokens of all ranks are then unknown.
        """
        deadline = time.monotonic() + WAIT_S
        paths = [self._folder / f"{rank}.json" for rank in range(1, self._ranks)]
        while not all(path.is_file() for path in paths) and time.monotonic() < deadline:
            time.sleep(0.05)
        read = [msgspec.json.decode(path.read_bytes(), type=list[RankStep]) for path in paths if path.is_file()]
        others = [steps for steps in read if len(steps) >= len(self._steps)]
        shutil.rmtree(self._folder, ignore_errors=True)
        columns: Columns = {name: [] for name in ("step_time_s", "turn_sequences", "turn_tokens", "turn_padded_tokens")}
        missing = self._ranks - 1 - len(others)
        for number in timed:
            times, *counts = zip(*(rank[number - 1] for rank in (self._steps, *others)), strict=True)
            row = [max(times), *(None if missing else sum_known(count) for count in counts)]
            for found, value in zip(columns.values(), row, strict=True):
                found.append(value)
        columns["step_tokens"] = columns["turn_tokens"]
        if missing:
            notices.append(
                Notice(
                    code="rank-unseen",
                    message=f"{missing} of {self._ranks} ranks did not write the times of all steps: the "
                    "slowest rank may be slower than the given time, and the tokens of all ranks are unknown.",
                    remedy="Let all ranks end by themselves, and run them on one machine or with a shared runs "
                    "directory.",
                )
            )
        dropped = (*columns, "warmup_tokens")
        return {name: one for name, one in samples.items() if name not in dropped} | complete_columns(columns)


def loss_not_finite(readings: Sequence[StepReading]) -> Failure | None:
    """The failure of a training in which the loss of a step is not finite; None if all are finite."""
    for reading in readings:
        if reading.loss is not None and not math.isfinite(reading.loss):
            message = (
                f"the loss is {reading.loss} in step {reading.number}; a diverged run has no result. Lower the "
                "script's learning rate, or let it clip its gradients."
            )
            return Failure(phase="train", kind="LossNotFinite", message=message)
    return None


def describe_end(error: BaseException, phase: str) -> tuple[Status, Failure]:
    """The status and the failure of a training that an exception ended, or that was not measured to its end."""
    status, failure = describe_error(error, phase)
    if type(error) is NotMeasuredError:
        return "invalid", Failure(phase=phase, kind="NotFollowed", message=str(error), traceback=failure.traceback)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", Failure(phase=phase, kind="Interrupted", message="stopped by the user")
    return status, failure


class Peaks:
    """The peak memory of each phase so far, in this process."""

    def __init__(self, device: str) -> None:
        """Start measuring; the first phase is training."""
        self._tracker = PeakMemoryTracker(device)
        self._tracker.begin()
        self._found: dict[str, int] = {}
        self.phase: Phase = "train"

    def enter(self, phase: Phase) -> None:
        """End the current phase, and begin this one."""
        self.read()
        self.phase = phase
        self._tracker.begin()

    def read(self) -> dict[str, int]:
        """Bytes by their names in a record, including those of the current phase."""
        for name, size in self._tracker.peaks(self.phase).items():
            self._found[name] = max(size, self._found.get(name, 0))
        return dict(self._found)


class Energy:
    """Joules of one GPU over the intervals of training without evaluation or saving, and their steps and tokens."""

    def __init__(self, device: str) -> None:
        self._gpu = open_torch_gpu(device).value if device.startswith("cuda") else None
        self._begun: tuple[float, Reading[float]] | None = None
        self._before: Counter[str] = Counter()
        """Energy, steps and tokens of the earlier intervals."""
        self._interval: Counter[str] = Counter()
        self._tokens_unknown = False
        """Whether the tokens of a step are unknown."""

    def begin(self) -> None:
        """Begin an interval of training."""
        if self._gpu is not None:
            self._begun = (time.monotonic(), self._gpu.energy_j())
            self._interval = Counter()

    def step(self, reading: StepReading) -> None:
        """Add a step to the interval."""
        if self._gpu is not None:
            self._interval.update(energy_steps=1, energy_tokens=reading.real_tokens or 0)
        self._tokens_unknown = self._tokens_unknown or reading.real_tokens is None

    def end(self) -> None:
        """End the interval."""
        self._before, self._begun = self._sum_intervals(), None

    def _sum_intervals(self) -> Counter[str]:
        """Energy, steps and tokens of all intervals, including the current one if it is long enough."""
        if self._begun is None or self._gpu is None:
            return self._before
        begun_s, first = self._begun
        spent: Any = energy_between(first, self._gpu.energy_j(), time.monotonic() - begun_s).value
        return self._before if spent is None else self._before + self._interval + Counter(device_energy_train_j=spent)

    def values(self) -> dict[str, float]:
        """Values as in a trial's record; empty on a CPU, or if no interval was long enough."""
        found = dict(self._sum_intervals())
        if self._tokens_unknown:
            found.pop("energy_tokens", None)
        return {name: float(value) for name, value in found.items()}


# --- FLOPs ------------------------------------------------------------------------------------------------------------
# Pairs of query and key are counted for rows of the mean real length: slightly too few if the lengths differ.

RATES: dict[str, Rate] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}


class StepFlops:
    """The FLOPs of a training step, counted from the model's modules before the first step. It keeps no reference to
    the model."""

    def __init__(self, training: TrainingInfo) -> None:
        """Count the products of a training's model; FLOPs stay unknown if that fails."""
        model = getattr(training.module, "module", training.module)  # inside a distributed wrapper
        self._passes = training.accumulation or 1
        self._products: StepProducts | None = None
        self._rate: Rate = "float32"
        if getattr(model, "config", None) is not None:
            # The dtype of most products: the compute dtype of a 4-bit base, else that of the weights.
            quantization = getattr(model.config, "quantization_config", None)
            dtype = getattr(quantization, "bnb_4bit_compute_dtype", None) or getattr(model, "dtype", None)
            self._rate = RATES.get(str(dtype).removeprefix("torch."), "float32")
            with contextlib.suppress(LorameterError, AttributeError, TypeError):
                self._products = count_products(model)

    def values(self, samples: Mapping[str, tuple[float, ...]], device_name: str) -> dict[str, float]:
        """`model_flops_per_step`, the mean over the timed steps, and `peak_flops_per_s` of a device that is listed.

        Empty if the model or its tokens are unknown.
        """
        real, rows = samples.get("turn_tokens"), samples.get("turn_sequences")
        if not real or not rows or self._products is None:
            return {}
        positions, mean_rows = sum(real) / len(real), sum(rows) / len(rows)
        length = positions / mean_rows
        pairs = round(mean_rows * length * (length + 1) / 2)
        flops = self._products.flops(StepTokens(positions=round(positions), pairs=pairs, passes=self._passes)).model
        peak = stated_peak(device_name, self._rate)
        return {"model_flops_per_step": float(flops)} | ({} if peak is None else {"peak_flops_per_s": peak.per_s})
