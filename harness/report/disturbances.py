"""What the meters say against the trials of a run: each kind of disturbance once, by the trial that it hit worst.

Turn for turn and trial for trial the record holds the values; a reader wants to know whether there was heat, a
neighbour or a hypervisor in it, in how many trials, and how bad it was at its worst.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.meters.validity import Finding, judge
from harness.record import Notice, TrialRecord
from harness.series import occupancy

WHILE = {"train": "training", "generate": "generating"}


def disturbances(records: Sequence[TrialRecord], *, on_cpu: bool) -> Iterator[Notice]:
    """A notice for each kind, those that ask for another measurement first."""
    found = [(record, phase, finding) for record in records for phase, finding in findings(record, on_cpu=on_cpu)]
    found.sort(key=lambda one: (not one[2].invalid, -one[2].weight))
    for code in dict.fromkeys(finding.code for _, _, finding in found):
        alike = [one for one in found if one[2].code == code]
        worst, phase, finding = alike[0]
        again = sorted({record.trial for record, _, other in alike if other.invalid})
        trials = len({record.trial for record, _, _ in alike})
        urgent = f" Measure again: {_some(again)}." if again else ""
        yield Notice(
            code=code,
            message=f"{trials} of {len(records)} trials; {worst.trial} while {WHILE[phase]}: {finding.message}.",
            remedy=f"{finding.remedy}{urgent}",
        )


def findings(record: TrialRecord, *, on_cpu: bool) -> Iterator[tuple[str, Finding]]:
    """What the surroundings say against one trial, with the phase.

    A CPU that a training trial had too little of is left to the notice on occupancy, which counts for every trial,
    unless the trial is to be measured again for it.
    """
    in_turns = record.interleaving in ("shared-base", "lockstep")
    for phase in WHILE:
        share = occupancy(record) if on_cpu and phase == "train" else None
        for finding in judge(record.values, record.memory, phase, in_turns=in_turns, occupancy=share):
            if finding.code != "contended" or share is None or finding.invalid:
                yield phase, finding


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
