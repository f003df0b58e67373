"""Cold starts: a new interpreter loads the saved adapter and answers."""

from __future__ import annotations

from lorameter.measurements.declaration import COLD, Command, Measurement, Metric

COLD_STARTS = Measurement(
    name="cold",
    title="cold starts",
    phase=COLD,
    implementation="lorameter.trial.measurements.cold",
    needs_adapter=True,
    needs_requests=True,
    in_new_process=True,
    drop_rank=1,
    round=Command(name="cold", label="cold start", cost=lambda work: work.load_s + work.request_s),
    metrics=(
        Metric(name="cold_start_time_s", title="cold start to completion", unit="s"),
        Metric(name="cold_import_time_s", title="import", unit="s", column="always"),
        Metric(name="cold_load_time_s", title="load", unit="s", column="always"),
        Metric(name="cold_first_token_time_s", title="first token", unit="s", column="always"),
        Metric(name="cold_completion_time_s", title="first completion", unit="s", column="always"),
    ),
)
