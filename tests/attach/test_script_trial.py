"""Tests of the trial of a script, in the script's process: its replies before and after its steps.

Tests that a measured script does not report, save or publish.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import secrets
import socket
import subprocess
import sys
import threading
import weakref
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import hf_api

from lorameter import wire
from lorameter.attach import disable_side_effects
from lorameter.attach.observer import ObserverReply, StepReading, TrainingInfo
from lorameter.attach.script_trial import SOCKET, ScriptTrial, socket_address
from lorameter.machine.processes import pin_to_cpus
from lorameter.records import codec
from lorameter.records.record import PartialRecord
from lorameter.run.plan import make_plan
from lorameter.run.prepare import RunContext, make_request
from lorameter.run.workers import TrialFiles
from lorameter.studies.commands import study_of_command

URL = "https://me:hf_abc@example.org/data?token=xyz"


@pytest.fixture
def listener(monkeypatch):
    """A socket that listens at the address in the environment of the script."""
    name = f"@lorameter-test-{secrets.token_hex(8)}"
    monkeypatch.setenv(SOCKET, name)
    with socket.socket(socket.AF_UNIX) as found:
        found.bind(socket_address(name))
        found.listen(1)
        found.settimeout(30)
        yield found


@pytest.fixture
def parent(listener, monkeypatch, tmp_path):
    """The parent of a trial that runs the given script in a thread; `ask` sends a command, and `join` ends the
    thread."""
    monkeypatch.setattr(os, "_exit", sys.exit)  # a script exits when its parent has exited
    study = study_of_command("python train.py")
    plan = make_plan(study, phases=("train",), interleaving="lockstep")
    files = TrialFiles(scratch=str(tmp_path), log_path=str(tmp_path / "log"))
    request = make_request(plan, plan.slots[0], RunContext(device="cpu"), files)

    def run(script):
        with contextlib.suppress(SystemExit):
            script()

    def start(script):
        child = threading.Thread(target=run, args=(script,), daemon=True)
        child.start()
        connection = Connection(listener.accept()[0].detach())
        assert wire.receive(connection, wire.Hello, 30.0).pid == os.getpid()

        def ask(name, **arguments):
            wire.send(connection, wire.Command(name, arguments=arguments))
            return wire.receive_answer(connection, PartialRecord, 60.0)

        ask("prepare", request=codec.to_json(request))
        return SimpleNamespace(ask=ask, join=lambda: (connection.close(), child.join(60)))

    return start


def training(**fields):
    facts = {"source": "loop", "model": None, "planned_steps": None, "trainable_parameters": 6, "total_parameters": 6}
    return TrainingInfo(**{**facts, "accumulation": 1, **fields})


def reading(number, **fields):
    return StepReading(**{"number": number, "step_time_s": 0.1, "cpu_time_s": 0.1, "loss": 2.0, **fields})


def test_a_script_describes_its_training_and_its_requirements_are_checked(parent):
    """The trial describes the training before its first step and checks the required paths in its second."""
    model, replies = torch.nn.Linear(2, 2), []

    def script():
        trial = ScriptTrial()
        replies.append(trial.begin(training(model=weakref.ref(model), required={"base.bits": 4})))
        replies.append(trial.step(reading(1)))
        trial.step(reading(2, checks=()))

    trial_parent = parent(script)
    built = trial_parent.ask("build")
    assert (built.values["trainable_parameters"], built.tokens["trainable_dtype"]) == (6.0, "float32")
    assert built.software["python"] == platform.python_version()
    assert built.software["torch"] == importlib.metadata.version("torch")
    verified = trial_parent.ask("verify")
    assert replies == [ObserverReply(), ObserverReply(watch={"base.bits": 4})]
    assert (verified.status, verified.failure.kind) == ("invalid", "RequiredPathNotSeen")
    trial_parent.join()


def test_the_recorded_error_is_short_and_holds_no_credential(parent):
    """The recorded error is shortened and holds no credentials; the steps before it are kept, and the script does not
    continue after its training."""
    continued = []

    def script():
        trial = ScriptTrial()
        trial.begin(training())
        trial.step(reading(1))
        trial.end(OSError(f"401 for {URL} {'x' * 10**6}"))
        continued.append(True)

    trial_parent = parent(script)
    trial_parent.ask("build")
    record = trial_parent.ask("turn", steps=2)
    assert (record.status, record.samples["timed_loss"]) == ("crashed", (2.0,))
    assert "OSError in step 2: 401 for https://***@example.org/data?***" in record.failure.message
    assert len(record.failure.message + record.failure.traceback) < 20_000
    for secret in ("hf_abc", "xyz"):
        assert secret not in record.failure.message + record.failure.traceback
    assert trial_parent.ask("turn", steps=2).failure.kind == "OSError"
    trial_parent.join()
    assert not continued


ENDS = {
    "early": (lambda trial: trial.end(None), "invalid", "ended by itself after 1 step, and more are needed"),
    "nan": (lambda trial: trial.step(reading(2, loss=math.nan)), "invalid", "the loss is nan in step 2"),
    "memory": (lambda trial: trial.end(MemoryError("no room")), "oom", "MemoryError in step 2: no room"),
}


@pytest.mark.parametrize(("act", "status", "message"), ENDS.values(), ids=ENDS)
def test_a_training_that_cannot_be_measured_is_answered_with_its_reason(parent, act, status, message):
    """The training ends before its steps were taken, diverges, or needs too much memory."""

    def script():
        trial = ScriptTrial()
        trial.begin(training())
        trial.step(reading(1))
        act(trial)

    trial_parent = parent(script)
    trial_parent.ask("build")
    record = trial_parent.ask("verify")
    assert record.status == status
    assert message in record.failure.message
    trial_parent.join()


def test_a_training_with_too_few_steps_is_refused_before_the_first(parent):
    """The number of steps that a Trainer plans is known."""
    protocol = study_of_command("python train.py").protocol
    least = 2 + protocol.warmup_steps_min + protocol.turns * protocol.steps_per_turn
    trial_parent = parent(lambda: ScriptTrial().begin(training(planned_steps=4)))
    record = trial_parent.ask("build")
    assert record.status == "invalid"
    assert f"the script trains 4 steps, and at least {least} are needed" in record.failure.message
    trial_parent.join()


FORKING = """
import os
from lorameter.attach.observer import TrainingInfo
from lorameter.attach.script_trial import ScriptTrial

trial = ScriptTrial()
trial.begin(TrainingInfo(
    source="loop", model=None, planned_steps=None, trainable_parameters=6, total_parameters=6, accumulation=1
))
child = os.fork()
if child == 0:
    print(len(os.sched_getaffinity(0)), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(len(os.sched_getaffinity(0)), flush=True)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_forked_data_workers_are_not_pinned(listener):
    """A data worker that is forked during the timed steps may use all CPUs, as without lorameter."""
    script = subprocess.Popen([sys.executable, "-c", FORKING], stdout=subprocess.PIPE, text=True)
    with script, Connection(listener.accept()[0].detach()) as connection:
        wire.receive(connection, wire.Hello)
        pin_to_cpus(script.pid, {min(os.sched_getaffinity(0))})
        wire.send(connection, wire.Command("turn", arguments={"steps": 1}))
        printed = script.communicate(timeout=60)[0]
    assert printed.split() == [str(len(os.sched_getaffinity(0))), "1"]


def test_a_trainer_saves_reports_and_pushes_nothing(tmp_path):
    """A Trainer saves, reports and pushes nothing whatever its arguments are; its other arguments are unchanged."""
    from transformers import TrainingArguments, training_args

    complete = TrainingArguments.__post_init__
    try:
        disable_side_effects.disable_trainer_side_effects(training_args)
        made = TrainingArguments(
            output_dir=str(tmp_path), save_strategy="steps", save_steps=5, push_to_hub=True, report_to=["wandb"],
            use_cpu=True, learning_rate=0.5, eval_strategy="no", load_best_model_at_end=True,
        )  # fmt: skip
    finally:
        TrainingArguments.__post_init__ = complete
    assert (made.save_strategy.value, made.push_to_hub, made.report_to) == ("no", False, [])
    assert (made.learning_rate, made.load_best_model_at_end) == (0.5, False)


READING = """
    auth bucket dataset download fetch file get hf inspect is kernel list model paper parse read repo resolve revision
    search snapshot space sync url verify wait whoami
""".split()
"""First words of client methods that only read; `run_as_future` only calls another method in a thread."""


@pytest.fixture
def hub(monkeypatch):
    """A second copy of the real client's module, since blocked writes cannot be enabled again."""
    spec = importlib.util.spec_from_file_location("huggingface_hub.closed_here", hf_api.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_every_writing_method_of_the_hub_client_is_refused(hub):
    """Each client method either reads, according to its first word, or refuses; so does the module function of the same
    name."""
    names = {name for name, one in vars(hub.HfApi).items() if callable(one) and not name.startswith("_")}
    functions = {name for name in names if hasattr(hub, name)}
    disable_side_effects.block_hub_writes(hub)
    closed = set()
    for name in names - {"run_as_future"}:
        if name.partition("_")[0] not in READING:
            calls = [getattr(hub.HfApi(), name), *([getattr(hub, name)] if name in functions else [])]
            for call in calls:
                with pytest.raises(RuntimeError, match="publishes nothing"):
                    call("me/model", repo_type="model")
            closed.add(name)
    wanted = """
        create_repo create_commit create_branch create_tag upload_file upload_folder delete_repo delete_file
        delete_files delete_folder move_repo update_repo_settings super_squash_history preupload_lfs_files
    """
    assert set(wanted.split()) <= closed & functions
