"""Measuring processes that die: each death is a row or an error with its reason, and nothing else is lost by it.

What becomes of a trial whose own process or whose zygote dies is in tests/run/executors/test_local.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys

import psutil
import pytest

from harness.errors import InvalidRunError, UsageError
from harness.machine.processes import FAULTS
from harness.run.executors import WorkerLostError
from harness.run.executors.disk import Disk
from harness.run.executors.local import LocalExecutor
from harness.run.plan import make_plan
from harness.run.site import Site, request_of

DEADLY = [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGSEGV]


@pytest.fixture
def executor(tmp_path):
    """One whose zygote is not needed."""
    local = LocalExecutor()
    local._disk = Disk(tmp_path)
    yield local
    local.close()


@pytest.fixture
def doomed(executor, monkeypatch):
    """A function that has the next process of a kind killed as soon as it is there."""

    def doom(kind, number):
        spawn = LocalExecutor._spawn

        def spawn_and_kill(self, what, *arguments, **options):
            process = spawn(self, what, *arguments, **options)
            if what == kind:
                os.kill(process.pid, number)
            return process

        monkeypatch.setattr(LocalExecutor, "_spawn", spawn_and_kill)

    return doom


@pytest.fixture
def request_cold(executor, small_study):
    """The request of a trial that has been trained."""
    plan = make_plan(small_study)
    slot = plan.slots[0]
    site = Site(device="cpu", threads=1, tokens_path="t", tokens={"hash": "h"})
    return request_of(plan, slot, site, executor.make_place(slot.trial, slot.trial))


@pytest.mark.parametrize("number", DEADLY)
def test_a_cold_interpreter_that_is_killed_is_a_row(executor, doomed, request_cold, number):
    """Crashed, with the signal by its name."""
    doomed("cold", number)
    with pytest.raises(WorkerLostError, match=number.name) as lost:
        executor.cold_start(request_cold)
    assert (lost.value.status, lost.value.failure.kind) == ("crashed", "ColdStartFailed")


def test_a_cold_interpreter_that_cannot_import_leaves_its_traceback(executor, request_cold, monkeypatch, tmp_path):
    """What it printed before it died stands in the record; what was in the log before does not."""
    (tmp_path / "torch.py").write_text("raise ImportError('broken on purpose')")
    (tmp_path / "logs" / f"{request_cold.trial}.log").write_text("Traceback: of somebody else\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    try:
        fragment = executor.cold_start(request_cold)
        status, failure = fragment.status, fragment.failure
    except WorkerLostError as lost:
        status, failure = lost.status, lost.failure
    assert status == "crashed"
    assert "broken on purpose" in failure.message
    assert "Traceback (most recent call last)" in failure.traceback
    assert "somebody else" not in failure.traceback


def test_a_cold_interpreter_without_memory_is_out_of_it(executor, request_cold):
    """A limit below what the libraries need: its own status, with its traceback, and not another answer."""
    protocol = dataclasses.replace(request_cold.protocol, memory_limit_bytes=2**20)
    fragment = executor.cold_start(dataclasses.replace(request_cold, protocol=protocol))
    assert fragment.status in ("oom", "crashed")  # whichever library meets the limit says so in its own words
    assert "Traceback" in fragment.failure.traceback


@pytest.fixture
def answering(executor, monkeypatch):
    """A function that has a program stand in the place of a measuring process, given its descriptor or stdout as
    `answer`; it returns those that were started."""

    def stand_in(program):
        started = []

        def spawn(self, what, descriptor, log, *, threads=None, **streams):
            passed = () if descriptor is None else (descriptor,)
            text = (
                f"import os, sys, time\nsys.stdin.read()\nanswer = {1 if descriptor is None else descriptor}\n{program}"
            )
            started.append(
                subprocess.Popen([sys.executable, "-c", text], pass_fds=passed, start_new_session=True, **streams)
            )
            return started[-1]

        monkeypatch.setattr(LocalExecutor, "_spawn", spawn)
        return started

    return stand_in


def test_a_long_answer_of_a_cold_interpreter_is_read_while_it_writes(executor, answering, request_cold):
    """A traceback longer than a pipe: the failure is the interpreter's own, all of it."""
    answering(
        "import json\nfailure = dict(phase='cold', kind='RuntimeError', message='m', traceback='x' * 300_000)\n"
        "open(answer, 'w').write(json.dumps(dict(status='crashed', failure=failure)))"
    )
    found = executor.cold_start(request_cold)
    assert found.status == "crashed"
    assert (found.failure.kind, len(found.failure.traceback)) == ("RuntimeError", 300_000)


HOLDING = (
    "\nsys.stdout.flush()\nif os.fork() == 0: os.setsid(); os.dup2(os.open('held', os.O_RDONLY), 0); os.read(0, 1)"
)
"""What it has started holds the other end of the answer, in a session of its own, until somebody writes into `held`."""


@pytest.fixture
def holding(tmp_path, monkeypatch):
    """The working folder with the FIFO that lets go what a process has started."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("held")
    yield
    os.close(os.open("held", os.O_RDWR | os.O_NONBLOCK))
    with contextlib.suppress(OSError):  # nobody holds it
        os.close(os.open("held", os.O_WRONLY | os.O_NONBLOCK))


@pytest.mark.usefixtures("holding")
def test_an_answer_is_whole_when_its_process_has_ended(executor, answering, request_cold, small_study):
    """Whoever else could still write: neither a cold start nor the tokens wait for what has been started."""
    answering('os.write(answer, b\'{"samples": {"cold_start_time_s": [1.0]}}\')' + HOLDING)
    assert executor.cold_start(request_cold).samples == {"cold_start_time_s": (1.0,)}
    answering('os.write(answer, b\'{"error": "no such data"}\')' + HOLDING)
    with pytest.raises(UsageError, match="no such data"):
        executor.prepare_tokens(small_study.workload)


def test_a_cold_interpreter_that_is_stopped_is_a_row(executor, doomed, request_cold):
    """Timeout, and it is gone with its group."""
    doomed("cold", signal.SIGSTOP)
    protocol = dataclasses.replace(request_cold.protocol, step_timeout_s=1.0)
    with pytest.raises(WorkerLostError) as lost:
        executor.cold_start(dataclasses.replace(request_cold, protocol=protocol))
    assert (lost.value.status, lost.value.failure.kind) == ("timeout", "Silent")
    assert not psutil.Process().children(recursive=True)


def test_a_token_process_that_is_stopped_ends_the_run_before_it_begins(executor, doomed, small_study, monkeypatch):
    """After the time that a download may take; it is gone with its group, and the log is named."""
    monkeypatch.setattr("harness.run.executors.local.TOKENS_TIMEOUT_S", 1.0)
    doomed("tokens", signal.SIGSTOP)
    with pytest.raises(InvalidRunError, match=r"tokens took over 1 s.*tokens\.log"):
        executor.prepare_tokens(small_study.workload)
    assert not psutil.Process().children(recursive=True)


@pytest.mark.parametrize("number", [number for number in DEADLY if number not in FAULTS])
def test_a_token_process_that_is_killed_ends_the_run_before_it_begins(executor, doomed, small_study, number):
    """Nothing was measured; the message names the log."""
    doomed("tokens", number)
    with pytest.raises(InvalidRunError, match=r"tokens could not be prepared.*tokens\.log"):
        executor.prepare_tokens(small_study.workload)


def test_a_token_process_that_dies_of_what_it_reads_blames_that(executor, doomed, small_study):
    """As on a damaged file: bad input, and the log is named."""
    doomed("tokens", signal.SIGSEGV)
    with pytest.raises(UsageError, match=r"SIGSEGV.*as on a damaged file.*tokens\.log"):
        executor.prepare_tokens(small_study.workload)


@pytest.mark.parametrize("number", DEADLY)
def test_a_zygote_that_is_killed_while_it_imports_ends_the_run_before_it_begins(doomed, tmp_path, number):
    """Nothing was measured; the message names the signal and the log."""
    doomed("zygote", number)
    local = LocalExecutor()
    local.start(tmp_path, 1)
    try:
        with pytest.raises(InvalidRunError, match=rf"did not start: .*{number.name}.*zygote\.log"):
            local.hello()
    finally:
        local.close()
