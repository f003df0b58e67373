"""Tests of the validity of a run: report, comparison and baseline use the same answer, with reasons."""

import pytest

from lorameter.records import codec, store
from lorameter.studies.study import Study
from lorameter.verdicts.comparison_input import comparison_input
from lorameter.verdicts.validity import MOST_FAULTS, Fault, InvalidReason, run_validity, say_faults

TIMES = {"plain": [0.100, 0.101, 0.099, 0.1005], "nf4": [0.200, 0.201, 0.199, 0.2005]}


def validity_of(path):
    """Return the validity of a written run, and assert that a comparison has the same."""
    run = store.read_run(str(path), path.parent)
    found = run_validity(run, codec.from_json(Study, run.manifest.study, "run"))
    assert comparison_input(run).broken == found.broken
    return found


def test_a_whole_run_is_valid(write_run):
    """If every trial is ok and the control shows no difference, the run has no fault."""
    found = validity_of(write_run("a", TIMES))
    assert (found.valid, found.broken, found.failures, found.faults) == (True, None, (), ())


@pytest.mark.parametrize(
    ("options", "reason", "words"),
    [
        ({"status": "interrupted"}, "incomplete", "its status is 'interrupted', not 'complete'"),
        (
            {"control": 1.5},
            "control-differs",
            "its control regressed in phase 'train': the reference differs from itself",
        ),
        ({"control": None}, "control-not-measured", "the control of phase 'train' was not measured"),
        ({"status": "running"}, "incomplete", "its status is 'running', not 'complete'"),
    ],
)
def test_a_fault_of_a_run_makes_all_of_it_invalid(write_run, options, reason, words):
    """The report and a comparison give the same reason."""
    found = validity_of(write_run("a", TIMES, **options))
    assert not found.valid
    assert found.faults == (Fault(reason=InvalidReason(reason), message=words),)
    assert found.broken == f"run a: {words}"


def test_a_failed_trial_affects_only_its_own_variant(write_run):
    """The run is invalid, but the other variants can be compared."""

    def fails(record):
        return record.replaced(status="oom") if record.trial == "r1-nf4" else record

    path = write_run("a", TIMES, change=fails)
    found = validity_of(path)
    assert [(fault.reason, fault.variant) for fault in found.faults] == [(InvalidReason.TRIAL_FAILED, "nf4")]
    assert (found.valid, found.broken) == (False, None)
    assert found.failures == ("r1-nf4: oom (log: )",)
    sides = comparison_input(store.read_run(str(path), path.parent)).variants
    assert (sides["plain"].broken, sides["nf4"].broken) == (None, "run a: trial r1-nf4 is oom")


def test_many_faults_are_counted():
    """A crash at the start of every trial gives as many faults as trials."""
    faults = [Fault(reason=InvalidReason.TRIAL_FAILED, message=f"fault {index}") for index in range(MOST_FAULTS + 2)]
    assert say_faults(faults) == "fault 0; fault 1; fault 2; and 2 more"
