"""The metrics: what each is called, its unit, its phase, which way is worse, and how it follows from a record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from harness.records.record import TrialRecord
from harness.records.units import Unit

Phase = Literal["train", "generate", "cold"]
PHASES: tuple[Phase, ...] = ("train", "generate", "cold")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A named quantity. `higher_is_better` orients ratios: above 1 is always worse."""

    name: str
    title: str
    unit: Unit
    phase: Phase
    higher_is_better: bool = False


def _metric(name: str, title: str, unit: Unit, phase: Phase, *, higher: bool = False) -> tuple[str, Metric]:
    return name, Metric(name=name, title=title, unit=unit, phase=phase, higher_is_better=higher)


METRICS: dict[str, Metric] = dict(
    (
        _metric("step_time_s", "step time", "s", "train"),
        _metric("step_cpu_time_s", "step CPU time", "s", "train"),
        _metric("tokens_per_s", "real tokens/s", "1/s", "train", higher=True),
        _metric("time_per_real_token_s", "time per real token", "s", "train"),
        _metric("samples_per_s", "samples/s", "1/s", "train", higher=True),
        _metric("first_step_time_s", "first step", "s", "train"),
        _metric("energy_per_step_j", "energy per step", "J", "train"),
        _metric("energy_per_token_j", "energy per real token", "J", "train"),
        _metric("train_loss", "train loss", "1", "train"),
        _metric("held_out_loss", "held-out loss", "1", "train"),
        _metric("request_time_s", "request", "s", "generate"),
        _metric("first_token_time_s", "time to first token", "s", "generate"),
        _metric("time_per_output_token_s", "time per output token", "s", "generate"),
        _metric("output_tokens_per_s", "output tokens/s", "1/s", "generate", higher=True),
        _metric("natural_request_time_s", "request to its end", "s", "generate"),
        _metric("natural_tokens", "tokens to the end", "1", "generate"),
        _metric("natural_time_per_token_s", "per token, to the end", "s", "generate"),
        _metric("first_call_time_s", "first call", "s", "generate"),
        _metric("merged_request_time_s", "request, merged", "s", "generate"),
        _metric("merged_first_token_time_s", "first token, merged", "s", "generate"),
        _metric("merged_time_per_output_token_s", "per token, merged", "s", "generate"),
        _metric("cold_start_time_s", "cold start to completion", "s", "cold"),
        _metric("cold_import_time_s", "import", "s", "cold"),
        _metric("cold_load_time_s", "load", "s", "cold"),
        _metric("cold_first_token_time_s", "first token", "s", "cold"),
        _metric("cold_completion_time_s", "first completion", "s", "cold"),
    )
)

PHASE_TITLES: dict[Phase, str] = {
    "train": "Training",
    "generate": "Warm generation",
    "cold": "Cold start, a new interpreter to its first completion",
}
PEAKS: dict[Phase, tuple[str, ...]] = {
    "train": ("device_peak_allocated_train_bytes", "host_peak_train_bytes"),
    "generate": ("device_peak_allocated_generate_bytes", "host_peak_generate_bytes"),
    "cold": (),
}
"""Kinds of memory whose peaks stand for a phase; the first that was measured is shown."""
PRIMARY: dict[Phase, str] = {"train": "step_time_s", "generate": "request_time_s", "cold": "cold_start_time_s"}
"""The metric that stands for a phase in pytest-benchmark and in the ratio column."""


def primary_metric(phase: Phase, *, own_workloads: bool) -> str:
    """The metric that variants are compared by in a phase. Steps of different workloads hold different numbers of
    tokens, so their times say nothing beside each other; the time of a real token does."""
    return "time_per_real_token_s" if phase == "train" and own_workloads else PRIMARY[phase]


LOSSES = ("train_loss", "held_out_loss")
"""Metrics that say nothing without the number of steps that were trained."""
FINAL_SHARE = 4
"""The final train loss is that of the last quarter of all steps; their number is the same for every trial."""


def samples_of(record: TrialRecord, metric: str) -> tuple[float, ...]:
    """Samples of one trial; empty where it has none. Raises KeyError for a metric that does not exist."""
    METRICS[metric]  # an unknown name must not read as "not measured"
    if derive := _DERIVED.get(metric):
        return derive(record)
    if metric in record.samples:
        return record.samples[metric]
    return (record.values[metric],) if metric in record.values else ()


def _tokens_per_s(record: TrialRecord) -> tuple[float, ...]:
    seconds = sum(record.samples.get("step_time_s", ()))
    return (sum(record.samples["turn_real_tokens"]) / seconds,) if seconds else ()


def _time_per_real_token_s(record: TrialRecord) -> tuple[float, ...]:
    """The time of each step over the real tokens that a step holds in the mean of an epoch.

    A step takes as long for padding as for tokens. So dividing by the real tokens of the timed steps would put the
    lengths of a few records into the number, and those of others in a trial whose warm-up was longer.
    """
    times = record.samples.get("step_time_s", ())
    real, padded = record.tokens.get("real_tokens", 0), record.tokens.get("padded_tokens", 0)
    positions = sum(sum(record.samples.get(f"turn_{kind}_tokens", ())) for kind in ("real", "padded"))
    if not times or not real or not positions:
        return ()
    tokens = positions / len(times) * real / (real + padded)
    return tuple(seconds / tokens for seconds in times)


def _samples_per_s(record: TrialRecord) -> tuple[float, ...]:
    seconds = sum(record.samples.get("step_time_s", ()))
    return (sum(record.samples["turn_sequences"]) / seconds,) if seconds else ()


def _output_tokens_per_s(record: TrialRecord) -> tuple[float, ...]:
    tokens = record.values.get("new_tokens", 0.0)
    return tuple(tokens / seconds for seconds in record.samples.get("request_time_s", ()))


def _natural_time_per_token_s(record: TrialRecord) -> tuple[float, ...]:
    pairs = zip(record.samples.get("natural_request_time_s", ()), record.samples.get("natural_tokens", ()), strict=True)
    return tuple(seconds / tokens for seconds, tokens in pairs)


def _final_train_loss(record: TrialRecord) -> tuple[float, ...]:
    if "train_loss" not in record.samples:  # a trial that is not there to be timed ends its training early
        return ()
    losses = tuple(
        loss for name in ("warmup_loss", "train_loss", "catch_up_loss") for loss in record.samples.get(name, ())
    )
    return losses[-max(1, len(losses) // FINAL_SHARE) :]


def _energy_per(count: str) -> Callable[[TrialRecord], tuple[float, ...]]:
    """The device's energy over how many steps or tokens it was spent on; nothing where either was not measured."""

    def derive(record: TrialRecord) -> tuple[float, ...]:
        energy, counted = record.values.get("device_energy_train_j"), record.values.get(count)
        return (energy / counted,) if energy is not None and counted else ()

    return derive


_DERIVED: dict[str, Callable[[TrialRecord], tuple[float, ...]]] = {
    "tokens_per_s": _tokens_per_s,
    "time_per_real_token_s": _time_per_real_token_s,
    "samples_per_s": _samples_per_s,
    "output_tokens_per_s": _output_tokens_per_s,
    "natural_time_per_token_s": _natural_time_per_token_s,
    "train_loss": _final_train_loss,
    "energy_per_step_j": _energy_per("energy_steps"),
    "energy_per_token_j": _energy_per("energy_tokens"),
}
