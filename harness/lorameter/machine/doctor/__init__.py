"""What this machine can run and measure, and what would spoil a measurement here: judged before anything is measured.

Most of what spoils a measurement can be borne: trials take turns, and the intervals carry the noise. A machine is unfit
only where no trial could run, or where its numbers would be those of something else: of a neighbour's work, of a GPU
that protects itself, of a broken memory.
"""

from __future__ import annotations

from lorameter.machine.doctor.card import card_meters, card_state
from lorameter.machine.doctor.check import DoctorCheck
from lorameter.machine.doctor.host import disturbances, host_meters, limits, settings
from lorameter.machine.doctor.means import device, memory, models, packages
from lorameter.machine.doctor.several import card_server, cards_of_ranks, interconnect, runs_folder
from lorameter.machine.doctor.survey import Survey, survey

__all__ = ["Check", "Survey", "examine", "is_fit", "survey"]


def examine(found: Survey) -> tuple[DoctorCheck, ...]:
    """All checks of a survey, in the order in which one would read them."""
    card = found.card.value
    return (
        *packages(found),
        *device(found),
        *memory(found),
        *models(found),
        *runs_folder(found),
        *host_meters(found),
        *(card_meters(card) if card else ()),
        *interconnect(found),
        *disturbances(found),
        *settings(found),
        *limits(found),
        *(card_state(card, root=found.root) if card else ()),
        *cards_of_ranks(found),
        *card_server(found.environment, on_card=card is not None),
    )


def is_fit(checks: tuple[DoctorCheck, ...]) -> bool:
    """Whether something may be measured here."""
    return all(check.standing != "unfit" for check in checks)
