"""Warm requests with the adapter merged into the base, which ends the trial."""

from __future__ import annotations

from lorameter.measurements.declaration import GENERATE, Command, Measurement, Metric, cost_of_first_requests
from lorameter.measurements.requests import REQUEST

MERGED = Measurement(
    name="merged",
    title="merged requests",
    phase=GENERATE,
    implementation="lorameter.trial.measurements.merged",
    applies=lambda study: study.protocol.merged and all(variant.format.merges for variant in study.built),
    isolated_at=frozenset({"shared-base"}),
    needs_requests=True,
    drop_rank=2,
    begin=(Command(name="merge", label="merging the adapter", cost=cost_of_first_requests),),
    round=REQUEST,
    rounds="generate_requests",
    metrics=(
        Metric(name="merged_request_time_s", title="request, merged", unit="s", column="always"),
        Metric(name="merged_first_token_time_s", title="first token, merged", unit="s"),
        Metric(name="merged_time_per_output_token_s", title="per token, merged", unit="s"),
    ),
)
