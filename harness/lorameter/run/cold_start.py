"""Measures a cold start as the sum of two parts: imports of a new interpreter, and loading plus the first answer.

The imports depend on the environment and not on the variant, so they are timed once per replicate and side. The rest is
timed in a fresh child of a process that has already imported the libraries.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import msgspec

from lorameter.records import codec
from lorameter.records.record import PartialRecord
from lorameter.run.workers import Executor
from lorameter.studies.request import TrialRequest

Imports = MutableMapping[tuple[int, str], PartialRecord]
"""Import times of new interpreters, by replicate and side."""


def measure_cold(executor: Executor, request: TrialRequest, imports: Imports, side: str) -> PartialRecord:
    """The sum with its parts, for a trial whose process has ended; missing import times are measured and added to
    `imports`. Raises `WorkerLostError`."""
    key, timeout_s = (request.replicate, side), request.protocol.step_timeout_s
    if key not in imports:
        imports[key] = executor.time_imports(request.log_path, timeout_s)
    if imports[key].status != "ok":
        return imports[key]
    worker = executor.launch()
    try:
        loaded = worker.ask("cold", request.trial, timeout_s, request=codec.to_json(request))
    finally:
        worker.close()
    if loaded.status != "ok":
        return loaded
    values: dict[str, float] = {**loaded.values, **imports[key].values}
    values["cold_start_time_s"] = values.pop("cold_after_import_time_s") + values["cold_import_time_s"]
    return msgspec.structs.replace(loaded, values=values, samples={"cold_start_time_s": (values["cold_start_time_s"],)})


def measure_whole(executor: Executor, request: TrialRequest) -> PartialRecord:
    """Measure a cold start in one new interpreter, to compare it with the sum. Raises `WorkerLostError`."""
    whole = executor.cold_start(request)
    if whole.status != "ok":
        return whole
    return PartialRecord(values={"cold_whole_time_s": whole.values["cold_start_time_s"]}, tokens=whole.tokens)
