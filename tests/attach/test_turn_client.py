"""The end of a conversation that a script's process holds: what it says before its first step, and what it is told."""

import importlib.metadata
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import threading

import pytest
import torch

from lorameter.attach.observer import ObserverReply, StepReading, TrainingInfo, weakly
from lorameter.attach.turn_client import SOCKET, TurnClient, address
from lorameter.machine.affinity import pin_to_cpus

LARGE_BYTES = 64 << 20


@pytest.fixture
def parent(monkeypatch):
    """Listens where a child finds it by its environment; a child that is left alone ends itself, and no more."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    name = f"@lorameter-test-{secrets.token_hex(8)}"
    monkeypatch.setenv(SOCKET, name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address(name))
        listener.listen(1)
        listener.settimeout(30)
        yield listener


def test_what_the_script_requires_is_said_before_its_first_step(parent):
    """And what the step is watched for is what it is told to."""
    model = torch.nn.Linear(2, 2)
    training = TrainingInfo(
        source="loop", model=weakly(model), planned_steps=None, trainable_parameters=6, total_parameters=6,
        accumulation=1, required={"base.bits": 4},
    )  # fmt: skip
    found = []
    child = threading.Thread(target=lambda: found.append(TurnClient().begin(training)), daemon=True)
    child.start()
    connection, _ = parent.accept()
    with connection, connection.makefile("rw") as lines:
        begun = json.loads(lines.readline())["begin"]
        lines.write(json.dumps({"do": "go", "steps": 1, "watch": begun["required"]}) + "\n")
        lines.flush()
        child.join()
    assert begun["trainable_dtypes"] == {"float32": 6}
    assert begun["software"]["python"] == platform.python_version()
    assert begun["software"]["torch"] == importlib.metadata.version("torch")
    assert found == [ObserverReply(watch={"base.bits": 4})]


def test_an_evaluation_is_not_in_the_peak_of_training(parent):
    """What it takes is in a peak of its own, though steps follow."""
    training = TrainingInfo(
        source="trainer", model=None, planned_steps=None, trainable_parameters=6, total_parameters=6, accumulation=1
    )

    def train():
        turns = TurnClient()
        turns.begin(training)
        turns.phase("evaluate")
        assert len(b"x" * LARGE_BYTES) == LARGE_BYTES
        turns.phase("train")
        turns.step(StepReading(number=1, step_time_s=0.1, cpu_time_s=0.1))

    child = threading.Thread(target=train, daemon=True)
    child.start()
    connection, _ = parent.accept()
    with connection, connection.makefile("rw") as lines:

        def ask(**words):
            lines.write(json.dumps(words) + "\n")
            lines.flush()
            return json.loads(lines.readline())

        assert "begin" in json.loads(lines.readline())
        assert len(ask(do="go", steps=1)["steps"]) == 1
        peaks = ask(do="peaks")["peaks"]
        lines.write(json.dumps({"do": "end"}) + "\n")
        lines.flush()
        child.join()
    assert peaks.keys() == {"host_peak_train_bytes", "host_peak_evaluate_bytes"}
    assert peaks["host_peak_evaluate_bytes"] >= peaks["host_peak_train_bytes"] + LARGE_BYTES // 2


FORKING = """
import os
from lorameter.attach.observer import TrainingInfo
from lorameter.attach.turn_client import TurnClient

TurnClient().begin(TrainingInfo(
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
def test_what_a_script_forks_does_not_share_its_seat(parent):
    """A worker that loads data begins in the middle of the timed steps, and ran before on any CPU."""
    script = subprocess.Popen([sys.executable, "-c", FORKING], stdout=subprocess.PIPE, text=True)
    connection, _ = parent.accept()
    with script, connection, connection.makefile("rw") as lines:
        assert "begin" in json.loads(lines.readline())
        pin_to_cpus(script.pid, {min(os.sched_getaffinity(0))})
        lines.write(json.dumps({"do": "go", "steps": 1}) + "\n")
        lines.flush()
        said = script.communicate(timeout=60)[0]
    assert said.split() == [str(len(os.sched_getaffinity(0))), "1"]


def test_a_socket_lies_in_no_folder():
    """Its name is that of the variable, and the first byte says where it lies (unix(7), abstract)."""
    assert address("@lorameter-1") == "\0lorameter-1"
