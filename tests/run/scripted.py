"""A training script with steps but no model: it speaks the protocol of a real one, starts at once since it does not
load torch, and fails as its first argument says."""

import os
import signal
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace


class FakeTorch(ModuleType):
    """A module of torch whose names are functions that return None, so that no GPU is available."""

    version = SimpleNamespace(cuda=None)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return FakeTorch(name)

    def __call__(self, *_, **__):
        return None

    def get_num_threads(self):
        return 1

    def device(self, name):
        return SimpleNamespace(type="cpu")


class FakeTorchFinder:
    """Finds and loads every module of torch as a fake."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torch" else None

    def create_module(self, spec):
        return FakeTorch(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, FakeTorchFinder())

from lorameter.attach.observer import StepReading, TrainingInfo  # noqa: E402
from lorameter.attach.script_trial import ScriptTrial  # noqa: E402

FAULT, STEPS = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
STEP_TIME_S = float(os.environ.get("STEP_TIME_S", "1e-3"))
FAULT_STEP = 6
"""The step of the fault, during the warm-up."""


def fault(number):
    """Cause the fault of a step."""
    if number == FAULT_STEP:
        if FAULT == "crash":
            raise RuntimeError("the tensor does not fit")
        if FAULT == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "hang":
            time.sleep(600)
        if FAULT == "orphan":
            if os.fork() == 0:
                time.sleep(600)
            os._exit(7)
        if FAULT == "garbled":
            os.write(TURNS._connection.fileno(), b"what is this\n")


def train(steps):
    """Run one training."""
    TURNS.begin(
        TrainingInfo(
            source="loop",
            model=None,
            planned_steps=None,
            trainable_parameters=32,
            total_parameters=1000,
            accumulation=1,
        )
    )
    number = 0
    while number < steps:
        number += 1
        fault(number)
        loss = 2.0 / number ** (0.05 if FAULT == "worse" else 0.1)
        TURNS.step(
            StepReading(
                number=number,
                step_time_s=2e-3 if FAULT == "slow" else STEP_TIME_S,
                cpu_time_s=1e-3,
                loss=loss,
                loss_dtype="float32",
                sequences=2,
                real_tokens=200,
                padded_tokens=200,
            )
        )


TURNS = ScriptTrial()
Path("started").write_text("")  # written into the copy of its folder
if FAULT == "crash-before":
    raise ValueError("no such data set")
if FAULT == "hang-before":
    time.sleep(600)
if FAULT == "never":
    sys.exit(0)
try:
    train(STEPS)
except BaseException as error:
    TURNS.end(error)
    raise
TURNS.end(None)
Path(os.environ["MARK"]).write_text("it went on after its training")
