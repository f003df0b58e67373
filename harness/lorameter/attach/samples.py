"""What steps showed, as samples of a trial's record. What one of them did not show is left out for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorameter.attach.observer import StepReading

_TIMED: Mapping[str, str] = {
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
"""Samples of timed steps by the field of a reading that they hold."""
_COUNTED: Mapping[str, str] = {
    "turn_sequences": "sequences",
    "turn_tokens": "real_tokens",
    "turn_loss_tokens": "loss_tokens",
}
"""Samples of turns by the field of a reading that they sum."""


def timed_samples(turns: Sequence[Sequence[StepReading]]) -> dict[str, tuple[float, ...]]:
    """Samples of timed steps, one a step, and what each turn of them held."""
    readings = [reading for turn in turns for reading in turn]
    steps = {name: _all([getattr(one, field) for one in readings]) for name, field in _TIMED.items()}
    return {name: samples for name, samples in (steps | _counts_of(turns)).items() if samples}


def timed_columns(reading: StepReading) -> dict[str, float | None]:
    """What a timed step adds to these samples as a turn of its own; None where it did not show it."""
    found = {name: getattr(reading, field) for name, field in _TIMED.items()}
    found |= {name: getattr(reading, field) for name, field in _COUNTED.items()}
    real, padded = reading.real_tokens, reading.padded_tokens
    found["turn_padded_tokens"] = None if real is None or padded is None else padded - real
    return {name: None if value is None else float(value) for name, value in found.items()}


def untimed_columns(losses: str, tokens: str, reading: StepReading) -> dict[str, float | None]:
    """What another step adds to `untimed_samples`."""
    real = reading.real_tokens
    return {losses: reading.loss, tokens: None if real is None else float(real)}


def untimed_samples(losses: str, tokens: str, readings: Sequence[StepReading]) -> dict[str, tuple[float, ...]]:
    """Losses and real tokens of other steps, by these names."""
    found = {losses: _all([one.loss for one in readings]), tokens: _all([one.real_tokens for one in readings])}
    return {name: samples for name, samples in found.items() if samples}


def _counts_of(turns: Sequence[Sequence[StepReading]]) -> dict[str, tuple[float, ...]]:
    """What each turn held: sequences, real tokens, tokens that the loss is over, and padding."""
    found = {
        name: _all([_sum([getattr(one, field) for one in turn]) for turn in turns]) for name, field in _COUNTED.items()
    }
    real = found["turn_tokens"]
    positions = _all([_sum([one.padded_tokens for one in turn]) for turn in turns])
    found["turn_padded_tokens"] = tuple(whole - own for whole, own in zip(positions, real, strict=False))
    return found


def _all(values: Sequence[float | None]) -> tuple[float, ...]:
    known = tuple(float(value) for value in values if value is not None)
    return known if len(known) == len(values) else ()


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
