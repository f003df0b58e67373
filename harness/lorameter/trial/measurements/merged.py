"""Merges the adapter; the requests that follow are those of `requests`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorameter.records.record import PartialRecord

if TYPE_CHECKING:
    from lorameter.trial.trial import Trial


def merge(trial: Trial) -> PartialRecord:
    """Merge the adapter into the base and warm up again. Ends the trial: the base is changed."""
    trial.server.merge(discard=1 + trial.request.protocol.generate_warmup)
    return PartialRecord()
