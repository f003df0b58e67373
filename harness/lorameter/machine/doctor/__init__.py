"""What a machine can run and measure, and what would disturb a measurement: `survey` reads facts, `examine` judges.

Most disturbances cost precision only: trials take turns, and intervals include the noise. A machine is unfit if no
trial could run, or if numbers would be wrong: another process's work, a GPU that protects itself, faulty memory.
"""

from __future__ import annotations

from lorameter.machine.doctor import checks, gpu_checks
from lorameter.machine.doctor.checks import DoctorCheck
from lorameter.machine.doctor.survey import Survey, survey

__all__ = ["DoctorCheck", "Survey", "examine", "is_fit", "survey"]


def examine(found: Survey) -> tuple[DoctorCheck, ...]:
    """All checks of a survey, in reading order."""
    card = found.card.value
    return (
        *checks.packages(found),
        checks.device(found),
        *checks.device_order(found),
        checks.memory(found),
        *checks.models(found),
        checks.runs_folder(found),
        *checks.host_meters(found),
        *(gpu_checks.card_meters(card) if card else ()),
        *checks.load(found),
        *checks.settings(found),
        *checks.limits(found),
        *(gpu_checks.card_state(card, root=found.root) if card else ()),
        *gpu_checks.shared_cards(found),
    )


def is_fit(checks: tuple[DoctorCheck, ...]) -> bool:
    """Whether something may be measured here."""
    return all(check.grade != "unfit" for check in checks)
