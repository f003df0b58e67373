"""Requests until EOS, with their answers before and after training."""

from __future__ import annotations

from lorameter.measurements.declaration import GENERATE, Command, Measurement, Metric, Samples, Work
from lorameter.records.record import TrialRecord


def _open_ended_time_per_token_s(record: TrialRecord) -> Samples:
    pairs = zip(
        record.samples.get("open_ended_request_time_s", ()), record.samples.get("open_ended_tokens", ()), strict=True
    )
    return tuple(seconds / count for seconds, count in pairs)


def _cost_of_answer(work: Work) -> float:
    """An answer of the maximum length."""
    return work.request_s * work.workload.open_ended_tokens / work.workload.new_tokens


ANSWERS = Measurement(
    name="open_ended",
    title="requests to their end",
    phase=GENERATE,
    implementation="lorameter.trial.measurements.answers",
    applies=lambda study: study.workload.open_ended_tokens > 0,
    needs_requests=True,
    drop_rank=3,
    round=Command(name="open_ended", label="timing whole answers", telemetry_phase="generate", cost=_cost_of_answer),
    rounds="open_ended_requests",
    end=(
        Command(
            name="base_answers",
            label="answers before training",
            cost=lambda work: work.rounds * _cost_of_answer(work),
        ),
    ),
    metrics=(
        Metric(name="open_ended_request_time_s", title="request until EOS", unit="s", column="always"),
        Metric(name="open_ended_tokens", title="tokens to the end", unit="1", column="always"),
        Metric(
            name="open_ended_time_per_token_s",
            title="per token, to the end",
            unit="s",
            derive=_open_ended_time_per_token_s,
        ),
    ),
)
