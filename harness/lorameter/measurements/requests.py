"""Warm requests of a fixed number of tokens; with several adapters also after a switch, and mixed."""

from __future__ import annotations

from collections.abc import Callable

from lorameter.measurements.declaration import (
    GENERATE,
    Command,
    Measurement,
    Metric,
    Samples,
    Work,
    cost_of_first_requests,
)
from lorameter.records.record import TrialRecord


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


def _cost_of_round(work: Work) -> float:
    return (3 if work.workload.adapters > 1 else 1) * work.request_s


REQUEST = Command(name="request", label="timing requests", telemetry_phase="generate", cost=_cost_of_round)
REQUESTS = Measurement(
    name="requests",
    title="requests",
    phase=GENERATE,
    implementation="lorameter.trial.measurements.requests",
    needs_requests=True,
    drop_rank=4,
    begin=(
        Command(name="begin_generate", label="first call", needed_by=lambda one: True, cost=cost_of_first_requests),
    ),
    round=REQUEST,
    rounds="generate_requests",
    metrics=(
        Metric(name="request_time_s", title="request", unit="s"),
        Metric(name="first_token_time_s", title="time to first token", unit="s", column="always"),
        Metric(name="time_per_output_token_s", title="time per output token", unit="s", column="always"),
        Metric(
            name="output_tokens_per_s",
            title="output tokens/s",
            unit="1/s",
            higher_is_better=True,
            derive=_output_tokens_per_s,
        ),
        # With several adapters on one base, compared with requests of one of them; a factor of 1 means no cost.
        Metric(name="switch_time_s", title="switch of adapters", unit="s", column="always"),
        Metric(name="switched_request_time_s", title="request after a switch", unit="s"),
        Metric(
            name="switching_factor",
            title="switching, factor",
            unit="1",
            column="always",
            derive=_ratio_to_request("switch_time_s", "switched_request_time_s"),
        ),
        Metric(name="mixed_request_time_s", title="request, mixed", unit="s", column="always"),
        Metric(name="mixed_first_token_time_s", title="first token, mixed", unit="s"),
        Metric(name="mixed_time_per_output_token_s", title="per token, mixed", unit="s"),
        Metric(
            name="mixing_factor",
            title="mixing, factor",
            unit="1",
            column="always",
            derive=_ratio_to_request("mixed_request_time_s"),
        ),
    ),
)
