"""Fixtures of small trainings, and observers that record what the hook reports."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lorameter.attach import sources
from lorameter.attach.launch import child_environment
from lorameter.attach.observer import ObserverReply
from lorameter.attach.sources import this_process

ROOT = Path(__file__).parents[2]


class Listener:
    """An observer that records all reports; `answers` are its replies to the begin and to each step."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.trainings, self.readings, self.phases, self.ends, self.seen = [], [], [], [], []

    def _next(self):
        return self.answers.pop(0) if self.answers else ObserverReply()

    def begin(self, training):
        self.trainings.append(training)
        return self._next()

    def step(self, reading):
        self.readings.append(reading)
        return self._next()

    def phase(self, phase):
        self.phases.append(phase)

    def end(self, error, *, seen=True):
        self.ends.append(error)
        self.seen.append(seen)


class Clock:
    """A clock that advances a little with each reading, and by a given time with `wait`."""

    def __init__(self):
        self._now_s = 0.0

    def __call__(self):
        self._now_s += 1e-4
        return self._now_s

    def wait(self, seconds):
        self._now_s += seconds


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock of the steps."""
    planted = Clock()
    monkeypatch.setattr(time, "perf_counter", planted)
    return planted


@pytest.fixture
def unattached(monkeypatch, listener):
    """Reset the process to its state before any training was observed; its observer is the listener."""
    this_process.cache_clear()
    monkeypatch.setattr(sources, "make_observer", lambda **options: listener)
    yield
    this_process.cache_clear()


@pytest.fixture
def listener_class():
    return Listener


@pytest.fixture
def listener():
    return Listener()


@pytest.fixture(scope="module")
def make_model():
    """A function that builds the same two-layer llama with an adapter each time."""
    return tiny_model


@pytest.fixture(scope="module")
def rows():
    """Rows of 16 tokens; half of them are padded from the twelfth token on and have no label on the first four."""
    torch.manual_seed(0)
    ids = torch.randint(3, 96, (64, 16))
    made = []
    for place, row in enumerate(ids):
        mask, labels = torch.ones(16, dtype=torch.long), row.clone()
        labels[:4] = -100
        if place % 2:
            mask[12:] = 0
            labels[12:] = -100
        made.append({"input_ids": row, "attention_mask": mask, "labels": labels})
    return made


def tiny_model():
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64, pad_token_id=0)
    return peft.get_peft_model(
        LlamaForCausalLM(config), peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )


OBSERVER = '''
import json, os
from lorameter.attach.observer import ObserverReply
from lorameter.attach.sources import this_process

class Recorder:
    """Writes a line for each event."""

    def __init__(self):
        self.watch_after = int(os.environ.get("WATCH_AFTER", "0"))
        self.file = open(os.environ["EVENTS"], "a")

    def write(self, what, **more):
        self.file.write(json.dumps({"what": what, "pid": os.getpid(), **more}) + "\\n")
        self.file.flush()

    def begin(self, training):
        self.write("begin", source=training.source, planned=training.planned_steps, rank=training.rank,
                  trainable=training.trainable_parameters, ranks=training.ranks, model=type(training.module).__name__)
        return ObserverReply()

    def step(self, reading):
        found = {name: getattr(reading, name) for name in reading.__slots__}
        self.write("step", **found | {"checks": None if reading.checks is None else len(reading.checks)})
        watch = {} if reading.number == self.watch_after else None
        return ObserverReply(watch=watch)

    def phase(self, phase):
        self.write("phase", phase=phase)

    def end(self, error, *, seen=True):
        self.write("end", error=None if error is None else f"{type(error).__name__}: {error}")
'''


@pytest.fixture
def wrapped(tmp_path):
    """A function that runs a command with the hook installed and returns the process and the events of its observer."""
    import json

    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "listening.py").write_text(OBSERVER)

    def run(*command, timeout=240, python_path="", **variables):
        events = tmp_path / "events.jsonl"
        events.unlink(missing_ok=True)
        path = os.pathsep.join(filter(None, [python_path, str(tmp_path / "site")]))
        inherited = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable if word == "python" else word for word in command],
            env=child_environment(inherited, {"EVENTS": str(events), **variables}, observer="listening:Recorder"),
            cwd=tmp_path, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        lines = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
        return done, lines

    return run
