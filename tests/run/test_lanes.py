"""What is not timed goes side by side: so many at once, each errand in its order, whoever has answered making room."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections import deque

import pytest

from harness.records.record import Failure, Fragment
from harness.run.executors import Place, WorkerLostError
from harness.run.executors.channel import Channel
from harness.run.executors.forked import ForkedWorker
from harness.run.lanes import Errand, first_to_answer, walk
from harness.run.plan import make_plan
from harness.run.runner import run_plan
from harness.run.site import Site


class Piped:
    """Something that can be waited for, and has answered when a byte is there."""

    def __init__(self):
        self.read, self.write = os.pipe()

    def fileno(self):
        return self.read

    def answer(self):
        os.write(self.write, b"x")

    def close(self):
        os.close(self.read)
        os.close(self.write)


@pytest.fixture
def workers():
    """Three of them."""
    made = [Piped() for _ in range(3)]
    yield made
    for one in made:
        one.close()


def test_whoever_has_answered_comes_first(workers):
    """Not whoever was asked first; that one where several have, and where nobody has in time."""
    workers[2].answer()
    assert first_to_answer(workers, float("inf")) is workers[2]
    workers[1].answer()
    assert first_to_answer(workers, float("inf")) is workers[1]
    assert first_to_answer(workers[:1], 0.0) is workers[0]


def test_no_more_are_at_work_than_there_are_lanes(workers):
    """And what is left of an errand waits behind those that have not begun."""
    at_work, seen, order = set(), [], []

    def begin(errand, command, trial):
        at_work.add(trial)
        seen.append(len(at_work))
        order.append((command, trial))
        errand.worker.answer()
        return command != "nothing"

    def end(errand, command, trial):
        os.read(errand.worker.read, 1)
        at_work.discard(trial)

    errands = [Errand(worker, deque([("a", str(n)), ("b", str(n))])) for n, worker in enumerate(workers)]
    walk(errands, lanes=2, begin=begin, end=end, timeout_s=60.0)
    assert max(seen) == 2
    assert not at_work
    assert order == [("a", "0"), ("a", "1"), ("a", "2"), ("b", "0"), ("b", "1"), ("b", "2")]


def test_what_has_nothing_to_be_asked_is_passed_over(workers):
    """As a trial that has failed meanwhile."""
    asked = []

    def begin(errand, command, trial):
        asked.append(trial)
        return False

    walk([Errand(workers[0], deque([("a", "x"), ("b", "x")]))], lanes=2, begin=begin, end=None, timeout_s=1.0)
    assert asked == ["x", "x"]


class Worker:
    """Answers at once, in two halves; what is under way is noted."""

    start_latency_s = 0.01

    def __init__(self, executor):
        self.executor, self.pipe = executor, Piped()

    def fileno(self):
        return self.pipe.fileno()

    def ask(self, command, trial, timeout_s, **arguments):
        self.send(command, trial, **arguments)
        return self.receive(command, timeout_s)

    def send(self, command, trial, **arguments):
        assert not self.executor.at_work & {"turn", "request"}
        self.executor.at_work[trial] = command
        self.executor.asked.append((trial, command, len(self.executor.at_work)))
        self.doing = command, trial, arguments
        self.pipe.answer()

    def receive(self, command, timeout_s):
        os.read(self.pipe.read, 1)
        _, trial, arguments = self.doing
        del self.executor.at_work[trial]
        if (trial, command) in self.executor.lost:
            raise WorkerLostError("crashed", Failure(phase=command, kind="ProcessDied", message="it died"))
        if command == "turn":
            return Fragment(samples={"step_time_s": (0.5,) * arguments["steps"]})
        return Fragment()

    def close(self):
        self.pipe.close()


class AtWork(dict):
    """Trials and what they are at."""

    def __and__(self, words):
        return set(self.values()) & words


class Executor:
    """Launches such workers."""

    def __init__(self, *lost):
        self.lost, self.asked, self.at_work = set(lost), [], AtWork()

    def make_place(self, trial, log):
        return Place(scratch=trial, log_path=log)

    def clear_place(self, trial):
        pass

    def launch(self):
        return Worker(self)


class Quiet:
    """A watcher that only watches."""

    def trial_phase(self, slot, phase):
        pass

    def trial_ended(self, record):
        pass


@pytest.mark.parametrize("level", ["lockstep", "shared-base"])
def test_only_what_is_not_timed_goes_side_by_side(small_study, level):
    """Two at once where there are two cores, of one process one after the other; a turn and a request are alone."""
    plan = make_plan(small_study, interleaving=level, phases=("train", "generate"))
    executor, site = Executor(), Site(device="cpu", threads=1, tokens_path="t", tokens={}, lanes=2)
    found = run_plan(plan, {"": executor}, site, save=lambda record: None, watcher=Quiet())
    assert {record.status for record in found.records} == {"ok"}
    live = {slot.trial for group in plan.groups if group.turns for slot in group.slots}
    words = ("build", "verify", "warm_up", "turn", "finish_training", "begin_generate", "request")
    together = {
        word: max(count for trial, asked, count in executor.asked if asked == word and trial in live) for word in words
    }
    assert together["turn"] == together["request"] == 1
    assert together["build"] == together["finish_training"] == (2 if level == "lockstep" else 1)


def test_a_death_beside_others_costs_its_own_trial_alone(small_study):
    """Which is asked nothing more; the others go on."""
    plan = make_plan(dataclasses.replace(small_study), interleaving="lockstep", phases=("train",))
    victim = plan.groups[0].slots[1].trial
    executor, site = Executor((victim, "build")), Site(device="cpu", threads=1, tokens_path="t", tokens={}, lanes=2)
    found = run_plan(plan, {"": executor}, site, save=lambda record: None, watcher=Quiet())
    status = {record.trial: record.status for record in found.records}
    assert {trial for trial, ended in status.items() if ended != "ok"} == {victim}
    assert [command for trial, command, _ in executor.asked if trial == victim] == ["prepare", "build"]


def test_silence_is_counted_from_when_it_was_asked():
    """Not from when the parent came to it, which may have waited for others until then."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        worker = ForkedWorker(1, Channel(ours), mother=None)
        worker._reaped = True  # there is no process to be killed
        worker.send("build", "t")
        worker._sent_s -= 60.0
        begin = time.monotonic()
        with pytest.raises(WorkerLostError, match="no answer within 60 s during build"):
            worker.receive("build", 60.0)
        assert time.monotonic() - begin < 30.0
        worker.send("build", "t")
        theirs.sendall(b'{"values": {"threads": 1.0}}\n')
        worker._sent_s -= 60.0
        assert worker.receive("build", 60.0).values == {"threads": 1.0}  # what has come by then is taken
