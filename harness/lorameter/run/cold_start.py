"""A cold start as the sum of two parts: the imports of a new interpreter, and the load of a model and its first answer.

The imports depend on the environment and not on the variant, so they are timed once a replicate and side. The rest is
timed in a fresh child of a process that has imported.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import msgspec

from lorameter.records import codec
from lorameter.records.record import Failure, PartialRecord
from lorameter.run.workers import Executor, WorkerLostError
from lorameter.studies.request import TrialRequest


@dataclass(frozen=True, slots=True)
class ColdStart:
    """The cold start of one trial, whose process has ended."""

    executor: Executor
    request: TrialRequest
    imports: MutableMapping[tuple[int, str], PartialRecord]
    """What new interpreters took to import so far, by replicate and side; the missing one is added."""
    side: str
    warm: Any
    """What the trained process answered, which a cold start must answer too; None where it was not asked."""

    def measure(self) -> PartialRecord:
        """The sum with its parts; a record that is not ok where a process fails."""
        return self._guard(self._sum)

    def measure_whole(self) -> PartialRecord:
        """A cold start in one new interpreter, with which the sum can be compared."""
        return self._guard(self._whole)

    def _sum(self) -> PartialRecord:
        request, key = self.request, (self.request.replicate, self.side)
        timeout_s = request.protocol.step_timeout_s
        if key not in self.imports:
            self.imports[key] = self.executor.time_imports(request.log_path, timeout_s)
        imported = self.imports[key]
        if imported.status != "ok":
            return imported
        worker = self.executor.launch()
        try:
            loaded = worker.ask("cold", request.trial, timeout_s, request=codec.to_json(request))
        finally:
            worker.close()
        if loaded.status != "ok":
            return loaded
        values: dict[str, float] = {**loaded.values, **imported.values}
        whole_s = values.pop("cold_after_import_time_s") + values["cold_import_time_s"]
        values["cold_start_time_s"] = whole_s
        return msgspec.structs.replace(loaded, values=values, samples={"cold_start_time_s": (whole_s,)})

    def _whole(self) -> PartialRecord:
        found = self.executor.cold_start(self.request)
        if found.status != "ok":
            return found
        return PartialRecord(values={"cold_whole_time_s": found.values["cold_start_time_s"]}, tokens=found.tokens)

    def _guard(self, start: Callable[[], PartialRecord]) -> PartialRecord:
        try:
            fragment = start()
        except WorkerLostError as lost:
            return PartialRecord().failed(lost.status, lost.failure)
        if fragment.status != "ok":  # it says itself why it has no answer
            return fragment
        cold = fragment.tokens.get("cold_completion")
        if self.warm is not None and self.warm != cold:  # it would be the cold start of another model
            message = f"the new process answered {cold} where the trained process had answered {self.warm}"
            return fragment.failed("invalid", Failure(phase="cold", kind="OtherCompletion", message=message))
        return fragment
