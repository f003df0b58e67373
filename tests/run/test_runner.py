"""Tests of the parent's loop with a fake executor: exact numbers, no clock, no process."""

from __future__ import annotations

import dataclasses
import os
import signal

import msgspec
import pytest

from lorameter.records.record import Failure, PartialRecord
from lorameter.records.trials import find_fault
from lorameter.run.budget import Budget
from lorameter.run.interrupts import handle_interrupts
from lorameter.run.plan import Group, make_plan
from lorameter.run.prepare import RunContext, begin_record
from lorameter.run.runner import run_plan
from lorameter.run.workers import TrialFiles, WorkerLostError
from lorameter.studies.request import TrialRequest
from tests.run.fakes import Quiet

TRAINING = ["prepare", "build", "verify", "warm_up", "turn", "turn", "finish_training", "save_adapter"]
SERVING = ["begin_generate", "request", "request", "end_generate", "merge", "request", "request"]
COMMANDS = [*TRAINING, *SERVING]


class FakeWorker:
    """A worker whose script maps (trial, command) to a fragment or an exception."""

    start_latency_s = 0.01

    def __init__(self, executor):
        self.executor = executor
        self.closed = False

    def cpus(self):
        return ()

    def ask(self, command, trial, timeout_s, **arguments):
        self.executor.asked.append((trial, command))
        self.executor.now += self.executor.command_s
        answer = self.executor.script.get((trial, command), PartialRecord())
        if isinstance(answer, BaseException):
            raise answer
        if command == "cold":
            return msgspec.structs.replace(answer, values={"cold_after_import_time_s": 1.0})
        if command == "turn" and answer == PartialRecord():
            return PartialRecord(samples={"step_time_s": (0.5,) * arguments["steps"]})
        return answer

    def close(self):
        self.closed = True


class FakeExecutor:
    """Launches fake workers; records all commands in order and the trials that have a folder."""

    def __init__(self, script=None, command_s=0.0):
        self.script = script or {}
        self.command_s = command_s
        self.now = 0.0
        self.asked = []
        self.workers = []
        self.places = {}

    def make_place(self, trial, log):
        self.places[trial] = TrialFiles(scratch=f"/there/{trial}", log_path=f"/there/logs/{log}.log")
        return self.places[trial]

    def clear_place(self, trial):
        self.places.pop(trial, None)

    def launch(self):
        self.workers.append(FakeWorker(self))
        return self.workers[-1]

    def start_interpreter(self, log_path, timeout_s, request: TrialRequest | None = None):
        if request is None:
            return PartialRecord(values={"cold_import_time_s": 1.0})
        tokens = self.script.get((request.trial, "cold"), PartialRecord()).tokens
        return PartialRecord(values={"cold_start_time_s": 1.0}, tokens=tokens)


@pytest.fixture
def small_study(small_study):
    """The small study with disturbances making a trial invalid, as in a user's study; they are injected."""
    protocol = dataclasses.replace(small_study.protocol, allow_disturbed=False)
    return dataclasses.replace(small_study, protocol=protocol)


def conduct(plan, script=None):
    executor, saved = FakeExecutor(script), []
    records = run_plan(plan, {"": executor}, SITE, save=saved.append, display=Quiet()).records
    assert [record.trial for record in saved] == [record.trial for record in records]
    return executor, {record.trial: record for record in records}


SITE = RunContext(device="cpu")


def lost(status="crashed"):
    return WorkerLostError(status, Failure(phase="x", kind="ProcessDied", message="it died"))


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_a_lost_worker_is_a_row_and_the_sweep_continues(small_study, command):
    """In any phase, its trial keeps the earlier results, and the other trials are measured."""
    plan = make_plan(small_study)
    victim = plan.slots[1].trial
    _, records = conduct(plan, {(victim, command): lost("timeout")})
    assert records[victim].status == "timeout"
    assert records[victim].failure.message == "it died"
    assert {record.status for trial, record in records.items() if trial != victim} == {"ok"}


def test_the_death_of_a_shared_process_is_a_row_for_each_of_its_trials(small_study):
    """Both trials of the process are crashed, with their earlier results."""
    plan = make_plan(small_study)
    slots = plan.slots[:2]
    group = Group(replicate=0, launches=(slots,), rounds={"turns": ((slots[0].trial, slots[1].trial),) * 2})
    shared = dataclasses.replace(plan, groups=(group,))
    executor, records = conduct(shared, {(slots[1].trial, "turn"): lost()})
    assert [records[slot.trial].status for slot in slots] == ["crashed", "crashed"]
    assert records[slots[0].trial].samples["step_time_s"] == (0.5, 0.5)
    assert len(executor.workers) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_while_a_group_is_saved_loses_none_of_it(small_study, number):
    """A signal at any record of a group lets the whole group be saved, and the next group does not start."""
    plan = make_plan(small_study, interleaving="lockstep", phases=("train",))
    together = [slot.trial for slot in plan.groups[0].slots]
    for sent_at in together:
        executor, saved = FakeExecutor(), []

        def save(record, sent_at=sent_at, saved=saved):
            if record.trial == sent_at:
                os.kill(os.getpid(), number)
            saved.append(record)

        with handle_interrupts() as stops:
            measured = run_plan(plan, {"": executor}, SITE, save=save, display=Quiet(), stops=stops)
        assert measured.interrupted
        assert [record.trial for record in saved if record.status == "ok"] == together
        assert {record.status for record in saved[len(together) :]} == {"not_run"}
        assert {trial for trial, _ in executor.asked} == set(together)


def test_a_differing_cold_answer_is_invalid(small_study):
    """The same adapter and prompt must give the same tokens; otherwise the loaded adapter is not the trained one."""
    plan = make_plan(small_study)
    victim, other = plan.slots[0].trial, plan.slots[1].trial
    script = {
        (victim, "begin_generate"): PartialRecord(tokens={"completion": [1, 2]}),
        (victim, "cold"): PartialRecord(tokens={"cold_completion": [1, 3]}),
        (other, "begin_generate"): PartialRecord(tokens={"completion": [1, 2]}),
        (other, "cold"): PartialRecord(tokens={"cold_completion": [1, 2]}),
    }
    _, records = conduct(plan, script)
    assert (records[victim].status, records[victim].failure.kind) == ("invalid", "OtherCompletion")
    assert records[other].status == "ok"


def test_an_unreadable_record_makes_its_trial_invalid(small_study):
    """An unreadable record makes its trial invalid by name; saved as it is, it would make the whole run unreadable."""
    plan = make_plan(small_study)
    victim = plan.slots[1].trial
    fragment = PartialRecord(values={"held_out_loss": float("nan")})
    _, records = conduct(plan, {(victim, "finish_training"): fragment})
    assert (records[victim].status, records[victim].failure.kind) == ("invalid", "Unreadable")
    assert victim in records[victim].failure.message
    assert records[victim].samples["step_time_s"] == (0.5,) * 4
    assert {record.status for trial, record in records.items() if trial != victim} == {"ok"}
    assert find_fault(records[victim]) is None


def test_a_defect_of_the_parent_costs_no_record(small_study):
    """After an unexpected exception, measured trials are saved, the others are not_run, and the exception is raised."""
    plan = make_plan(small_study)
    executor, saved = FakeExecutor({(plan.slots[1].trial, "turn"): ZeroDivisionError("oops")}), []
    with pytest.raises(ZeroDivisionError):
        run_plan(plan, {"": executor}, SITE, save=saved.append, display=Quiet())
    assert [record.status for record in saved] == ["ok", "interrupted", *["not_run"] * (len(plan.slots) - 2)]
    assert "oops" in saved[1].failure.message


# --- long groups and resumed runs ----------------------------------------------------------------------------------


def go_on(plan, earlier=(), *, script=None, command_s=0.0):
    """Run the plan in simulated time; return the executor, the records, and each saved record with the commands before
    it."""
    executor, saved = FakeExecutor(script, command_s), []
    measured = run_plan(
        plan, {"": executor}, SITE, display=Quiet(), budget=Budget(clock=lambda: executor.now),
        save=lambda record: saved.append((record, list(executor.asked))), earlier=earlier,
    )  # fmt: skip
    return executor, measured.records, saved


@pytest.mark.parametrize("level", ["shared-base", "lockstep"])
def test_a_long_group_is_saved_while_it_is_under_way(small_study, level):
    """Saved records have all samples so far with the status `interrupted`, never within a round; the final record
    replaces them."""
    check = {"path": "base.bits", "required": 4, "observed": 4, "status": "active", "reason": "seen"}
    plan = make_plan(small_study, interleaving=level, phases=("train", "generate"))
    script = {(slot.trial, "verify"): PartialRecord(checks=(check,)) for slot in plan.slots}
    _, records, saved = go_on(plan, script=script, command_s=20.0)
    under_way = [(record, asked) for record, asked in saved if record.failure]
    assert {(record.status, record.failure.kind) for record, _ in under_way} == {("interrupted", "UnderWay")}
    for record, asked in under_way:
        group = next(group for group in plan.groups if record.trial in {slot.trial for slot in group.slots})
        assert len({asked.count((slot.trial, "turn")) for slot in group.slots}) == 1
        assert len(record.samples.get("step_time_s", ())) == 2 * asked.count((record.trial, "turn"))
        assert record.checks == ()
    phases = {record.failure.phase for record, _ in under_way}
    assert {"warm_up", "turn", "finish_training", "request"} <= phases
    last = {record.trial: record for record, _ in saved}
    assert tuple(last.values()) == records
    assert {record.status for record in records} == {"ok"}
    assert all(record.checks for record in records)
    starts = {(record.trial, record.started_unix_s) for record, _ in saved}
    assert len(starts) == len(records)  # one start for each trial, however often it was saved


@pytest.mark.parametrize("level", ["shared-base", "lockstep", "replicates"])
def test_a_run_killed_at_any_point_is_resumed(small_study, level):
    """For any saved prefix, complete groups are kept, the other groups are measured as a whole, and all trials are
    ok."""
    plan = make_plan(small_study, interleaving=level)
    _, whole, saved = go_on(plan, command_s=20.0)
    written = [record for record, _ in saved]
    for killed in range(len(written) + 1):
        earlier = {record.trial: record for record in written[:killed]}
        executor, records, again = go_on(plan, tuple(earlier.values()))
        assert {record.trial for record in records} == {record.trial for record in whole}
        assert {record.status for record in records} == {"ok"}
        asked = {trial for trial, _ in executor.asked}
        for group in plan.groups:
            kept = all(slot.trial in earlier and earlier[slot.trial].settled for slot in group.slots)
            assert asked.isdisjoint(slot.trial for slot in group.slots) is kept
        assert {record.trial for record, _ in again} == asked


def test_trials_that_failed_are_not_measured_again(small_study):
    """An OOM is a result; an interrupted or skipped trial is not."""
    plan = make_plan(small_study)
    first, second, *others = plan.slots
    earlier = [
        begin_record(first, "oom"),
        begin_record(second, "interrupted"),
        *(begin_record(slot, "not_run") for slot in others),
    ]
    executor, records, _ = go_on(plan, earlier)
    assert first.trial not in {trial for trial, _ in executor.asked}
    assert {record.trial: record.status for record in records} == {
        slot.trial: "oom" if slot is first else "ok" for slot in plan.slots
    }


# --- disturbed trials -------------------------------------------------------------------------------------------------

THROTTLED = {"device_samples_train": 10.0, "device_throttled_samples_train": 9.0}


class Recovering(FakeExecutor):
    """An executor with trials that are disturbed in their first measurements."""

    def __init__(self, disturbed):
        super().__init__()
        self.left = dict(disturbed)

    def launch(self):
        worker = super().launch()
        ask = worker.ask

        def asked(command, trial, timeout_s, **arguments):
            fragment = ask(command, trial, timeout_s, **arguments)
            if command == "finish_training" and self.left.get(trial, 0) > 0:
                self.left[trial] -= 1
                return msgspec.structs.replace(fragment, values=THROTTLED)
            return fragment

        worker.ask = asked
        return worker


def retried(plan, disturbed, *, earlier=()):
    """Run on a throttled GPU; return the executor, the result and all saved records."""
    executor, saved, listener = Recovering(disturbed), [], Quiet()
    measured = run_plan(
        plan, {"": executor}, SITE, display=listener, save=saved.append, earlier=earlier,
        budget=Budget(clock=lambda: executor.now),
    )  # fmt: skip
    return executor, measured, saved


def builds(executor, trial):
    return executor.asked.count((trial, "build"))


@pytest.mark.parametrize("level", ["shared-base", "lockstep", "replicates"])
def test_a_disturbed_trial_is_measured_again_with_those_it_took_turns_with(small_study, level):
    """Its group is repeated once at the end of its replicate; all records stay on disk, and the last ones count."""
    plan = make_plan(small_study, interleaving=level)
    victim = plan.groups[0].slots[0].trial
    executor, measured, saved = retried(plan, {victim: 1})
    together = {slot.trial for slot in plan.groups[0].slots}
    assert {slot.trial: builds(executor, slot.trial) for slot in plan.slots} == {
        slot.trial: 1 + (slot.trial in together) for slot in plan.slots
    }
    assert {record.status for record in measured.records} == {"ok"}
    assert {record.trial: record.attempt for record in measured.records} == {
        slot.trial: int(slot.trial in together) for slot in plan.slots
    }
    first = next(record for record in saved if record.trial == victim)
    assert (first.status, first.disturbed, first.attempt) == ("invalid", True, 0)
    order = list(dict.fromkeys((record.replicate, record.attempt) for record in saved))
    assert order == [(0, 0), (0, 1), (1, 0)]
    assert [record.trial for record in measured.records] == [slot.trial for slot in plan.slots]


def test_a_trial_that_stays_disturbed_is_invalid_after_the_last_try(small_study):
    """Two retries are made; the other trials of the run count."""
    plan = make_plan(small_study)
    victim = plan.slots[0].trial
    executor, measured, saved = retried(plan, {victim: 9})
    assert builds(executor, victim) == 1 + small_study.protocol.retries == 3
    statuses = {record.trial: record.status for record in measured.records}
    assert statuses.pop(victim) == "invalid"
    assert set(statuses.values()) == {"ok"}
    assert [record.attempt for record in saved if record.trial == victim] == [0, 1, 2]
