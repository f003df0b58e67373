"""Each signal × the process of a trial, its zygote, its cold start × each phase, at rest and at work: all of it real.
Marked: `make proof-long` takes its minutes."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time

import psutil
import pytest

import harness.run.executors.zygote
from harness.run.executors.forked import ForkedWorker
from harness.run.executors.local import LocalExecutor
from harness.run.plan import make_plan
from harness.run.runner import run_plan
from harness.run.site import site_of

pytestmark = pytest.mark.faults

DEADLY = [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGSEGV]
PHASES = [
    "prepare", "build", "verify", "warm_up", "turn", "finish_training", "begin_generate", "request", "end_generate",
    "merge",
]  # fmt: skip


@pytest.fixture(scope="module")
def executor(tmp_path_factory):
    """One whose zygote is started once, and again where it dies."""
    local = LocalExecutor()
    local.start(tmp_path_factory.mktemp("run"), 1)
    local.hello()
    yield local
    local.close()


def wait_for_end(pid, timeout_s=120.0):
    """Until a process has gone, or only whoever inherited it has not looked after it yet."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} has not ended in {timeout_s:g} s")


@pytest.fixture
def measured(executor, small_study, monkeypatch):
    """A function that measures one trial for each phase, does `deed` to a process of it there, and gives the rows."""

    def measure(deed, *, at_work, target, phases=("train", "generate"), step_timeout_s=120.0):
        names = {f"v{number}": phase for number, phase in enumerate(PHASES)}
        variants = tuple(
            dataclasses.replace(small_study.variants[0], name=name, r=4 + number)
            for number, name in enumerate(("ref", *names))
        )
        protocol = dataclasses.replace(
            small_study.protocol, replicates=1, turns=1, peak_replicates=1, step_timeout_s=step_timeout_s
        )
        study = dataclasses.replace(small_study, variants=variants, reference="ref", protocol=protocol)
        plan = make_plan(study, phases=phases)
        ask, done = ForkedWorker.ask, set()

        def ask_and_break(worker, command, trial, timeout_s, **arguments):
            slot = next(slot for slot in plan.slots if slot.trial == trial)
            if names.get(slot.variant.name) != command or trial in done:
                return ask(worker, command, trial, timeout_s, **arguments)
            done.add(trial)
            pid = worker.pid if target == "child" else executor._zygote.pid
            if at_work:
                worker.channel.send({"do": command, "trial": trial, **arguments})
                deed(pid)
                answer = worker.channel.receive(timeout_s)
                if answer is None:
                    raise worker._lost(command, timeout_s)
            else:
                deed(pid)
            if target == "zygote":  # which gives back a gigabyte before the kernel ends its children
                wait_for_end(worker.pid)
            return ask(worker, command, trial, timeout_s, **arguments)

        monkeypatch.setattr(ForkedWorker, "ask", ask_and_break)
        site = site_of(study.workload, executor.prepare_tokens(study.workload), "cpu")

        class Quiet:
            trial_phase = trial_ended = staticmethod(lambda *_: None)

        found = run_plan(plan, {"": executor}, site, save=lambda record: None, watcher=Quiet())
        ours = psutil.Process().children(recursive=True)
        assert all(process.pid == executor._zygote.pid for process in ours), "no trial's process is left"
        return {names.get(record.name, "ref"): record for record in found.records}

    return measure


@pytest.mark.parametrize("at_work", [False, True])
@pytest.mark.parametrize("number", DEADLY)
@pytest.mark.parametrize("target", ["child", "zygote"])
def test_a_process_that_is_ended(target, number, at_work, measured):
    """A row for the trial under way, with the signal and the phase; the others are measured."""
    records = measured(lambda pid: os.kill(pid, number), at_work=at_work, target=target)
    assert records.pop("ref").status == "ok"
    for phase, record in records.items():
        assert (record.status, record.failure.phase) == ("crashed", phase), record.failure
        assert number.name in record.failure.message
        assert bool(record.samples.get("step_time_s")) is (PHASES.index(phase) > PHASES.index("turn"))


@pytest.mark.parametrize("at_work", [False, True])
def test_a_process_that_is_stopped(at_work, measured):
    """Silent for longer than the limit: it is killed and a row, and the others are measured."""
    records = measured(lambda pid: os.kill(pid, signal.SIGSTOP), at_work=at_work, target="child", step_timeout_s=20.0)
    assert records.pop("ref").status == "ok"
    for phase, record in records.items():
        assert (record.status, record.failure.phase) == ("timeout", phase), record.failure


def test_a_zygote_that_is_stopped_is_replaced(executor, small_study, monkeypatch):
    """It answers nothing: it is ended and another forks the next trial."""
    monkeypatch.setattr(harness.run.executors.zygote, "START_TIMEOUT_S", 60.0)
    before = executor._zygote.pid
    os.kill(before, signal.SIGSTOP)
    worker = executor.launch()
    worker.close()
    assert executor._zygote.pid != before
    assert not psutil.pid_exists(before)


@pytest.mark.parametrize("number", DEADLY)
@pytest.mark.parametrize("after_s", [0.5, 2.0, 4.0])
def test_a_cold_start_that_is_ended(number, after_s, executor, small_study, monkeypatch):
    """While it imports, loads or answers: a row with the signal, or its answer where it was quicker."""
    spawn = LocalExecutor._spawn

    def spawn_and_kill(self, what, *arguments, **options):
        process = spawn(self, what, *arguments, **options)
        if what == "cold":
            threading.Timer(after_s, process.send_signal, [number]).start()
        return process

    monkeypatch.setattr(LocalExecutor, "_spawn", spawn_and_kill)
    study = dataclasses.replace(
        small_study, variants=small_study.variants[:1], protocol=dataclasses.replace(small_study.protocol, replicates=1)
    )
    plan = make_plan(study, phases=("train", "generate", "cold"))
    site = site_of(study.workload, executor.prepare_tokens(study.workload), "cpu")

    class Quiet:
        trial_phase = trial_ended = staticmethod(lambda *_: None)

    for record in run_plan(plan, {"": executor}, site, save=lambda record: None, watcher=Quiet()).records:
        assert record.status in ("ok", "crashed")
        assert record.status == "ok" or number.name in record.failure.message, record.failure
