"""What the surroundings say against a trial: disturbances by phase, and the record of one that must not count.

A trial that ran next to another user's job, or on a GPU that protected itself from heat, has numbers of
these and not of its variant. It is judged by its surroundings only (`lorameter.machine.disturbances`); a rule that
looked at its times would select them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorameter.machine.disturbances import Disturbance, judge
from lorameter.records.record import DISTURBED, Failure, Notice, TrialRecord
from lorameter.records.units import first_few
from lorameter.verdicts.series import occupancy

WHILE = {"train": "training", "generate": "generating"}
"""The phases that are watched, as words."""


def disturbances_of(record: TrialRecord, *, on_cpu: bool) -> Iterator[tuple[str, Disturbance]]:
    """What the surroundings say against one trial, with the phase.

    A CPU of which a training trial of one thread had too little is left to the notice on occupancy, which counts for
    every such trial, unless the trial is to be measured again for it.
    """
    in_turns = record.interleaving in ("shared-base", "lockstep")
    for phase in WHILE:
        share = occupancy(record) if on_cpu and phase == "train" else None
        for disturbance in judge(record.values, record.memory, phase, in_turns=in_turns, occupancy=share):
            if disturbance.code != "cpu-contention" or share is None or disturbance.invalid:
                yield phase, disturbance


def mark_disturbed(record: TrialRecord, *, on_cpu: bool) -> TrialRecord:
    """The record itself, or as invalid where its surroundings were past a limit; the samples stay in it."""
    past = [(phase, one) for phase, one in disturbances_of(record, on_cpu=on_cpu) if one.invalid]
    if record.status != "ok" or not past:
        return record
    message = "; ".join(f"while {WHILE[phase]} {one.message}" for phase, one in past)
    return record.replaced(status="invalid", failure=Failure(phase=past[0][0], kind=DISTURBED, message=message))


def disturbances(records: Sequence[TrialRecord], *, on_cpu: bool) -> Iterator[Notice]:
    """A notice for each kind, those past the limit of what counts first."""
    found = [(record, phase, one) for record in records for phase, one in disturbances_of(record, on_cpu=on_cpu)]
    found.sort(key=lambda one: (not one[2].invalid, -one[2].weight))
    for code in dict.fromkeys(disturbance.code for _, _, disturbance in found):
        alike = [one for one in found if one[2].code == code]
        worst, phase, disturbance = alike[0]
        past = sorted({record.trial for record, _, other in alike if other.invalid})
        trials = len({record.trial for record, _, _ in alike})
        message = f"{trials} of {len(records)} trials; {worst.trial} while {WHILE[phase]}: {disturbance.message}."
        message += f" Past the limit: {first_few(past, 3)}." if past else ""
        yield Notice(code=code, message=message, remedy=disturbance.remedy)
