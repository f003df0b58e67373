"""Tests of scripts in lockstep: real processes that take turns, and every way in which one of them can end.

Tests of the process and the socket of a script: allowed users, and signals.

Tests of live processes that take turns: exactly one computes, and a shared base is loaded once.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from multiprocessing.connection import Client
from pathlib import Path

import psutil
import pytest

from lorameter import wire
from lorameter.attach.launch import HOOKED, SOCKET, socket_address
from lorameter.machine.processes import find_marked
from lorameter.machine.provenance import probe_machine
from lorameter.records import codec
from lorameter.run.build_plan import PlanOptions, build_plan
from lorameter.run.measure import measure
from lorameter.run.plan import make_plan
from lorameter.run.prepare import RunContext, make_request
from lorameter.run.runner import run_plan
from lorameter.run.workers import WorkerLostError, script
from lorameter.run.workers.script import ScriptProcess, ScriptWorker
from lorameter.run.workers.script_sandbox import script_environment
from lorameter.studies.protocol import Protocol
from lorameter.studies.script import script_workload
from lorameter.studies.study import Study
from lorameter.studies.variant import LoraVariant, ScriptVariant
from tests.run.fakes import Quiet

SCRIPT = Path(__file__).parents[1] / "scripted.py"
PROTOCOL = Protocol(
    phases=("train",), replicates=1, warmup_steps_max=9, turns=3, step_timeout_s=120.0, retries=0, seed=7
)
ALL_STEPS = 2 + 9 + 3 * 2
"""The number of steps after the longest warm-up; a script with steady steps skips part of the warm-up and catches
up."""


class Watching(Quiet):
    """A display that records the result of a rehearsal."""

    level, notices = "", ()

    def rehearsed(self, plan, notices):
        self.level, self.notices = plan.interleaving, notices


def study_of(commands, protocol=PROTOCOL, **fields):
    variants = tuple(ScriptVariant(name=name, command=command) for name, command in commands.items())
    return Study(
        name="scripts", title="scripts", workload=script_workload(), protocol=protocol, variants=variants,
        reference=variants[0].name, **fields,
    )  # fmt: skip


def measured(study, folder, display=None, interleaving="lockstep"):
    """Measure the study in a folder that holds the script."""
    shutil.copy(SCRIPT, folder / "scripted.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MARK", str(folder / "mark"))
        patch.setenv("PYTHONPATH", f"{Path(__file__).parents[3] / 'harness'}:{Path(__file__).parents[3]}")
        plan, notices = build_plan(
            study,
            probe_machine(),
            PlanOptions(phases=("train",), interleaving=interleaving),
            free_bytes=2**40,
            runs=folder / "runs",
        )
        return measure(plan, runs=folder / "runs", display=display or Quiet(), notices=notices)


FAULTS = {
    "plain": ("ok", ""),
    "crash-before": ("crashed", "the script ended with exit code 1 before it trained: ValueError: no such data set"),
    "never": ("invalid", "exit code 0 without training"),
    "crash": ("crashed", "RuntimeError in step 6: the tensor does not fit"),
    "kill": ("crashed", "signal 9 (SIGKILL)) during warm_up"),
    "orphan": ("crashed", "exit code 7) during warm_up"),
    "garbled": ("crashed", "an unreadable answer"),
    "hang-before": ("timeout", "did not begin to train within 2 s and was killed"),
    "hang": ("timeout", "no answer within 2 s during warm_up; it was killed"),
    "late": ("ok", ""),
}
"""The status of a trial, and a part of its message."""


def elsewhere(folders):
    """Return a variant with its own folder, environment and interpreter; the last two together set its step time."""
    folder = folders.mktemp("elsewhere")
    shutil.copy(SCRIPT, folder / "renamed.py")
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nSTEP_TIME_S="${{STEP_TIME_S}}4" exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    return ScriptVariant(
        name="elsewhere", command="python renamed.py plain", cwd=str(folder), env={"STEP_TIME_S": "0.00"},
        python=str(python),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All scripts in one group, measured as one replicate of a study. Those that hang have a shorter time limit than
    the protocol's, which no other script could keep on a busy machine."""
    folder = tmp_path_factory.mktemp("scripts")
    counts = {"late": f"plain {ALL_STEPS - 1}"}
    study = study_of({how: f"python scripted.py {counts.get(how, how)}" for how in FAULTS})
    study = dataclasses.replace(study, variants=(*study.variants, elsewhere(tmp_path_factory)))
    ask, hanging = ScriptWorker.ask, {("r0-hang-before", "build"), ("r0-hang", "warm_up")}

    def impatient(worker, command, trial, timeout_s, **arguments):
        return ask(worker, command, trial, 2.0 if (trial, command) in hanging else timeout_s, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptWorker, "ask", impatient)
        return measured(study, folder)


@pytest.fixture(scope="module")
def records(run):
    return {record.name: record for record in run.records if record.role == "variant"}


@pytest.mark.parametrize("how", FAULTS)
def test_each_failed_script_is_a_row_with_its_reason(records, how):
    """Each failed script has a record with its reason, and the other scripts of its group continue."""
    status, message = FAULTS[how]
    record = records[how]
    assert record.status == status, record.failure
    assert message in (record.failure.message if record.failure else "")
    assert (record.failure is None) == (status == "ok")


def test_scripts_record_the_same_metrics_as_other_trials(records):
    """Scripts have steps in turns after a warm-up to a common last step, and record tokens, losses, peaks and
    parameters."""
    record = records["plain"]
    assert record.turn_lengths == (2, 2, 2)
    assert len(record.samples["step_time_s"]) == len(record.samples["timed_loss"]) == 6
    assert record.values["training_steps"] == ALL_STEPS
    losses = [loss for name in ("warmup_loss", "timed_loss", "remaining_loss") for loss in record.samples[name]]
    assert losses == pytest.approx([2.0 / number**0.1 for number in range(1, ALL_STEPS + 1)])
    assert record.samples["turn_tokens"] == (400.0, 400.0, 400.0)
    assert record.samples["turn_padded_tokens"] == (0.0, 0.0, 0.0)
    assert record.values["trainable_parameters"] == 32
    assert 2**20 < record.memory["host_peak_train_bytes"] < 2**32
    assert record.tokens["loss_dtype"] == "float32"


def test_a_variant_has_its_own_folder_environment_and_interpreter(records):
    """The script is found in the variant's folder, and environment and interpreter set its step time."""
    assert (records["elsewhere"].status, records["elsewhere"].failure) == ("ok", None)
    assert set(records["elsewhere"].samples["step_time_s"]) == {4e-3}


def test_code_after_the_training_is_not_run(run, records):
    """The script is ended after its last step, so that its later code does not run, and its copy is removed."""
    folder = run.path.parents[1]
    assert not (folder / "mark").exists()
    assert not (folder / "started").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["runs", "scripted.py"]


def test_a_script_that_ends_after_its_turns_counts_with_a_notice(records):
    """All timed steps are recorded; the last steps for the losses are missing."""
    (notice,) = records["late"].notices
    assert (notice.code, records["late"].values["training_steps"]) == ("training-ended-early", ALL_STEPS - 1)


def test_no_process_is_left(run):
    """No script and no child of a script is left."""
    folder = str(run.path.parents[1])
    processes = psutil.process_iter(["cmdline", "cwd"])
    assert [one.info["cmdline"] for one in processes if (one.info["cwd"] or "").startswith(folder)] == []


def test_a_rehearsal_decides_the_level(tmp_path):
    """The memory of each script alone decides whether all fit; failures are reported before the start."""
    study = study_of({"plain": "python scripted.py plain", "crash": "python scripted.py crash-before"})
    display = Watching()
    run = measured(study, tmp_path, display, interleaving=None)
    assert run.manifest.interleaving == display.level == "lockstep"
    assert "live together they took" in run.manifest.why
    assert [notice.code for notice in display.notices] == ["rehearsal-failed"]
    assert "no such data set" in display.notices[0].message
    assert {record.name: record.status for record in run.records} == {"plain": "ok", "crash": "crashed"}


@pytest.fixture
def start(tmp_path):
    """A function that starts a command that connects to a socket of the given name."""
    started = []

    def started_with(*words, turns=""):
        turns = turns or f"@lorameter-test-{secrets.token_hex(8)}"
        variables = {**os.environ, SOCKET: turns, HOOKED: str(tmp_path / "hooked")}
        started.append(ScriptProcess(words, variables, folder=tmp_path, log=tmp_path / "log", turns=turns))
        return started[-1]

    yield started_with
    for one in started:
        one.close()


def greet(turns, harness):
    """Connect as the training of a script does."""
    connection = Client(socket_address(turns), "AF_UNIX")
    wire.send(connection, wire.Hello(harness=harness))
    return connection


@pytest.mark.parametrize(("option", "kind"), [("-I", "NotHooked"), ("-u", "NeverTrained")])
def test_a_python_without_the_hook_differs_from_one_that_never_trains(tmp_path, option, kind):
    """A Python without the hook and a script without a training are reported as different failures."""
    turns = f"@lorameter-test-{secrets.token_hex(8)}"
    variables = script_environment(
        ScriptVariant(name="a", command="python t.py"), os.environ, scratch=tmp_path, threads=1, port=5, socket=turns
    )
    words = (sys.executable, option, "-c", "print('alone')")
    process = ScriptProcess(words, variables, folder=tmp_path, log=tmp_path / "log", turns=turns)
    try:
        with pytest.raises(WorkerLostError) as caught:
            process.connect(60.0)
    finally:
        process.close()
    assert (caught.value.status, caught.value.failure.kind) == ("invalid", kind)


def test_a_script_whose_start_is_interrupted_is_killed(start, monkeypatch):
    """A signal may arrive when the process exists and is not registered yet."""
    popen = subprocess.Popen

    def interrupted(words, **options):
        process = popen(words, **options)
        if words[0] == "sleep":
            raise KeyboardInterrupt
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    turns = f"@lorameter-test-{secrets.token_hex(8)}"
    with pytest.raises(KeyboardInterrupt):
        start("sleep", "60", turns=turns)
    deadline = time.monotonic() + 10.0
    while left := find_marked(f"{SOCKET}={turns}".encode()):  # a killed process takes a moment to end
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def test_another_users_connection_is_closed_and_the_next_accepted(start, monkeypatch):
    """A socket in the abstract namespace accepts every user, so that the connection of another user is closed."""
    users = iter([os.geteuid() + 1, os.geteuid()])
    monkeypatch.setattr(script, "_user_of", lambda connection: next(users))
    turns = "@lorameter-test-" + secrets.token_hex(8)
    process = start("sleep", "60", turns=turns)
    with greet(turns, "theirs") as theirs, greet(turns, "ours"), process.connect(30) as ours:
        assert wire.receive(ours, wire.Hello).harness == "ours"
        with pytest.raises(wire.ClosedError):
            wire.receive(theirs, wire.Hello)


RANKS = (LoraVariant(name="r4", r=4, quantization="nf4"), LoraVariant(name="r8", r=8, quantization="nf4"))


def test_a_waiting_process_uses_no_cpu(small_study, executor, tokens_of):
    """While one process of a lockstep trains, the other blocks on its socket."""
    site = RunContext(device="cpu", tokens={small_study.workload: tokens_of(small_study.workload)})
    plan = make_plan(small_study, interleaving="lockstep", phases=["train"])
    workers = {}
    for slot in plan.groups[0].slots[:2]:
        workers[slot.trial] = executor.launch()
        request = codec.to_json(make_request(plan, slot, site, executor.make_place(slot.trial, slot.trial)))
        workers[slot.trial].ask("prepare", slot.trial, 60, request=request)
        assert workers[slot.trial].ask("build", slot.trial, 60).status == "ok"
    (busy, computing), (idle, waiting) = workers.items()
    used = {name: sum(psutil.Process(worker.pid).cpu_times()[:2]) for name, worker in workers.items()}
    computing.ask("turn", busy, 60, steps=30)
    spent = {name: sum(psutil.Process(worker.pid).cpu_times()[:2]) - used[name] for name, worker in workers.items()}
    for worker in (computing, waiting):
        worker.close()
    assert spent[busy] >= 0.2
    assert spent[idle] <= 0.01  # one tick of the kernel's clock


def test_a_trial_that_fails_leaves_its_neighbours_on_the_base_alone(small_study, executor, tokens_of):
    """A diverging adapter is recorded as invalid; the other trials on the base are bit-equal to a run without it."""
    wild = dataclasses.replace(RANKS[1], name="wild", learning_rate=1e30, lora_alpha=10**12, max_grad_norm=0)
    losses = {}
    protocol = dataclasses.replace(small_study.protocol, replicates=1)
    for name, variants in (("with", (RANKS[0], wild)), ("without", RANKS[:1])):
        study = dataclasses.replace(small_study, variants=variants, reference="r4", protocol=protocol)
        plan = make_plan(study, interleaving="shared-base", phases=["train"])
        site = RunContext(device="cpu", tokens={study.workload: tokens_of(study.workload)})
        records = run_plan(plan, {"": executor}, site, save=lambda record: None, display=Quiet()).records
        by_name = {record.name: record for record in records}
        assert by_name["r4"].status == "ok"
        if name == "with":
            assert (by_name["wild"].status, by_name["wild"].failure.kind) == ("invalid", "LossNotFinite")
            assert "learning_rate" in by_name["wild"].failure.message
        losses[name] = [record.samples["timed_loss"] for record in records if record.trial == "r0-r4"]
    assert losses["with"] == losses["without"]
