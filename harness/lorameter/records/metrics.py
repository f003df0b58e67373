"""The metrics: name, unit, phase, direction, and how to derive each from a record.

A metric is one entry of the table below. Its samples, its column in a report, its row in a comparison and whether it is
a loss follow from that entry, so a new metric is added only here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from lorameter.errors import InvalidRunError
from lorameter.records.record import Measure, PartialRecord, TrialRecord
from lorameter.records.units import Unit

Phase = Literal["train", "generate", "cold"]
PHASES: tuple[Phase, ...] = ("train", "generate", "cold")
PHASE_OF: dict[Measure, Phase] = {
    "steps": "train", "requests": "generate", "open_ended": "generate", "merged": "generate", "cold": "cold",
    "peaks": "train",
}  # fmt: skip
"""The phase to which each measure belongs."""


def phases_of(measures: Iterable[Measure]) -> tuple[Phase, ...]:
    """The phases that have one of these measures; peaks are measured beside others."""
    found = {PHASE_OF[measure] for measure in measures if measure != "peaks"}
    return tuple(phase for phase in PHASES if phase in found)


def common_measures(measures: Iterable[Collection[Measure]], *, ranks: int) -> tuple[Measure, ...]:
    """What can be measured of every variant, by what can be measured of each; of several ranks, training alone."""
    found = [one for one, phase in PHASE_OF.items() if ranks == 1 or phase == "train"]
    for known in measures:
        found = [one for one in found if one in known]
    return tuple(found)


Samples = tuple[float, ...]
LOSSES = ("warmup_loss", "timed_loss", "remaining_loss")
"""Samples that hold the loss of each step, in the order of the steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A named quantity."""

    name: str
    title: str
    unit: Unit
    phase: Phase
    higher_is_better: bool = False
    """Orients ratios so that above 1 is always worse."""
    derive: Callable[[TrialRecord], Samples] | None = None
    """Derives its samples from a record, () if it has none; None if a record stores them under the metric's name."""
    is_loss: bool = False
    """Whether it depends on the number of training steps."""
    untrained: str = ""
    """Of a loss, the value of a record that has the same loss before training, if it is measured."""
    column: Literal["", "always", "one workload", "own workloads"] = ""
    """Whether it is a column of its phase's table, in addition to the primary metric: never · always · if all variants
    share a workload · if some have their own. Losses over different tokens are not shown together, and the tokens a
    second of the timed steps depend on the records in them."""
    of_trial: Literal["median", "mean"] = "median"
    """How a trial's value is derived from its steps: a rate is the total of all steps over their total time."""
    per_token: bool = False
    """Whether it compares steps with different numbers of real tokens."""


def _rate(record: TrialRecord, counted: str) -> Samples:
    """The count of all turns over the time of their steps; () if it was not counted, as in some scripts."""
    seconds, counts = sum(record.samples.get("step_time_s", ())), record.samples.get(counted, ())
    return (sum(counts) / seconds,) if seconds and counts else ()


def _padded_tokens_per_s(record: TrialRecord) -> Samples:
    """Rate of all positions, including padding; () if there is no padding and the rate is the same."""
    padding = _rate(record, "turn_padded_tokens")
    return (padding[0] + _rate(record, "turn_tokens")[0],) if padding and padding[0] else ()


def _mfu(record: TrialRecord) -> Samples:
    """FLOPs that a step needs, over its time and the device's peak, if both are known."""
    needs, best = record.values.get("model_flops_per_step"), record.values.get("peak_flops_per_s")
    times = record.samples.get("step_time_s", ())
    return tuple(needs / (time_s * best) for time_s in times) if needs and best else ()


def _time_per_real_token_s(record: TrialRecord) -> Samples:
    """The time of each step, divided by the mean real tokens of a step in an epoch.

    A step takes as long for padding as for tokens. So dividing by the real tokens of the timed steps would make the
    metric depend on the lengths of a few records, and on different ones in a trial with a longer warm-up.
    """
    times = record.samples.get("step_time_s", ())
    if counts := real_tokens_of_steps(record):  # of a script, whose epoch is unknown: the mean of all its steps
        return tuple(seconds * len(counts) / sum(counts) for seconds in times) if sum(counts) else ()
    real, padded = record.tokens.get("real_tokens", 0), record.tokens.get("padded_tokens", 0)
    positions = sum(sum(record.samples.get(name, ())) for name in ("turn_tokens", "turn_padded_tokens"))
    if not times or not real or not positions:
        return ()
    tokens = positions / len(times) * real / (real + padded)
    return tuple(seconds / tokens for seconds in times)


def _scaling_efficiency(record: TrialRecord) -> Samples:
    """The step time of one rank over that of several ranks times their number, turn by turn; 1 is ideal."""
    ranks, one_rank = record.values.get("ranks", 0.0), record.samples.get("one_rank_step_time_s", ())
    pairs = zip(one_rank, record.samples.get("step_time_s", ()), strict=False)
    return tuple(alone / (ranks * together) for alone, together in pairs) if ranks else ()


def real_tokens_of_steps(record: TrialRecord) -> Samples:
    """Real tokens in each step of a script, in order; () if they were not counted."""
    names = ("warmup_tokens", "step_tokens", "remaining_tokens")
    return tuple(count for name in names for count in record.samples.get(name, ()))


def losses_of_steps(record: PartialRecord) -> Samples:
    """The loss of each step, in order; () if no loss was measured."""
    return tuple(loss for name in LOSSES for loss in record.samples.get(name, ()))


def _output_tokens_per_s(record: TrialRecord) -> Samples:
    """Rate over all answers of a request; a record without a number of prompts has one prompt."""
    tokens = record.values.get("new_tokens", 0.0) * record.values.get("request_batch", 1.0)
    return tuple(tokens / seconds for seconds in record.samples.get("request_time_s", ()))


def _ratio_to_request(*names: str) -> Callable[[TrialRecord], Samples]:
    """The sum of these times over the time of a request with the same prompts, one adapter and no switch."""

    def derive(record: TrialRecord) -> Samples:
        parts = zip(*(record.samples.get(name, ()) for name in (*names, "request_time_s")), strict=False)
        return tuple(sum(times) / request for *times, request in parts)

    return derive


def _open_ended_time_per_token_s(record: TrialRecord) -> Samples:
    pairs = zip(
        record.samples.get("open_ended_request_time_s", ()), record.samples.get("open_ended_tokens", ()), strict=True
    )
    return tuple(seconds / count for seconds, count in pairs)


def _final_loss(record: TrialRecord) -> Samples:
    """The losses of the last quarter of all steps, whose number is the same for every trial."""
    if "timed_loss" not in record.samples:  # a trial that is not timed ends its training early
        return ()
    losses = losses_of_steps(record)
    return losses[-max(1, len(losses) // 4) :]


def _energy_per(count: str) -> Callable[[TrialRecord], Samples]:
    """The device's energy per step or token; empty if either was not measured."""

    def derive(record: TrialRecord) -> Samples:
        energy, counted = record.values.get("device_energy_train_j"), record.values.get(count)
        return (energy / counted,) if energy is not None and counted else ()

    return derive


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(name="step_time_s", title="step time", unit="s", phase="train", column="own workloads"),
        Metric(name="step_cpu_time_s", title="step CPU time", unit="s", phase="train"),
        # Parts of a script's step, if its source observes them.
        Metric(name="data_time_s", title="wait for data", unit="s", phase="train", column="always"),
        Metric(name="forward_time_s", title="forward", unit="s", phase="train", column="always"),
        Metric(name="backward_time_s", title="backward", unit="s", phase="train", column="always"),
        Metric(name="optimizer_time_s", title="optimizer", unit="s", phase="train", column="always"),
        Metric(
            name="tokens_per_s",
            title="tokens/s (without padding)",
            unit="1/s",
            phase="train",
            higher_is_better=True,
            derive=functools.partial(_rate, counted="turn_tokens"),
            of_trial="mean",
            column="one workload",
            per_token=True,
        ),
        Metric(
            name="padded_tokens_per_s",
            title="tokens/s with padding",
            unit="1/s",
            phase="train",
            higher_is_better=True,
            derive=_padded_tokens_per_s,
            of_trial="mean",
        ),
        Metric(
            name="mfu",
            title="MFU",
            unit="1",
            phase="train",
            higher_is_better=True,
            derive=_mfu,
            column="always",
        ),
        Metric(
            name="time_per_real_token_s",
            title="time per real token",
            unit="s",
            phase="train",
            derive=_time_per_real_token_s,
            per_token=True,
        ),
        Metric(
            name="samples_per_s",
            title="samples/s",
            unit="1/s",
            phase="train",
            higher_is_better=True,
            derive=functools.partial(_rate, counted="turn_sequences"),
            of_trial="mean",
        ),
        # With several ranks: compared with one rank on the same batches, and from profiled steps.
        Metric(
            name="scaling_efficiency",
            title="scaling efficiency",
            unit="1",
            phase="train",
            higher_is_better=True,
            derive=_scaling_efficiency,
            column="always",
        ),
        Metric(name="communication_share", title="communication", unit="1", phase="train", column="always"),
        Metric(name="rank_imbalance", title="imbalance of ranks", unit="1", phase="train"),
        Metric(name="gradient_norm", title="gradient norm", unit="1", phase="train"),
        Metric(name="first_step_time_s", title="first step", unit="s", phase="train"),
        Metric(
            name="energy_per_step_j",
            title="energy per step",
            unit="J",
            phase="train",
            derive=_energy_per("energy_steps"),
            of_trial="mean",
        ),
        Metric(
            name="energy_per_token_j",
            title="energy per real token",
            unit="J",
            phase="train",
            derive=_energy_per("energy_tokens"),
            of_trial="mean",
            per_token=True,
        ),
        Metric(
            name="timed_loss",
            title="train loss",
            unit="1",
            phase="train",
            derive=_final_loss,
            is_loss=True,
            column="one workload",
        ),
        Metric(
            name="held_out_loss",
            title="held-out loss",
            unit="1",
            phase="train",
            is_loss=True,
            untrained="held_out_loss_initial",
            column="one workload",
        ),
        Metric(name="request_time_s", title="request", unit="s", phase="generate"),
        Metric(name="first_token_time_s", title="time to first token", unit="s", phase="generate", column="always"),
        Metric(
            name="time_per_output_token_s", title="time per output token", unit="s", phase="generate", column="always"
        ),
        Metric(
            name="output_tokens_per_s",
            title="output tokens/s",
            unit="1/s",
            phase="generate",
            higher_is_better=True,
            derive=_output_tokens_per_s,
        ),
        Metric(
            name="open_ended_request_time_s", title="request until EOS", unit="s", phase="generate", column="always"
        ),
        Metric(name="open_ended_tokens", title="tokens to the end", unit="1", phase="generate", column="always"),
        Metric(
            name="open_ended_time_per_token_s",
            title="per token, to the end",
            unit="s",
            phase="generate",
            derive=_open_ended_time_per_token_s,
        ),
        Metric(name="first_call_time_s", title="first call", unit="s", phase="generate"),
        Metric(name="merged_request_time_s", title="request, merged", unit="s", phase="generate", column="always"),
        Metric(name="merged_first_token_time_s", title="first token, merged", unit="s", phase="generate"),
        Metric(name="merged_time_per_output_token_s", title="per token, merged", unit="s", phase="generate"),
        # With several adapters on one base, compared with requests of one of them; a factor of 1 means no cost.
        Metric(name="switch_time_s", title="switch of adapters", unit="s", phase="generate", column="always"),
        Metric(name="switched_request_time_s", title="request after a switch", unit="s", phase="generate"),
        Metric(
            name="switching_factor",
            title="switching, factor",
            unit="1",
            phase="generate",
            column="always",
            derive=_ratio_to_request("switch_time_s", "switched_request_time_s"),
        ),
        Metric(name="mixed_request_time_s", title="request, mixed", unit="s", phase="generate", column="always"),
        Metric(name="mixed_first_token_time_s", title="first token, mixed", unit="s", phase="generate"),
        Metric(name="mixed_time_per_output_token_s", title="per token, mixed", unit="s", phase="generate"),
        Metric(
            name="mixing_factor",
            title="mixing, factor",
            unit="1",
            phase="generate",
            column="always",
            derive=_ratio_to_request("mixed_request_time_s"),
        ),
        Metric(name="cold_start_time_s", title="cold start to completion", unit="s", phase="cold"),
        Metric(name="cold_import_time_s", title="import", unit="s", phase="cold", column="always"),
        Metric(name="cold_load_time_s", title="load", unit="s", phase="cold", column="always"),
        Metric(name="cold_first_token_time_s", title="first token", unit="s", phase="cold", column="always"),
        Metric(name="cold_completion_time_s", title="first completion", unit="s", phase="cold", column="always"),
    )
}
"""By name, in display order."""

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
"""Kinds of memory whose peaks represent a phase; the first measured kind is shown."""
RSS_AT_START = "host_rss_at_start_bytes"
"""The kind of memory that a process held at its start; it is a part of a host's peak."""
PRIMARY: dict[Phase, str] = {"train": "step_time_s", "generate": "request_time_s", "cold": "cold_start_time_s"}
"""The metric that represents a phase in pytest-benchmark and in the ratio column."""


def primary_metric(phase: Phase, *, own_workloads: bool) -> str:
    """The metric by which variants are compared in a phase. Steps of different workloads hold different numbers of
    tokens, so their times cannot be compared; the time per real token can."""
    return "time_per_real_token_s" if phase == "train" and own_workloads else PRIMARY[phase]


def get_samples(record: TrialRecord, metric: str) -> Samples:
    """Samples of one trial; empty if it has none.

    Raises:
        KeyError: the metric is unknown, which must not look like "not measured".
        InvalidRunError: the record is one that no trial writes.
    """
    derive = METRICS[metric].derive
    if derive is None:
        return record.samples.get(metric, (record.values[metric],) if metric in record.values else ())
    try:
        return derive(record)
    except (ArithmeticError, LookupError, ValueError) as error:
        raise InvalidRunError(
            f"trial {record.trial}: {metric} cannot be computed from its record: {error}. Restore trials.jsonl, or "
            "measure again."
        ) from None


def phase_columns(phase: Phase, *, own_workloads: bool) -> tuple[str, ...]:
    """Metrics that are columns of a phase's table; `own_workloads`: whether variants have different workloads."""
    shown = ("always", "own workloads" if own_workloads else "one workload")
    return tuple(metric.name for metric in METRICS.values() if metric.phase == phase and metric.column in shown)
