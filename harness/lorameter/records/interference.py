"""What sites of one machine cost each other, as it was measured: trials of the first site alone, and while the others
measured. They are none of the plan's, so they lie in a file of their own beside these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lorameter.errors import UsageError
from lorameter.records import codec, journal
from lorameter.records.record import TrialRecord

FILE = "beside.jsonl"
ALONE, BESIDE = "alone", "beside"
"""How a trial was measured; its name begins with that and the number of its round."""


def name_trial(how: str, number: int, site: str) -> str:
    """Of one round on a site."""
    return f"{how}-{number}-{site}"


def append(folder: Path, record: TrialRecord) -> None:
    """Keep a record with the run in this folder."""
    journal.append(folder / FILE, f"{codec.dumps(record)}\n")


def read(folder: Path) -> Iterator[TrialRecord]:
    """Those of the run in this folder; a line that a crash cut short is left out."""
    for line in journal.lines(folder / FILE):
        with contextlib.suppress(UsageError, codec.NotJsonError):
            yield codec.from_json(TrialRecord, codec.parse(line), FILE)


def read_pairs(folder: Path) -> list[tuple[TrialRecord, TrialRecord]]:
    """Alone and beside, of each round whose trials are both ok; none where nothing of the kind was measured."""
    found: dict[str, dict[str, TrialRecord]] = {}
    for record in read(folder):
        how, _, which = record.trial.partition("-")
        if record.status == "ok":
            found.setdefault(which, {})[how] = record
    return [(both[ALONE], both[BESIDE]) for both in found.values() if both.keys() == {ALONE, BESIDE}]
