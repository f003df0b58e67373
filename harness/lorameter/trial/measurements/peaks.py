"""Peaks of generation; those of training are read at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorameter.records.record import PartialRecord
from lorameter.trial.serving.server import check_attention

if TYPE_CHECKING:
    from lorameter.trial.trial import Trial


def end_generate(trial: Trial) -> PartialRecord:
    """Measure the peaks of generation."""
    if not trial.alone:
        return PartialRecord()
    fragment = PartialRecord(memory=trial.gauge.peaks("generate"))  # before the check, which has its own peak
    return check_attention(fragment, trial.trainee.model, trial.server, trial.request)
