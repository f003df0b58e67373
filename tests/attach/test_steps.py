"""A training told step by step: what looks on at one, and what it costs the process."""

import time
from pathlib import Path

import pytest
import torch

from harness.attach.follower import Next, Training
from harness.attach.shield import Shield
from harness.attach.steps import Steps, make_watch


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(16, 4), torch.nn.Linear(4, 16))


def test_on_a_cpu_the_spy_looks_on(model):
    """Without a model nobody does."""
    assert make_watch(model, {"mode": "train"})._instrument == "spy"
    assert make_watch(model, {"packing.isolated": True})._instrument == "profile"  # which the spy cannot tell
    assert make_watch(None, {}) is None


def threads():
    """Of this process, as the kernel counts them."""
    return len(list(Path("/proc/self/task").iterdir()))


def test_a_watched_step_leaves_no_thread_behind(model, listener_class):
    """A fork of the process would wait for it at its end. The step that was asked for is judged, no other."""
    listener = listener_class(Next(), Next(watch={"mode": "train"}))
    training = Training(
        source="loop", model=model, planned_steps=None, trainable_parameters=1, total_parameters=1, accumulation=1
    )
    steps = Steps(listener, training, torch.device("cpu"), Shield())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps.begin()
    before = threads()
    for _ in range(3):
        steps.open_step()
        model(torch.randint(0, 16, (2, 5))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.end_step()
    assert threads() <= before
    assert [reading.checks is not None for reading in listener.readings] == [False, True, False]
    (mode,) = (check for check in listener.readings[1].checks if check.path == "mode")
    assert (mode.status, mode.observed) == ("active", "train")


def test_a_part_that_fails_has_ended(model, listener):
    """As a pass that runs out of memory: what the script does about it is none of its time."""
    training = Training(
        source="loop", model=model, planned_steps=None, trainable_parameters=1, total_parameters=1, accumulation=1
    )
    steps = Steps(listener, training, torch.device("cpu"), Shield())
    steps.begin()

    def fail():
        with steps.during("forward"):
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    time.sleep(0.05)
    reading = steps.end_step()
    assert 0 <= reading.forward_time_s <= reading.step_time_s - 0.05


def test_no_step_computes_for_less_than_no_time(model, listener):
    """Where the meter's own work inside a step was held up by other processes for longer than the step computed."""
    training = Training(
        source="loop", model=model, planned_steps=None, trainable_parameters=1, total_parameters=1, accumulation=1
    )
    steps = Steps(listener, training, torch.device("cpu"), Shield())
    steps.begin()
    with steps.aside():
        time.sleep(0.05)
    steps.end_step()
    steps.start("forward")
    with steps.aside():
        time.sleep(0.05)
    steps.stop("forward")
    steps.end_step()
    first, second = listener.readings
    assert first.cpu_time_s >= 0.0
    assert 0.0 <= first.step_time_s < 0.05
    assert 0.0 <= second.forward_time_s <= second.step_time_s * (1 + 1e-9)  # as of the step, so of its part
