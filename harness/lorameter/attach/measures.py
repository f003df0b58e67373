"""What is measured next to the steps of a training: peaks of memory, the energy of a GPU, and the FLOPs of a step.

The counts of FLOPs are those of a variant (`lorameter.models.costs.flops`), taken from the model at hand: its
configuration gives the shape, its adapter the ranks and targets. A model without an adapter trains all its weights,
which takes 6 N. One of a family whose layers are not known is counted from its modules
(`lorameter.models.costs.modules`). Pairs of a query and a key are those of rows of the mean real length, so a few too
few where lengths differ.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from lorameter.attach.observer import Phase, StepReading, TrainingInfo
from lorameter.attach.samples import StepSamples
from lorameter.errors import LorameterError, UsageError
from lorameter.machine.memory import PeakMemoryTracker
from lorameter.machine.nvml import NvmlDevice
from lorameter.machine.reading import Reading
from lorameter.machine.telemetry import card_of, energy_between
from lorameter.models.costs.flops import StepTokens, six_n, training_flops
from lorameter.models.costs.modules import count_products
from lorameter.models.costs.peaks import Rate, stated_peak
from lorameter.models.shapes import ModelShape, shape_of_config
from lorameter.studies.variant import LoraVariant


class Peaks:
    """The highest that each phase has come to so far, in the process that asks."""

    def __init__(self, device: str) -> None:
        """Nothing counts yet; a training is what comes first."""
        self._gauge = PeakMemoryTracker(device)
        self._found: dict[str, int] = {}
        self.phase: Phase = "train"
        """What the training does now."""

    def begin(self) -> None:
        """From here on they count."""
        self._gauge.begin()

    def enter(self, phase: Phase) -> None:
        """The phase under way has ended, and this one begins."""
        self._keep()
        self.phase = phase
        self._gauge.begin()

    def so_far(self) -> dict[str, int]:
        """Bytes by their names in a record, that of the phase under way among them."""
        self._keep()
        return dict(self._found)

    def _keep(self) -> None:
        for name, size in self._gauge.peaks(self.phase).items():
            self._found[name] = max(size, self._found.get(name, 0))


class Energy:
    """Joules of one GPU, by stretches; asks nothing on a CPU."""

    def __init__(self, device: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._device = device
        self._clock = clock
        self._card: NvmlDevice | None = None
        self._begun: tuple[float, Reading[float]] | None = None
        self._steps = self._tokens = self._of_steps = self._of_tokens = 0
        self._joules = 0.0
        self._counted = True
        """Whether the tokens of all steps are known."""

    def begin(self) -> None:
        """A stretch of training begins."""
        if self._device.startswith("cuda"):
            self._card = self._card or card_of(self._device).value
            if self._card is not None:
                self._begun = (self._clock(), self._card.energy_j())
                self._steps = self._tokens = 0

    def step(self, reading: StepReading) -> None:
        """A step of it."""
        self._steps += 1
        self._tokens += reading.real_tokens or 0
        self._counted = self._counted and reading.real_tokens is not None

    def end(self) -> None:
        """It is over."""
        self._joules, self._of_steps, self._of_tokens = self._so_far()
        self._begun = None

    def _so_far(self) -> tuple[float, int, int]:
        """Joules of all stretches, with their steps and tokens, that of the one under way as far as it has come."""
        joules, steps, tokens = self._joules, self._of_steps, self._of_tokens
        if self._begun is not None and self._card is not None:
            began_s, first = self._begun
            spent = energy_between(first, self._card.energy_j(), self._clock() - began_s)
            if spent.value is not None:
                joules, steps, tokens = joules + spent.value, steps + self._steps, tokens + self._tokens
        return joules, steps, tokens

    def values(self) -> dict[str, float]:
        """As of a trial's record; empty where no stretch was long enough."""
        joules, of_steps, of_tokens = self._so_far()
        if not of_steps:
            return {}
        tokens = {"energy_tokens": of_tokens} if self._counted and of_tokens else {}
        return {"device_energy_train_j": joules, "energy_steps": of_steps} | tokens


RATES: dict[str, Rate] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}


class Work:
    """What is known of it before the first step, of the model as it is then. Holds nothing of the model."""

    def __init__(self, training: TrainingInfo) -> None:
        """Reads the model of a training; where it cannot be counted nothing is known."""
        model = getattr(training.module, "module", training.module)  # inside what distributes it
        self._passes = training.accumulation or 1
        self._flops: Callable[[StepTokens], int] | None = None
        self._rate: Rate | None = None
        if getattr(model, "config", None) is not None:
            self._rate = _rate_of(model)
            with contextlib.suppress(LorameterError, AttributeError, TypeError):
                self._flops = _flops_of(model)

    def values(self, gathered: StepSamples, device_name: str) -> dict[str, float]:
        """`model_flops_per_step`, the mean over the timed steps, and `peak_flops_per_s` of a device that is listed.

        Empty where the model, its adapter or its tokens are not known.
        """
        samples = gathered.samples()
        flops = self._of_a_step(samples.get("turn_tokens", ()), samples.get("turn_sequences", ()))
        if flops is None:
            return {}
        peak = self._peak_per_s(device_name)
        return {"model_flops_per_step": flops} | ({} if peak is None else {"peak_flops_per_s": peak})

    def _of_a_step(self, real: Sequence[float], rows: Sequence[float]) -> float | None:
        """Of the mean step, by the real tokens and the sequences of each; None where it is not known."""
        if not real or not rows or self._flops is None:
            return None
        positions, mean_rows = sum(real) / len(real), sum(rows) / len(rows)
        mean = positions / mean_rows
        pairs = round(mean_rows * mean * (mean + 1) / 2)
        tokens = StepTokens(positions=round(positions), pairs=pairs, passes=self._passes)
        try:
            return float(self._flops(tokens))
        except (LorameterError, AttributeError, TypeError):
            return None

    def _peak_per_s(self, device_name: str) -> float | None:
        peak = None if self._rate is None else stated_peak(device_name, self._rate)
        return None if peak is None else peak.per_s


def _flops_of(model: Any) -> Callable[[StepTokens], int]:
    """In closed form where the layers of the model are known, else counted from its modules."""
    config = model.config
    try:
        shape = shape_of_config(config.to_dict(), getattr(config, "name_or_path", "") or "the model")
        known = _closed_form(shape, model)
        known(StepTokens(positions=1, pairs=1, passes=1))  # raises for layers that are not known
        return known
    except UsageError:
        products = count_products(model)
        return lambda tokens: products.flops(tokens).model


def _closed_form(shape: ModelShape, model: Any) -> Callable[[StepTokens], int]:
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        return lambda tokens: six_n(shape, tokens)
    adapter = adapters.get(getattr(model, "active_adapter", "default")) or next(iter(adapters.values()))
    targets = adapter.target_modules
    names = (targets,) if isinstance(targets, str) else tuple(sorted(targets))
    variant = LoraVariant(r=adapter.r, target_modules=names, use_dora=bool(getattr(adapter, "use_dora", False)))
    return lambda tokens: training_flops(shape, variant, tokens).model


def _rate_of(model: Any) -> Rate:
    """The type that most products run in: what a 4-bit base multiplies in, else that of the weights."""
    computes = getattr(getattr(model.config, "quantization_config", None), "bnb_4bit_compute_dtype", None)
    named = str(computes or getattr(model, "dtype", "float32")).removeprefix("torch.")
    return RATES.get(named, "float32")
