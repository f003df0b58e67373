"""Tests of the time limit: runs in simulated time keep it."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from lorameter.errors import UsageError
from lorameter.measurements.metrics import PHASES
from lorameter.records.record import PartialRecord
from lorameter.run.budget import MIN_ROUNDS, Budget, skipped_notice
from lorameter.run.plan import make_plan
from lorameter.run.prepare import RunContext
from lorameter.run.runner import run_plan
from lorameter.run.workers import TrialFiles
from tests.run.fakes import Quiet

COSTS = {
    "build": 5.0, "verify": 5.0, "warm_up": 10.0, "turn": 10.0, "train": 10.0, "finish_training": 3.0, "request": 4.0,
    "begin_generate": 4.0, "cold": 4.0, "imports": 4.0,
}  # fmt: skip
"""Costs in seconds; of a turn and of untimed training for two steps, and of a warm-up of unknown length."""
TURNS, REQUESTS = 8, 6


def test_the_notice_names_skipped_parts_and_the_minutes_they_need():
    """There is no notice if nothing was skipped and three replicates fitted."""
    assert skipped_notice((), 3, 12, 0.0) == ()
    (notice,) = skipped_notice({"cold", "merged"}, 4, 12, 1150.0)
    assert notice.code == "measurements-skipped"
    assert "skipped merged requests, cold starts (3 replicates with them take about 20 min)" in (notice.message)
    assert "--max-minutes to 20" in notice.remedy
    (notice,) = skipped_notice({"cold"}, 1, 12, 1150.0, 700.0)
    assert notice.message.endswith("; 1 replicate of training (3 replicates take about 12 min).")
    assert "--max-minutes to 12" in notice.remedy


class SimulatedExecutor:
    """Executor and worker in one; every command takes its cost in simulated time."""

    start_latency_s = 0.01

    def __init__(self, costs):
        self.costs = COSTS | costs
        self.now = 0.0
        self.commands = []
        self.steps = {}

    def clock(self):
        return self.now

    def make_place(self, trial, log):
        return TrialFiles(scratch=trial, log_path=log)

    def clear_place(self, trial):
        pass

    def launch(self):
        return self

    def ask(self, command, trial, timeout_s, **arguments):
        seconds = self.costs.get(command, 0.0)
        if command in ("turn", "train"):
            seconds *= arguments["steps"] / 2
        if command == "warm_up" and "steps" in arguments:
            seconds = self.costs["turn"] / 2 * arguments["steps"]
        self.now += seconds
        self.commands.append((trial, command))
        if command == "finish_training" and "isolated" not in trial:
            self.steps[trial] = arguments.get("steps")
        if command == "cold":
            return PartialRecord(values={"cold_after_import_time_s": self.costs["cold"]})
        if command == "build":
            return PartialRecord(values={"build_step_time_s": self.costs["turn"] / 2})
        if command == "verify":
            return PartialRecord(values={"verify_time_s": self.costs["verify"]})
        if command == "warm_up":
            times = (self.costs["turn"] / 2,) * arguments.get("steps", 2)
            return PartialRecord(samples={"warmup_step_time_s": times})
        if command == "turn":
            steps = arguments["steps"]
            return PartialRecord(samples={"step_time_s": (0.1,) * steps, "step_cpu_time_s": (0.1,) * steps})
        return PartialRecord(samples={"request_time_s": (0.2,)}) if command == "request" else PartialRecord()

    def start_interpreter(self, log_path, timeout_s, request=None):
        import_s = self.costs["imports"]
        whole_s = import_s + (0.0 if request is None else self.costs["cold"])
        self.now += whole_s
        return PartialRecord(values={"cold_import_time_s": import_s, "cold_start_time_s": whole_s})

    def close(self):
        pass


@pytest.fixture
def measured(small_study):
    """A function that measures the small study in simulated time and returns the executor and the result."""

    def measure(limit_s, *, level="lockstep", costs=None, replicates=12, phases=PHASES, **protocol):
        changed = dataclasses.replace(
            small_study.protocol, turns=TURNS, generate_requests=REQUESTS, replicates=replicates,
            max_minutes=None if limit_s is None else limit_s / 60, **protocol,
        )  # fmt: skip
        plan = make_plan(dataclasses.replace(small_study, protocol=changed), interleaving=level, phases=phases)
        executor = measure.executor = SimulatedExecutor(costs or {})
        budget = Budget(limit_s, clock=executor.clock, replicates=replicates)
        budget.import_s, budget.load_s = executor.costs["imports"], executor.costs["cold"]
        site = RunContext(device="cpu")
        found = run_plan(plan, {"": executor}, site, save=lambda record: None, display=Quiet(), budget=budget)
        assert {record.status for record in found.records} == {"ok"}
        executor.budget = budget
        return executor, found

    return measure


def rounds(executor, command):
    """Return how often the trials that take turns got the command: by replicate, the set over its trials."""
    counts = Counter(trial for trial, name in executor.commands if name == command and "isolated" not in trial)
    found = {}
    for trial, count in counts.items():
        found.setdefault(int(trial[1 : trial.index("-")]), set()).add(count)
    return found


def replicates_of(found):
    """Return the number of replicates with a record."""
    return len({record.replicate for record in found.records})


def measuring(found, name):
    """Return the replicates with this kind of sample."""
    return {record.replicate for record in found.records if name in record.samples}


def test_without_a_limit_everything_is_measured(measured):
    """All trials have all rounds, and every training goes to its planned end."""
    executor, _ = measured(None, replicates=2, cold_replicates=2)
    assert rounds(executor, "turn") == {0: {TURNS}, 1: {TURNS}}
    assert set(executor.steps.values()) == {None}
    assert not executor.budget.skipped


@pytest.mark.parametrize("level", ["lockstep", "replicates"])
@pytest.mark.parametrize("limit_s", [420.0, 600.0, 900.0, 2000.0])
def test_at_least_three_replicates_and_the_limit_is_kept(measured, limit_s, level):
    """All trials of a replicate have the same rounds, and every measured part is measured in every replicate."""
    executor, found = measured(limit_s, level=level)
    count = replicates_of(found)
    assert count >= 3
    assert executor.now <= 1.1 * limit_s
    turns = rounds(executor, "turn")
    assert turns[0] == {MIN_ROUNDS}
    assert all(len(one) == 1 and MIN_ROUNDS <= min(one) <= TURNS for one in turns.values())
    for part, name in (
        ("cold", "cold_start_time_s"), ("requests", "request_time_s"), ("training", "step_time_s"),
    ):  # fmt: skip
        assert measuring(found, name) == (set() if part in executor.budget.skipped else set(range(count)))
    skipped = [part for part in ("cold", "merged", "requests") if part in executor.budget.skipped]
    assert skipped == ["cold", "merged", "requests"][: len(skipped)]
    assert (executor.budget.needed_s > limit_s) == bool(skipped)


def test_ample_time_raises_the_rounds(measured):
    """After the first replicate, whose cost was unknown, replicates have all planned rounds, and nothing is skipped."""
    executor, found = measured(5000.0, replicates=4)
    assert rounds(executor, "turn") == {0: {MIN_ROUNDS}, 1: {TURNS}, 2: {TURNS}, 3: {TURNS}}
    assert not executor.budget.skipped
    assert found.stopped is None


def test_turns_are_shortened_to_fit_three_replicates(measured):
    """After the first replicate each turn takes one step, if three replicates of training with two do not fit."""
    executor, found = measured(330.0)
    lengths = [{record.turn_lengths[:1] for record in found.records if record.replicate == one} for one in range(3)]
    assert lengths == [{(2,)}, {(1,)}, {(1,)}]
    assert not executor.budget.training_s
    assert executor.now <= 1.1 * 330.0


def test_too_little_time_is_reported_and_training_is_still_measured(measured):
    """Two replicates of training fit: nothing else is measured, and the time for three is reported."""
    executor, found = measured(250.0)
    assert replicates_of(found) == 2
    assert executor.budget.skipped >= {"requests", "cold"}
    assert executor.budget.needed_s > executor.budget.training_s > 250.0
    assert executor.now <= 1.1 * 250.0


def test_a_limit_too_short_for_one_replicate_is_refused(measured):
    """After the first step of the first trial, before another one is built, the error gives the needed minutes in one
    sentence."""
    with pytest.raises(
        UsageError, match=r"max_minutes = 0\.5: .* takes about 1 min .* not even one fits\. Give 2 minutes"
    ):
        measured(30.0)
    assert [command for _, command in measured.executor.commands if command == "build"] == ["build"]


def test_a_replicate_that_turns_out_slower_ends_the_run(measured, monkeypatch):
    """No replicate starts if the longest one so far would exceed the limit."""
    original_ask = SimulatedExecutor.ask

    def slowing(self, command, trial, timeout_s, **arguments):
        answer = original_ask(self, command, trial, timeout_s, **arguments)
        self.now += 30.0 if command == "turn" and trial.startswith("r1") else 0.0
        return answer

    _, found = measured(1000.0, phases=("train",))
    quick = replicates_of(found)
    monkeypatch.setattr(SimulatedExecutor, "ask", slowing)
    _, found = measured(1000.0, phases=("train",))
    assert replicates_of(found) < quick
    assert "another replicate would end after the limit" in found.stopped
