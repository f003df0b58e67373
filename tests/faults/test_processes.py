"""Tests of measuring processes that die: each death is recorded or reported with its reason, and all other results are
kept.

tests/run/workers/test_local.py has the trials whose own process or zygote dies.
"""

from __future__ import annotations

import dataclasses
import os
import signal

import psutil
import pytest

from lorameter.errors import InvalidRunError, UsageError
from lorameter.run.plan import make_plan
from lorameter.run.prepare import RunContext, request_of
from lorameter.run.workers import Executor, WorkerLostError
from lorameter.run.workers.local import LocalExecutor


@pytest.fixture
def executor(tmp_path):
    """An executor that never starts its zygote."""
    local = LocalExecutor()
    Executor.start(local, tmp_path, 1)
    yield local
    local.close()


@pytest.fixture
def doomed(executor, monkeypatch):
    """A function that kills the next process of a kind as soon as it has started."""

    def doom(kind, number):
        spawn, killed = LocalExecutor._spawn, []

        def spawn_and_kill(self, what, *arguments, **options):
            process = spawn(self, what, *arguments, **options)
            if what == kind:
                os.kill(process.pid, number)
                killed.append(process.pid)
            return process

        monkeypatch.setattr(LocalExecutor, "_spawn", spawn_and_kill)
        return killed

    return doom


@pytest.fixture
def request_cold(executor, small_study):
    """The request for a cold start of a trained trial."""
    plan = make_plan(small_study)
    slot = plan.slots[0]
    site = RunContext(device="cpu", threads=1, tokens_path="t", tokens={"hash": "h"})
    return request_of(plan, slot, site, executor.make_place(slot.trial, slot.trial))


def test_a_cold_interpreter_that_is_killed_is_a_row(executor, doomed, request_cold):
    """The trial is crashed, with the name of the signal."""
    doomed("cold", signal.SIGKILL)
    with pytest.raises(WorkerLostError, match="SIGKILL") as lost:
        executor.cold_start(request_cold)
    assert (lost.value.status, lost.value.failure.kind) == ("crashed", "ColdStartFailed")


def test_a_cold_interpreter_that_is_stopped_is_a_row(executor, doomed, request_cold):
    """The trial is a timeout, and its process group is killed."""
    stopped = doomed("cold", signal.SIGSTOP)
    protocol = dataclasses.replace(request_cold.protocol, step_timeout_s=1.0)
    with pytest.raises(WorkerLostError) as lost:
        executor.cold_start(dataclasses.replace(request_cold, protocol=protocol))
    assert (lost.value.status, lost.value.failure.kind) == ("timeout", "Silent")
    assert not psutil.pid_exists(*stopped)


def test_a_token_process_that_is_killed_ends_the_run_before_it_begins(executor, doomed, small_study):
    """The run is invalid, and the message names the log."""
    doomed("tokens", signal.SIGKILL)
    with pytest.raises(InvalidRunError, match=r"tokens could not be prepared.*tokens\.log"):
        executor.prepare_tokens(small_study.workload)


def test_a_crash_while_reading_tokens_is_reported_as_bad_input(executor, doomed, small_study):
    """A segmentation fault, as on a damaged file, is reported as bad input with the log."""
    doomed("tokens", signal.SIGSEGV)
    with pytest.raises(UsageError, match=r"SIGSEGV.*as on a damaged file.*tokens\.log"):
        executor.prepare_tokens(small_study.workload)


def test_a_zygote_that_is_killed_while_it_imports_ends_the_run_before_it_begins(doomed, tmp_path):
    """The run is invalid, and the message names the signal and the log."""
    doomed("zygote", signal.SIGKILL)
    local = LocalExecutor()
    local.start(tmp_path, 1)
    try:
        with pytest.raises(InvalidRunError, match=r"did not start: .*SIGKILL.*zygote\.log"):
            local.hello()
    finally:
        local.close()
