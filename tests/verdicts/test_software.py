"""Tests of the software versions that scripts report, which override the versions found before their start."""

import msgspec
import pytest

from lorameter.records.record import TrialRecord
from lorameter.verdicts.software import differing_versions, facts_of, say_threads, versions_of

STATED = {
    "device": "cpu", "threads": 1, "python": "3.11.7", "libraries": {"torch": "2.13.0", "flash-attn": "2.8"},
    "engine": {"liger_kernel": None},
}  # fmt: skip
RECORD = TrialRecord(
    trial="r0-a", status="ok", name="a", variant="v", role="variant", replicate=0, position=0,
    interleaving="lockstep", seed=0, started_unix_s=1.0, wall_time_s=1.0,
)  # fmt: skip


def reporting(threads=None, **software):
    """Return a record whose process reports these versions; underscores replace hyphens."""
    versions = {name.replace("_", "-"): version for name, version in software.items()}
    return msgspec.structs.replace(RECORD, software=versions, values={} if threads is None else {"threads": threads})


def test_reported_versions_take_precedence():
    """Package names are normalised; a package that is not reported is not installed, whatever the other interpreter
    has."""
    records = [reporting(4.0, python="3.12.1", torch="2.14.0", cuda="12.8", liger_kernel="0.8.5")]
    found = versions_of(STATED, records)
    assert found == {
        "python": "3.12.1", "torch": "2.14.0", "flash-attn": None, "liger_kernel": "0.8.5", "cuda": "12.8",
    }  # fmt: skip
    facts = facts_of(STATED, records)
    assert (facts["python"], facts["cuda"], facts["device"]) == ("3.12.1", "12.8", "cpu")
    assert facts["libraries"] == {"torch": "2.14.0", "flash-attn": None}
    assert say_threads(STATED, records) == "4 threads"


@pytest.mark.parametrize(
    ("ours", "theirs", "differing"),
    [
        ([{"a": "1"}], [{"a": "1"}], []),
        ([{"a": "1"}], [{"a": "2"}], [("a", "1", "2")]),
        ([{"a": "1"}], [{"a": "1", "b": "3"}], [("b", "none", "3")]),
        ([{"a": "1"}, {"a": "2"}], [{"a": "1"}, {"a": "2"}], [("a", "1 or 2", "1 or 2")]),
        ([{"a": "1"}], [{}], []),
    ],
)
def test_differences_over_all_trials(ours, theirs, differing):
    """An environment may change during a run; a record without reported versions has no differences."""
    assert (
        list(differing_versions([reporting(**one) for one in ours], [reporting(**one) for one in theirs])) == differing
    )
