"""A profile of requests: what was observed of them, as facts; what they mean is computed from these on demand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from lorameter.models.shapes import ModelShape
from lorameter.profile.accounting import Names
from lorameter.profile.facts import Watched
from lorameter.records.activity import REQUEST_PHASES, Activity, RequestFacts
from lorameter.records.memory_account import MemoryAccount

SERVED = Names(what="request", phases=REQUEST_PHASES)
MERGED = Names(what="request", phases=REQUEST_PHASES, prefix="merged_")
COLD_PARTS: Mapping[str, str] = {
    "cold_import_time_s": "interpreter and imports",
    "cold_prepare_time_s": "limits, data and device",
    "cold_base_time_s": "reading, moving and quantising the base",
    "cold_adapter_time_s": "the adapter",
    "cold_first_token_time_s": "first token",
    "cold_rest_s": "all other tokens",
}
"""Parts of a cold start in their order; they are one after the other, so that they add up to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestProfile(Watched):
    """All that was observed of one variant's requests; times with the adapter merged begin with "merged_". What ran is
    that of the adapter as the variant serves it."""

    facts: RequestFacts
    merged_activity: Activity | None
    """What ran with the adapter merged; None where the variant serves it so."""
    memory: MemoryAccount
    """At the peak of a request."""
    shape: ModelShape | None = None
    """Of the model; None where its files do not say."""

    @property
    def merged(self) -> RequestProfile | None:
        """The same profile with what was seen of the merged adapter in place of the other."""
        if self.merged_activity is None:
            return None
        return dataclasses.replace(self, activity=self.merged_activity)

    @property
    def cold_parts_s(self) -> dict[str, float]:
        """Seconds of each part of a cold start; nothing where it was not taken apart."""
        values = self.record.values
        if "cold_base_time_s" not in values:
            return {}
        known = values | {"cold_rest_s": values["cold_completion_time_s"] - values["cold_first_token_time_s"]}
        return {name: known[name] for name in COLD_PARTS if name in known}
