"""Timed training steps, with their losses."""

from __future__ import annotations

import functools

from lorameter.measurements.declaration import TRAIN, Command, Measurement, Metric, Samples, Work
from lorameter.records.record import PartialRecord, TrialRecord

LOSSES = ("warmup_loss", "timed_loss", "remaining_loss")
"""Samples that hold the loss of each step, in the order of the steps."""


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


def _final_loss(record: TrialRecord) -> Samples:
    """The losses of the last quarter of all steps, whose number is the same for every trial."""
    if "timed_loss" not in record.samples:  # a trial that is not timed ends its training early
        return ()
    losses = losses_of_steps(record)
    return losses[-max(1, len(losses) // 4) :]


def _cost_of_steps(work: Work) -> float:
    return work.steps * work.step_s


STEPS = Measurement(
    name="steps",
    title="timed steps",
    phase=TRAIN,
    implementation="lorameter.trial.measurements.steps",
    round=Command(name="turn", label="timing steps", telemetry_phase="train", cost=_cost_of_steps),
    rounds="turns",
    end=(
        Command(name="train", label="training on, untimed", cost=_cost_of_steps),
        Command(
            name="finish_training",
            label="held-out loss and memory",
            needed_by=lambda one: True,
            ends="train",
            cost=lambda work: work.evaluate_s,
        ),
        Command(name="save_adapter", label="saving the adapter", needed_by=lambda one: one.needs_adapter),
    ),
    metrics=(
        Metric(name="step_time_s", title="step time", unit="s", column="own workloads"),
        Metric(name="step_cpu_time_s", title="step CPU time", unit="s"),
        # Parts of a script's step, if its source observes them.
        Metric(name="data_time_s", title="wait for data", unit="s", column="always"),
        Metric(name="forward_time_s", title="forward", unit="s", column="always"),
        Metric(name="backward_time_s", title="backward", unit="s", column="always"),
        Metric(name="optimizer_time_s", title="optimizer", unit="s", column="always"),
        Metric(
            name="tokens_per_s",
            title="tokens/s (without padding)",
            unit="1/s",
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
            higher_is_better=True,
            derive=_padded_tokens_per_s,
            of_trial="mean",
        ),
        Metric(
            name="mfu",
            title="MFU",
            unit="1",
            higher_is_better=True,
            derive=_mfu,
            column="always",
        ),
        Metric(
            name="time_per_real_token_s",
            title="time per real token",
            unit="s",
            derive=_time_per_real_token_s,
            per_token=True,
        ),
        Metric(
            name="samples_per_s",
            title="samples/s",
            unit="1/s",
            higher_is_better=True,
            derive=functools.partial(_rate, counted="turn_sequences"),
            of_trial="mean",
        ),
        # With several ranks: compared with one rank on the same batches, and from profiled steps.
        Metric(
            name="scaling_efficiency",
            title="scaling efficiency",
            unit="1",
            higher_is_better=True,
            derive=_scaling_efficiency,
            column="always",
        ),
        Metric(name="communication_share", title="communication", unit="1", column="always"),
        Metric(name="rank_imbalance", title="imbalance of ranks", unit="1"),
        Metric(name="gradient_norm", title="gradient norm", unit="1"),
        Metric(
            name="timed_loss",
            title="train loss",
            unit="1",
            derive=_final_loss,
            is_loss=True,
            column="one workload",
        ),
        Metric(
            name="held_out_loss",
            title="held-out loss",
            unit="1",
            is_loss=True,
            untrained="held_out_loss_initial",
            column="one workload",
        ),
    ),
)
