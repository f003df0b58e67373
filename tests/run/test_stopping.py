"""Tests of when a run stops: at sufficient precision, at the time limit, or at a planned look if all is decided."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math

import pytest
from rich.console import Console

import lorameter.run.workers.local
from lorameter.errors import UsageError
from lorameter.measurements.metrics import PRIMARY
from lorameter.records import store
from lorameter.records.record import PartialRecord, TrialRecord
from lorameter.report.live import LiveDisplay
from lorameter.report.run_view import make_run_view
from lorameter.run.budget import Budget
from lorameter.run.measure import measure
from lorameter.run.plan import make_plan
from lorameter.run.runner import find_stop
from lorameter.verdicts.compare import comparison_input
from lorameter.verdicts.series import compare_series, group_trials
from tests.run.fakes import FakeExecutor, Quiet

QUIET, LOUD = 0.001, 0.05
"""Standard deviations of the log ratios; with 5 replicates they give intervals of ± 0.1 to 0.2 % and of ± 6 to 10 %."""
SWEEP = (("", "plain", "variant"), ("", "nf4", "variant"), ("", "plain", "control"))
AB = (("base", "plain", "variant"), ("base", "plain", "control"), ("candidate", "plain", "variant"),
      ("base", "nf4", "variant"), ("candidate", "nf4", "variant"))  # fmt: skip


def records(replicates, arms=SWEEP, *, loud=None, ratio=1.0, phases=("train",), failed=()):
    """Return trials with little scatter, except those of `loud` = (side, name, role, phase).

    `ratio` is that of everything but the bases of comparisons; `failed` are (side, name, role, replicate).
    """
    found = []
    for replicate in range(replicates):
        for side, name, role in arms:
            first = role == "variant" and (side == "base" or (not side and name == "plain"))
            samples = {}
            for phase in phases:
                scatter = LOUD if loud == (side, name, role, phase) else 0.0 if first else QUIET
                log_ratio = scatter * (-1) ** replicate + (0.0 if first else math.log(ratio))
                samples[PRIMARY[phase]] = (0.1 * math.exp(log_ratio),)
            status = "oom" if (side, name, role, replicate) in failed else "ok"
            found.append(TrialRecord(
                trial=f"r{replicate}-{side}{name}-{role}", status=status, name=name, variant=name, role=role, seed=0,
                side=side, replicate=replicate, position=len(found), interleaving="lockstep", started_unix_s=0.0,
                wall_time_s=1.0, samples=samples,
            ))  # fmt: skip
    return found


@pytest.fixture
def rule(small_study):
    """A function that returns the stopping rule of a plan with these limits."""

    def make(*, phases=("train",), **limits):
        protocol = dataclasses.replace(small_study.protocol, replicates=40, **limits)
        plan = make_plan(dataclasses.replace(small_study, protocol=protocol), phases=phases)
        return lambda records: find_stop(plan, Budget(), records, {})

    return make


@pytest.mark.parametrize("arms", [SWEEP, AB], ids=["sweep", "ab"])
def test_precision_stops_from_the_fifth_replicate_on(rule, arms):
    """Fewer replicates may agree by chance; the reason gives the reached and the requested precision."""
    stop = rule(precision=0.01)
    reasons = [stop(records(count, arms)) for count in range(1, 9)]
    assert reasons[:4] == [None] * 4
    assert all(reasons[4:])
    assert "after 5 replicates" in reasons[4]
    assert "±1 % were requested" in reasons[4]


@pytest.mark.parametrize(
    ("arms", "loud"),
    [
        *((SWEEP, (*arm, phase)) for arm in SWEEP[1:] for phase in ("train", "generate")),
        *((AB, (*arm, phase)) for arm in (AB[1], AB[2], AB[4]) for phase in ("train", "generate")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value[0], str) else "ab" if value is AB else "sweep",
)
def test_one_wide_interval_keeps_a_run_going(rule, arms, loud):
    """The wide interval may be that of a variant, of either side or of the control, in any measured phase."""
    phases = ("train", "generate")
    stop = rule(precision=0.01, phases=phases)
    assert stop(records(8, arms, phases=phases)) is not None
    assert stop(records(8, arms, phases=phases, loud=loud)) is None


@pytest.mark.parametrize("arms", [SWEEP, AB], ids=["sweep", "ab"])
def test_significance_stops_nothing(rule, arms):
    """A clear but imprecise slow-down by three does not stop the run; a precise ratio stops it, whether equal or
    not."""
    side, name, role = arms[1]
    taken = records(8, arms, ratio=3.0, loud=(side, name, role, "train"))
    others = group_trials(taken, side)
    assert compare_series(others["plain", "variant"], others[name, role], "step_time_s").verdict == "regressed"
    stop = rule(precision=0.01)
    assert stop(taken) is None
    assert stop(records(8, arms, ratio=3.0)) == stop(records(8, arms, ratio=1.0)) is not None


def test_failed_trials_are_not_replicates(rule):
    """Five replicates with one failed trial give four pairs."""
    stop = rule(precision=0.01)
    assert stop(records(5, failed=[("", "nf4", "variant", 3)])) is None
    assert stop(records(6, failed=[("", "nf4", "variant", 3)])) is not None


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(small_study, machine, tmp_path, monkeypatch):
    """A function that measures the small study with the fake executor and reads the run back."""
    monkeypatch.setattr(lorameter.run.workers.local, "LocalExecutor", FakeExecutor)
    monkeypatch.setattr("lorameter.machine.provenance.probe_machine", lambda environment=None: machine)

    def run(display=None, resume=None, **changes):
        protocol = dataclasses.replace(small_study.protocol, **changes)
        plan = make_plan(dataclasses.replace(small_study, protocol=protocol), phases=("train",))
        return measure(plan, runs=tmp_path / "runs", display=display or Quiet(), resume=resume)

    return run


def test_a_run_that_stopped_early_is_complete_and_has_the_reason(measured, tmp_path):
    """The manifest has the reason and the measured trials; the run counts like any other."""
    run = measured(replicates=9, precision=0.01)
    assert run.manifest.status == "complete"
    assert "after 5 replicates" in run.manifest.stopped
    assert {record.replicate for record in run.records} == set(range(5))
    assert run.manifest.order == tuple(record.trial for record in run.records)
    assert len(run.records) == 5 * 3
    assert comparison_input(run).broken is None
    assert store.read_run(run.manifest.run, tmp_path / "runs").manifest == run.manifest


def test_a_run_ends_at_the_first_look_that_decides(measured):
    """Every step takes the same time, so three replicates decide; the reason says which look it was."""
    out = io.StringIO()
    run = measured(display=LiveDisplay(Console(file=out, width=200)), replicates=12, until_decided=True)
    assert run.manifest.status == "complete"
    assert run.manifest.stopped == "decided at look 1 of 7, after 3 of 12 replicates"
    assert {record.replicate for record in run.records} == {0, 1, 2}
    lines = out.getvalue().splitlines()
    assert [line for line in lines if line.startswith("replicate 3: nf4 1.000 [1.000, 1.000] equivalent")], lines
    (row,) = (row for row in make_run_view(run).tables[0].ratios.values())
    assert row.verdict == "equivalent"
    assert "98.57 % interval" in row.reason or "97.14 % interval" in row.reason  # the level of a look


def test_an_undecided_run_goes_to_its_end(measured, monkeypatch):
    """With scattered times no look decides, and nothing is said to have been stopped."""
    times = itertools.cycle((0.1, 0.13, 0.08, 0.11, 0.09))

    def ask(self, command, trial, timeout_s, **arguments):
        samples = {"step_time_s": tuple(itertools.islice(times, arguments["steps"]))} if command == "turn" else {}
        return PartialRecord(samples=samples)

    monkeypatch.setattr(FakeExecutor, "ask", ask)
    run = measured(replicates=4, until_decided=True)
    assert run.manifest.stopped is None
    assert {record.replicate for record in run.records} == set(range(4))


def test_a_run_interrupted_at_a_look_ends_there_when_resumed(measured, tmp_path):
    """It is judged before anything else is measured, as without the interruption."""

    class Interrupting(Quiet):
        replicates = 0

        def judged(self, comparisons):
            self.replicates += 1
            if self.replicates == 3:
                raise KeyboardInterrupt

    run = measured(display=Interrupting(), replicates=12, until_decided=True)
    assert (run.manifest.status, run.manifest.stopped) == ("interrupted", None)
    resumed = measured(resume=run, replicates=12, until_decided=True)
    assert (resumed.manifest.status, resumed.manifest.stopped[:21]) == ("complete", "decided at look 1 of ")
    assert {record.replicate for record in resumed.records} == {0, 1, 2}


@pytest.mark.parametrize("other", [{"precision": 0.01}, {"mixed": True}])
def test_two_rules_to_stop_are_refused(small_study, other):
    """The message names both."""
    with pytest.raises(UsageError, match=r"until_decided = true: .* Remove one of the two"):
        dataclasses.replace(small_study.protocol, until_decided=True, **other)
