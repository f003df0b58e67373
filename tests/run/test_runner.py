"""The parent's loop, with a fake executor at the one seam: exact numbers, no clock, no process."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest

from harness.records.evidence import EvidenceFile
from harness.records.record import Failure, Fragment
from harness.records.trial_lines import TrialLines, line_of
from harness.run.budget import Budget
from harness.run.executors import Place, WorkerLostError
from harness.run.plan import Group, make_plan
from harness.run.runner import run_plan
from harness.run.site import Site, begin_record
from harness.run.stops import Stops
from harness.studies.request import TrialRequest

TRAINING = ["prepare", "build", "verify", "warm_up", "turn", "turn", "finish_training", "save_adapter"]
SERVING = ["begin_generate", "request", "request", "end_generate", "merge", "request", "request"]
COMMANDS = [*TRAINING, *SERVING]


class FakeWorker:
    """Answers from a script: (trial, command) to a Fragment or an exception."""

    start_latency_s = 0.01

    def __init__(self, executor):
        self.executor = executor
        self.closed = False

    def ask(self, command, trial, timeout_s, **arguments):
        self.executor.asked.append((trial, command))
        self.executor.now += self.executor.command_s
        answer = self.executor.script.get((trial, command), Fragment())
        if isinstance(answer, BaseException):
            raise answer
        if command == "turn" and answer == Fragment():
            return Fragment(samples={"step_time_s": (0.5,) * arguments["steps"]})
        return answer

    def close(self):
        self.closed = True


class FakeExecutor:
    """Launches fake workers; remembers what was asked in which order, and which trials have a folder."""

    def __init__(self, script=None, command_s=0.0):
        self.script = script or {}
        self.command_s = command_s
        self.now = 0.0
        self.asked = []
        self.workers = []
        self.places = {}

    def make_place(self, trial, log):
        self.places[trial] = Place(scratch=f"/there/{trial}", log_path=f"/there/logs/{log}.log")
        return self.places[trial]

    def clear_place(self, trial):
        self.places.pop(trial, None)

    def launch(self):
        self.workers.append(FakeWorker(self))
        return self.workers[-1]

    def cold_start(self, request: TrialRequest):
        self.asked.append((request.trial, "cold"))
        answer = self.script.get((request.trial, "cold"), Fragment(values={"cold_start_time_s": 1.0}))
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Quiet:
    """A watcher that notes the order of events."""

    def __init__(self):
        self.ended = []

    def trial_phase(self, slot, phase):
        pass

    def trial_ended(self, record):
        self.ended.append(record.trial)


@pytest.fixture
def small_study(small_study):
    """As a user's study: what the surroundings say against a trial counts. Here they are told, not read."""
    protocol = dataclasses.replace(small_study.protocol, allow_disturbed=False)
    return dataclasses.replace(small_study, protocol=protocol)


def conduct(plan, script=None, stop=lambda records: None):
    executor, saved = FakeExecutor(script), []
    records = run_plan(plan, {"": executor}, SITE, save=saved.append, watcher=Quiet(), stop=stop).records
    assert [record.trial for record in saved] == [record.trial for record in records]
    return executor, {record.trial: record for record in records}


SITE = Site(device="cpu", threads=1, tokens_path="t", tokens={"hash": "h"})


def lost(status="crashed"):
    return WorkerLostError(status, Failure(phase="x", kind="ProcessDied", message="it died"))


def test_every_trial_runs_its_phases_in_order(small_study):
    """One process a trial, all commands in the order of the design, closed before the cold start."""
    plan = make_plan(small_study)
    executor, records = conduct(plan)
    expected = [(slot.trial, command) for slot in plan.slots for command in [*COMMANDS, "cold"]]
    assert executor.asked == expected
    assert all(worker.closed for worker in executor.workers)
    assert {record.status for record in records.values()} == {"ok"}
    first = records[plan.slots[0].trial]
    assert first.samples["step_time_s"] == (0.5,) * 4
    assert first.turn_lengths == (2, 2)
    assert first.values["cold_start_time_s"] == 1.0
    assert first.tokens["hash"] == "h"


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_a_lost_worker_is_a_row_and_the_sweep_goes_on(small_study, command):
    """Whatever phase it dies in, its trial keeps what was measured and the others are measured."""
    plan = make_plan(small_study)
    victim = plan.slots[1].trial
    _, records = conduct(plan, {(victim, command): lost("timeout")})
    assert records[victim].status == "timeout"
    assert records[victim].failure.message == "it died"
    assert {record.status for trial, record in records.items() if trial != victim} == {"ok"}


def test_what_was_measured_before_a_death_is_kept(small_study):
    """The samples of the turns before it stay in the record."""
    plan = make_plan(small_study)
    victim = plan.slots[0].trial
    _, records = conduct(plan, {(victim, "begin_generate"): lost()})
    assert records[victim].samples["step_time_s"] == (0.5,) * 4
    assert records[victim].status == "crashed"


def test_a_failed_command_ends_the_trial_and_not_the_process(small_study):
    """After `invalid` nothing more is asked of the trial, the cold start included."""
    plan = make_plan(small_study)
    victim = plan.slots[0].trial
    failure = Failure(phase="verify", kind="RequiredPathNotActive", message="no")
    executor, records = conduct(plan, {(victim, "verify"): Fragment().failed("invalid", failure)})
    assert [command for trial, command in executor.asked if trial == victim] == ["prepare", "build", "verify"]
    assert records[victim].status == "invalid"


def test_the_death_of_a_shared_process_is_a_row_for_each_of_its_trials(small_study):
    """Two trials in one process: both are crashed, with what each had."""
    plan = make_plan(small_study)
    slots = plan.slots[:2]
    group = Group(replicate=0, launches=(slots,), turns=((slots[0].trial, slots[1].trial),) * 2)
    shared = dataclasses.replace(plan, groups=(group,))
    executor, records = conduct(shared, {(slots[1].trial, "turn"): lost()})
    assert [records[slot.trial].status for slot in slots] == ["crashed", "crashed"]
    assert records[slots[0].trial].samples["step_time_s"] == (0.5, 0.5)
    assert len(executor.workers) == 1


def test_a_process_that_dies_while_it_is_told_of_its_trials_is_one_death(small_study):
    """Those that it had not been told of yet fail for its reason, and are not asked for."""
    plan = make_plan(small_study)
    slots = plan.slots[:2]
    group = Group(replicate=0, launches=(slots,), turns=((slots[0].trial, slots[1].trial),) * 2)
    shared = dataclasses.replace(plan, groups=(group,))
    executor, records = conduct(shared, {(slots[0].trial, "prepare"): lost("timeout")})
    assert [records[slot.trial].status for slot in slots] == ["timeout", "timeout"]
    assert records[slots[0].trial].failure == records[slots[1].trial].failure
    assert executor.asked == [(slots[0].trial, "prepare")]


def test_trials_that_are_live_together_take_turns(small_study):
    """Two processes in one group alternate in the order that the plan gives."""
    plan = make_plan(small_study)
    a, b = plan.slots[:2]
    turns = ((a.trial, b.trial), (b.trial, a.trial))
    together = dataclasses.replace(plan, groups=(Group(replicate=0, launches=((a,), (b,)), turns=turns),))
    executor, _ = conduct(together)
    assert [trial for trial, command in executor.asked if command == "turn"] == [a.trial, b.trial, b.trial, a.trial]


def test_none_of_a_group_takes_a_step_before_all_stand_there(small_study):
    """Each of several processes is built before the first of them is let go, and warm before the first timed turn."""
    plan = make_plan(small_study)
    slots = plan.slots[:3]
    turns = (tuple(slot.trial for slot in slots),) * 2
    together = dataclasses.replace(
        plan, groups=(Group(replicate=0, launches=tuple((slot,) for slot in slots), turns=turns),)
    )
    executor, _ = conduct(together)
    asked = [command for _, command in executor.asked]
    for before, after in (("build", "verify"), ("verify", "warm_up"), ("warm_up", "turn")):
        assert asked.count(before) == len(slots)
        assert max(place for place, word in enumerate(asked) if word == before) < asked.index(after)


def test_an_interrupt_is_recorded_for_every_trial(small_study):
    """The one under way is `interrupted`, those to come are `not_run`, and nothing is lost."""
    plan = make_plan(small_study)
    _, records = conduct(plan, {(plan.slots[1].trial, "turn"): KeyboardInterrupt()})
    assert records[plan.slots[0].trial].status == "ok"
    assert records[plan.slots[1].trial].status == "interrupted"
    assert {records[slot.trial].status for slot in plan.slots[2:]} == {"not_run"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_while_a_group_is_saved_loses_none_of_it(small_study, number):
    """Sent by the process to itself at each record of a group in turn: all of the group is saved as it was measured,
    and the next one does not begin."""
    plan = make_plan(small_study, interleaving="lockstep", phases=("train",))
    together = [slot.trial for slot in plan.groups[0].slots]
    for sent_at in together:
        executor, saved = FakeExecutor(), []

        def save(record, sent_at=sent_at, saved=saved):
            if record.trial == sent_at:
                os.kill(os.getpid(), number)
            saved.append(record)

        with Stops() as stops:
            measured = run_plan(plan, {"": executor}, SITE, save=save, watcher=Quiet(), stops=stops)
        assert measured.interrupted
        assert [record.trial for record in saved if record.status == "ok"] == together
        assert {record.status for record in saved[len(together) :]} == {"not_run"}
        assert {trial for trial, _ in executor.asked} == set(together)


def test_nothing_is_drawn_while_a_step_is_timed(small_study):
    """The watcher is told before a trial is asked for its turn, and hears nothing until the answer is there."""
    plan, events = make_plan(small_study, interleaving="lockstep", phases=("train",)), []

    class Noting(Quiet):
        def trial_phase(self, slot, phase):
            events.append(("told", slot.trial, phase))

        def trial_ended(self, record):
            events.append(("ended", record.trial, ""))

    class Worker(FakeWorker):
        def ask(self, command, trial, timeout_s, **arguments):
            events.append(("begins", trial, command))
            try:
                return super().ask(command, trial, timeout_s, **arguments)
            finally:
                events.append(("answers", trial, command))

    class Executor(FakeExecutor):
        def launch(self):
            return Worker(self)

    run_plan(plan, {"": Executor()}, SITE, save=lambda record: None, watcher=Noting())
    turns = [place for place, (what, _, command) in enumerate(events) if (what, command) == ("begins", "turn")]
    assert len(turns) >= len(plan.groups[0].slots) * small_study.protocol.turns
    for place in turns:
        _, trial, command = events[place]
        assert events[place - 1] == ("told", trial, command)
        assert events[place + 1] == ("answers", trial, command)


CPUS = (100_000, 100_001)
"""That no machine has, so that nobody knows how fast they are."""


@pytest.mark.parametrize(
    ("threads", "level", "ranks"), [(1, "lockstep", 1), (2, "lockstep", 1), (1, "replicates", 1), (1, "lockstep", 2)]
)
def test_those_who_take_turns_share_a_cpu_while_they_are_timed(small_study, threads, level, ranks):
    """Another one in each replicate, and only then; neither where they have several threads or ranks nor where each is
    alone."""
    together = {"ranks": ranks, "strategy": "ddp" if ranks > 1 else ""}
    study = dataclasses.replace(small_study, workload=dataclasses.replace(small_study.workload, **together))
    plan, seats, seen = make_plan(study, interleaving=level, phases=("train",)), {}, []

    class Worker(FakeWorker):
        def cpus(self):
            return CPUS

        def sit(self, cpu):
            seats[id(self)] = cpu

        def stand(self):
            del seats[id(self)]

        def ask(self, command, trial, timeout_s, **arguments):
            seen.append((trial, command, sorted(seats.values())))
            return super().ask(command, trial, timeout_s, **arguments)

    class Executor(FakeExecutor):
        def launch(self):
            self.workers.append(Worker(self))
            return self.workers[-1]

    site = dataclasses.replace(SITE, threads=threads)
    run_plan(plan, {"": Executor()}, site, save=lambda record: None, watcher=Quiet())
    assert not seats
    for trial, command, numbers in seen:
        timed = command == "turn" and (threads, level, ranks) == (1, "lockstep", 1)
        assert numbers == ([CPUS[int(trial[1])]] * 3 if timed else []), (trial, command)
    assert {trial[:2] for trial, command, _ in seen if command == "turn"} == {"r0", "r1"}


def test_a_first_ctrl_c_lets_the_turns_come_to_their_end(small_study):
    """The whole group is measured and counts, the next one does not begin, and the run says that it was stopped."""
    plan = make_plan(small_study, interleaving="lockstep", phases=("train",))
    together = [slot.trial for slot in plan.groups[0].slots]

    class Sending(Quiet):
        sent = False

        def trial_phase(self, slot, phase):
            if phase == "turn" and not self.sent:
                self.sent = True
                os.kill(os.getpid(), signal.SIGINT)

    saved = []
    with Stops(patient=True) as stops:
        measured = run_plan(
            plan, {"": FakeExecutor()}, SITE, save=saved.append, watcher=Sending(), stops=stops
        )  # fmt: skip
    assert measured.interrupted
    assert [record.trial for record in saved if record.status == "ok"] == together
    assert {record.status for record in saved[len(together) :]} == {"not_run"}


def test_another_cold_answer_is_invalid(small_study):
    """The same adapter and prompt must give the same tokens, or what was loaded is not what was trained."""
    plan = make_plan(small_study)
    victim, other = plan.slots[0].trial, plan.slots[1].trial
    script = {
        (victim, "begin_generate"): Fragment(tokens={"completion": [1, 2]}),
        (victim, "cold"): Fragment(tokens={"cold_completion": [1, 3]}),
        (other, "begin_generate"): Fragment(tokens={"completion": [1, 2]}),
        (other, "cold"): Fragment(tokens={"cold_completion": [1, 2]}),
    }
    _, records = conduct(plan, script)
    assert (records[victim].status, records[victim].failure.kind) == ("invalid", "OtherCompletion")
    assert records[other].status == "ok"


@pytest.mark.parametrize("status", ["oom", "crashed"])
def test_a_cold_start_that_failed_says_why_itself(small_study, status):
    """Without an answer there is none to compare: its own status, kind and traceback stand in the record."""
    plan = make_plan(small_study)
    victim = plan.slots[0].trial
    failure = Failure(phase="cold", kind="MemoryError", message="no more", traceback="Traceback: its own")
    script = {
        (victim, "begin_generate"): Fragment(tokens={"completion": [1, 2]}),
        (victim, "cold"): Fragment().failed(status, failure),
    }
    _, records = conduct(plan, script)
    assert (records[victim].status, records[victim].failure) == (status, failure)


@pytest.mark.parametrize(
    "fragment",
    [
        Fragment(samples={"catch_up_loss": (3e38, 3e38)}),
        Fragment(values={"held_out_loss": float("nan")}),
        Fragment(tokens={"answer_0": "words"}),
        Fragment(checks=({"path": "x"},)),
    ],
    ids=["a loss beyond all", "no number", "an answer of words", "a check of nothing"],
)
def test_what_could_not_be_read_again_is_invalid(small_study, fragment, tmp_path):
    """It costs its trial, by name; one such record would cost the whole run, as no reader takes it."""
    plan = make_plan(small_study)
    victim = plan.slots[1].trial
    _, records = conduct(plan, {(victim, "finish_training"): fragment})
    assert (records[victim].status, records[victim].failure.kind) == ("invalid", "Unreadable")
    assert victim in records[victim].failure.message
    assert records[victim].samples["step_time_s"] == (0.5,) * 4
    assert {record.status for trial, record in records.items() if trial != victim} == {"ok"}
    lines = TrialLines(EvidenceFile(tmp_path), tmp_path, "run")
    assert lines.read(line_of(records[victim], ())).failure == records[victim].failure


def test_a_failed_cold_start_keeps_the_training(small_study):
    """The last phase can fail on its own; the record says so and has the rest."""
    plan = make_plan(small_study)
    victim = plan.slots[0].trial
    _, records = conduct(plan, {(victim, "cold"): lost("timeout")})
    assert records[victim].status == "timeout"
    assert records[victim].samples["step_time_s"]


def test_a_defect_of_the_parent_costs_no_record(small_study):
    """An exception that is no lost worker: what was measured is saved, the rest is not_run, and the error is raised."""
    plan = make_plan(small_study)
    executor, saved = FakeExecutor({(plan.slots[1].trial, "turn"): ZeroDivisionError("oops")}), []
    with pytest.raises(ZeroDivisionError):
        run_plan(plan, {"": executor}, SITE, save=saved.append, watcher=Quiet())
    assert [record.status for record in saved] == ["ok", "interrupted", *["not_run"] * (len(plan.slots) - 2)]
    assert "oops" in saved[1].failure.message


def test_scratch_is_gone_when_its_trial_has_ended(small_study):
    """A long run does not fill the disk with adapters, wherever that disk is."""
    plan = make_plan(small_study)
    executor, records = conduct(plan)
    assert {record.status for record in records.values()} == {"ok"}
    assert executor.places == {}


def test_solo_trials_measure_what_needs_a_process_of_its_own(small_study):
    """At shared-base: one process for all turns, never merged or saved; then solo trials with everything else."""
    plan = make_plan(small_study, interleaving="shared-base")
    executor, records = conduct(plan)
    asked = {trial: [command for owner, command in executor.asked if owner == trial] for trial in records}
    shared, solo = asked["r0-nf4"], asked["r0-nf4-solo"]
    assert {"turn", "request", "close"} <= set(shared)
    assert not {"merge", "save_adapter", "end_generate", "cold"} & set(shared)
    assert {"merge", "request", "save_adapter", "end_generate", "cold"} <= set(solo)
    assert not {"turn", "close"} & set(solo)
    assert shared.count("request") == solo.count("request") == small_study.protocol.generate_requests
    assert len(executor.workers) == 2 * (1 + 3)  # replicates × (the shared process and three solo ones)
    assert records["r0-nf4"].interleaving == "shared-base"
    assert records["r0-nf4-solo"].interleaving == "replicates"
    assert records["r0-nf4"].log == records["r0-plain"].log != records["r0-nf4-solo"].log


def test_sides_are_measured_by_their_own_executors(small_study):
    """Each launch goes to the executor of its side, and the record says which."""
    plan = make_plan(small_study)
    a, b = (
        dataclasses.replace(slot, contender=dataclasses.replace(slot.contender, side=side), arm=side)
        for slot, side in zip(plan.slots, ("base", "candidate"), strict=False)
    )
    group = Group(replicate=0, launches=((a,), (b,)), turns=((a.trial, b.trial),))
    executors = {"base": FakeExecutor(), "candidate": FakeExecutor()}
    measured = run_plan(
        dataclasses.replace(plan, groups=(group,)), executors, SITE, save=lambda record: None, watcher=Quiet()
    )
    assert [record.side for record in measured.records] == ["base", "candidate"]
    assert {trial for trial, _ in executors["base"].asked} == {a.trial}
    assert {trial for trial, _ in executors["candidate"].asked} == {b.trial}


def test_a_reason_to_stop_ends_the_run_between_replicates(small_study):
    """The rule is asked after each complete replicate, and what it makes needless leaves no record."""
    plan = make_plan(small_study)
    seen = []

    def stop(records):
        seen.append(len(records))
        return "precise enough"

    _, records = conduct(plan, stop=stop)
    assert seen == [3]
    assert {record.replicate for record in records.values()} == {0}


def test_the_turn_phase_is_timed_as_a_whole(small_study):
    """Beside the timed steps stands what all the turns took with their switches."""
    _, records = conduct(make_plan(small_study, interleaving="lockstep"))
    walls = {record.values["turns_wall_time_s"] for record in records.values() if not record.trial.endswith("solo")}
    assert len(walls) <= 3 * 2
    assert all(wall > 0 for wall in walls)


# --- a long group, and a run that is gone on with ---------------------------------------------------------------------


def go_on(plan, earlier=(), *, script=None, command_s=0.0):
    """Conduct in simulated time; returns the executor, the records, and each saved one with what had been asked."""
    executor, saved = FakeExecutor(script, command_s), []
    measured = run_plan(
        plan, {"": executor}, SITE, watcher=Quiet(), budget=Budget(clock=lambda: executor.now),
        save=lambda record: saved.append((record, list(executor.asked))), earlier=earlier,
    )  # fmt: skip
    return executor, measured.records, saved


@pytest.mark.parametrize("level", ["shared-base", "lockstep"])
def test_a_long_group_is_saved_while_it_is_under_way(small_study, level):
    """All samples so far, as `interrupted`; never within a round; and its end is the last word on each trial."""
    check = {"path": "base.bits", "required": 4, "observed": 4, "status": "active", "reason": "seen"}
    plan = make_plan(small_study, interleaving=level, phases=("train", "generate"))
    script = {(slot.trial, "verify"): Fragment(checks=(check,)) for slot in plan.slots}
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
    assert len(starts) == len(records)  # one start a trial, however often it was saved


def test_a_short_group_is_saved_once(small_study):
    """Repeating it costs little, so no record is written before its end."""
    _, records, saved = go_on(make_plan(small_study, interleaving="lockstep"), command_s=0.1)
    assert len(saved) == len(records)


def test_what_is_saved_on_the_way_is_bounded(small_study):
    """A group of a whole day is saved less than a hundred times."""
    protocol = dataclasses.replace(small_study.protocol, turns=1000, replicates=1)
    plan = make_plan(dataclasses.replace(small_study, protocol=protocol), interleaving="lockstep", phases=("train",))
    executor, records, saved = go_on(plan, command_s=33.0)
    assert executor.now > 24 * 3600
    assert 20 * 3 < len(saved) - len(records) < 100 * 3


@pytest.mark.parametrize("level", ["shared-base", "lockstep", "replicates"])
def test_a_run_is_gone_on_with_from_wherever_it_was_killed(small_study, level):
    """Whatever had reached the disk: groups that it settles are kept, the others measured whole, and all are ok."""
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
    """Out of memory is a fact; what was interrupted or not run is not."""
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


def test_an_interruption_of_what_is_gone_on_with_costs_nothing_more(small_study):
    """What a trial had when the run broke off stays its record until it is begun again."""
    plan = make_plan(small_study)
    had = begin_record(plan.slots[2], "interrupted").replaced(samples={"step_time_s": (0.5,)})
    script = {(plan.slots[0].trial, "turn"): KeyboardInterrupt()}
    _, records, saved = go_on(plan, [had], script=script)
    assert {record.trial: record for record in records}[had.trial] == had
    assert had.trial not in {record.trial for record, _ in saved}
    assert [record.status for record in records].count("not_run") == len(plan.slots) - 2


# --- trials whose surroundings were past a limit ----------------------------------------------------------------------

THROTTLED = {"device_samples_train": 10.0, "device_throttled_samples_train": 9.0}


class Recovering(FakeExecutor):
    """The surroundings of some trials are past a limit for so many of their measurements."""

    def __init__(self, disturbed, command_s=0.0):
        super().__init__(command_s=command_s)
        self.left = dict(disturbed)

    def launch(self):
        worker = super().launch()
        ask = worker.ask

        def asked(command, trial, timeout_s, **arguments):
            fragment = ask(command, trial, timeout_s, **arguments)
            if command == "finish_training" and self.left.get(trial, 0) > 0:
                self.left[trial] -= 1
                return dataclasses.replace(fragment, values=THROTTLED)
            return fragment

        worker.ask = asked
        return worker


def retried(plan, disturbed, *, budget=None, command_s=0.0, earlier=()):
    """Conduct beside a throttled card; returns the executor, the result and all that was saved."""
    executor, saved, watcher = Recovering(disturbed, command_s), [], Quiet()
    measured = run_plan(
        plan, {"": executor}, SITE, watcher=watcher, save=saved.append, earlier=earlier,
        budget=Budget(budget, clock=lambda: executor.now),
    )  # fmt: skip
    return executor, measured, saved


def builds(executor, trial):
    return executor.asked.count((trial, "build"))


@pytest.mark.parametrize("level", ["shared-base", "lockstep", "replicates"])
def test_a_disturbed_trial_is_measured_again_with_those_it_took_turns_with(small_study, level):
    """At the end of its replicate, once; all records stay on disk, and the last ones count."""
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
    """Two further tries and no more; the other trials of the run count."""
    plan = make_plan(small_study)
    victim = plan.slots[0].trial
    executor, measured, saved = retried(plan, {victim: 9})
    assert builds(executor, victim) == 1 + small_study.protocol.retries == 3
    statuses = {record.trial: record.status for record in measured.records}
    assert statuses.pop(victim) == "invalid"
    assert set(statuses.values()) == {"ok"}
    assert [record.attempt for record in saved if record.trial == victim] == [0, 1, 2]


def test_disturbed_trials_count_where_they_are_allowed(small_study):
    """For a machine that one cannot have to oneself."""
    plan = make_plan(small_study.with_overrides(allow_disturbed=True))
    executor, measured, _ = retried(plan, {plan.slots[0].trial: 9})
    assert builds(executor, plan.slots[0].trial) == 1
    assert {record.status for record in measured.records} == {"ok"}


def test_nothing_is_measured_again_beyond_the_limit_of_time(small_study):
    """A group is begun again only if as much time as it took is left."""
    plan = make_plan(small_study.with_overrides(replicates=1), interleaving="lockstep", phases=("train",))
    victim = plan.groups[0].slots[0].trial
    probe, _, _ = retried(plan, {}, command_s=1.0)
    first_group_s = next(index for index, (trial, _) in enumerate(probe.asked) if trial.endswith("solo")) * 1.0
    for budget, tries in ((probe.now + first_group_s - 1, 1), (probe.now + first_group_s + 1, 2)):
        # more than a group's time is left when it has ended, and what counts is what the rest of its replicate leaves
        executor, measured, _ = retried(plan, {victim: 9}, command_s=1.0, budget=budget)
        assert builds(executor, victim) == tries
        assert next(record for record in measured.records if record.trial == victim).status == "invalid"
        assert executor.now <= budget


def test_an_interruption_of_a_second_try_leaves_the_first(small_study):
    """What was measured is never lost, and the run counts as interrupted."""
    plan = make_plan(small_study, interleaving="lockstep", phases=("train",))
    slots = plan.groups[0].slots
    executor = Recovering({slots[0].trial: 1})
    builds_seen = []
    launch = executor.launch

    def launching():
        worker = launch()
        ask = worker.ask

        def asked(command, trial, timeout_s, **arguments):
            if command == "build" and trial == slots[0].trial:
                builds_seen.append(trial)
                if len(builds_seen) == 2:
                    raise KeyboardInterrupt
            return ask(command, trial, timeout_s, **arguments)

        worker.ask = asked
        return worker

    executor.launch = launching
    measured = run_plan(
        plan, {"": executor}, SITE, watcher=Quiet(), save=lambda record: None,
    )  # fmt: skip
    assert measured.interrupted
    records = {record.trial: record for record in measured.records}
    assert records[slots[0].trial].disturbed
    assert records[slots[1].trial].status == "ok"
    assert all(records[slot.trial].attempt == 0 for slot in slots)


def test_records_are_in_the_order_of_the_plan_however_they_were_measured(small_study):
    """A run that broke off twice is gone on with by that order, so a group that is measured late must not change it."""
    plan = make_plan(small_study, interleaving="lockstep", phases=("train",))
    victim = plan.groups[0].slots[0].trial
    _, _, saved = retried(plan, {victim: 1})
    first = {record.trial: record for record in saved if record.attempt == 0 and record.replicate == 0}
    order = [slot.trial for slot in plan.slots]
    for earlier in ((), tuple(first.values())):
        _, measured, _ = retried(plan, {}, earlier=earlier)
        assert [record.trial for record in measured.records] == order


def test_a_run_that_broke_off_before_a_second_try_makes_it(small_study):
    """From its records alone; attempts go on counting, and records of two attempts are never paired."""
    plan = make_plan(small_study, interleaving="lockstep", phases=("train",))
    group = plan.groups[0]
    victim, *others = (slot.trial for slot in group.slots)
    _, _, saved = retried(plan, {victim: 1})
    first = {record.trial: record for record in saved if record.attempt == 0}
    executor, measured, _ = retried(plan, {}, earlier=tuple(first.values()))
    assert {trial for trial, _ in executor.asked} == {victim, *others}
    assert {record.attempt for record in measured.records if record.trial in {victim, *others}} == {1}
    mixed = first | {record.trial: record for record in saved if record.trial == victim and record.attempt == 1}
    executor, measured, _ = retried(plan, {}, earlier=tuple(mixed.values()))
    assert {trial for trial, _ in executor.asked} == {victim, *others}
    assert {record.status for record in measured.records} == {"ok"}
