"""The parts of a step, by a clock of the test's own."""

import pytest
import torch

from lorameter.attach import readings as module
from lorameter.attach.observer import ErrorGuard
from lorameter.attach.readings import Parts, sum_parts


@pytest.fixture
def clock(monkeypatch):
    """The time as a list of one number, to be moved by hand."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def parts():
    return Parts(torch.device("cpu"), ErrorGuard())


def play(parts, clock, *events):
    """Each event a second after the one before: + begins a part and - ends it."""
    for event in events:
        clock[0] += 1.0
        during = parts.during[event[1:]]
        (during.begin if event[0] == "+" else during.end)()


@pytest.mark.parametrize(
    ("events", "found"),
    [
        (["+forward", "-forward", "+backward", "-backward"], {"forward": 1.0, "backward": 1.0}),
        (["+forward", "-forward", "+forward", "-forward"], {"forward": 2.0}),
        (
            ["+optimizer", "+forward", "-forward", "+backward", "-backward", "-optimizer"],
            {"optimizer": 3.0, "forward": 1.0, "backward": 1.0},
        ),
        (["+optimizer", "+optimizer", "-optimizer", "-optimizer"], {"optimizer": 3.0}),
        (["+optimizer", "+backward", "-optimizer", "+forward", "-forward"],
         {"optimizer": 1.0, "backward": 1.0, "forward": 1.0}),
        (["+backward", "-backward", "-backward", "-optimizer"], {"backward": 1.0}),
        (["+forward", "-forward", "+backward"], {"forward": 1.0}),
        (["-backward", "+forward", "-forward"], {"forward": 1.0}),
    ],
    ids=["in turn", "twice", "a closure", "in itself", "an end left out", "an end too many", "none", "begun before"],
)  # fmt: skip
def test_each_moment_is_that_of_the_innermost_part(parts, clock, events, found):
    """However they lie in one another, and whatever end is missing: no time is counted twice."""
    play(parts, clock, *events)
    assert sum_parts(parts.borders) == found


class Event:
    """In place of a GPU's: it stamps a clock of its own, which runs at half the host's pace."""

    def __init__(self, clock):
        self._clock = clock

    def record(self):
        self.at = self._clock[0] / 2

    def elapsed_time(self, later):
        return (later.at - self.at) * 1e3


def test_on_a_card_the_device_stamps_all_but_the_wait_for_data(clock, monkeypatch):
    """Also where one lies in the other; what the host does aside is none of its time. The GPU is pretended."""
    monkeypatch.setattr(module.torch.cuda, "Event", lambda enable_timing: Event(clock))
    parts = Parts(torch.device("cuda"), ErrorGuard())
    play(parts, clock, "+data", "-data", "+optimizer", "+data", "-data", "+forward", "-forward")
    parts.leave_out(5.0)
    play(parts, clock, "-optimizer")
    assert sum_parts(parts.borders) == {"data": 2.0, "optimizer": 1.5, "forward": 0.5}
