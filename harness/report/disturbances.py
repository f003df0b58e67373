"""What the meters say against the trials of a run: each kind of disturbance once, by the trial that it hit worst.

Turn for turn and trial for trial the record holds the values; a reader wants to know whether there was heat, a
neighbour or a hypervisor in it, in how many trials, and how bad it was at its worst.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.records.record import Notice, TrialRecord
from harness.verdicts.disturbance import WHILE, findings


def disturbances(records: Sequence[TrialRecord], *, on_cpu: bool) -> Iterator[Notice]:
    """A notice for each kind, those past the limit of what counts first."""
    found = [(record, phase, finding) for record in records for phase, finding in findings(record, on_cpu=on_cpu)]
    found.sort(key=lambda one: (not one[2].invalid, -one[2].weight))
    for code in dict.fromkeys(finding.code for _, _, finding in found):
        alike = [one for one in found if one[2].code == code]
        worst, phase, finding = alike[0]
        past = sorted({record.trial for record, _, other in alike if other.invalid})
        trials = len({record.trial for record, _, _ in alike})
        message = f"{trials} of {len(records)} trials; {worst.trial} while {WHILE[phase]}: {finding.message}."
        message += f" Past the limit: {_some(past)}." if past else ""
        yield Notice(code=code, message=message, remedy=finding.remedy)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
