"""The borders between phases, by a planted clock, planted events of a device, and planted marks of the profiler."""

from types import SimpleNamespace

import pytest

from harness.trial.profiling import phases as borders
from harness.trial.profiling.activity import MARK
from harness.trial.profiling.phases import Phases

NAMES = ("ahead", "behind")


class Moments:
    """A host's clock, a device's clock that runs at double speed, and a list of what was asked of either."""

    def __init__(self, monkeypatch):
        self.now_s = 100.0
        self.asked = []
        self.broken = False
        moments = self

        class Event:
            def __init__(self, *, enable_timing):
                assert enable_timing
                self.stamped_ms = None

            def record(self):
                moments.ask("event")
                self.stamped_ms = 2e3 * moments.now_s

            def elapsed_time(self, end):
                return end.stamped_ms - self.stamped_ms

        class Mark:
            def __init__(self, name):
                self.name = name

            def __enter__(self):
                moments.asked.append(f"enter {self.name}")

            def __exit__(self, *raised):
                moments.asked.append(f"leave {self.name}")

        def synchronize(device):
            self.ask(f"wait for {device}")

        monkeypatch.setattr(borders, "time", SimpleNamespace(perf_counter=lambda: self.now_s))
        monkeypatch.setattr(borders.torch.cuda, "Event", Event)
        monkeypatch.setattr(borders, "record_function", Mark)
        monkeypatch.setattr(borders, "synchronize", synchronize)

    def ask(self, what):
        if self.broken:
            raise RuntimeError("the device answers nothing any more")
        self.asked.append(what)

    def pass_s(self, seconds):
        self.now_s += seconds


@pytest.fixture
def moments(monkeypatch):
    return Moments(monkeypatch)


@pytest.mark.parametrize(("device", "speed"), [("cpu", 1), ("cuda", 2), ("cuda:1", 2)])
def test_a_phase_has_the_time_between_its_borders(moments, device, speed):
    """By the host's clock on a CPU, by the device's own on CUDA; nothing else is in it, and begin forgets."""
    phases = Phases(NAMES, device)
    for _ in range(2):
        phases.begin()
        phases.turn("ahead")
        moments.pass_s(1)
        phases.turn("behind")
        moments.pass_s(2)
        phases.turn("ahead")
        moments.pass_s(4)
        phases.turn("")
        moments.pass_s(8)
        with phases.within("behind"):
            moments.pass_s(16)
        moments.pass_s(32)
        for _ in range(2):  # reading adds nothing
            assert phases.times_s() == {"ahead": 5 * speed, "behind": 18 * speed}
    phases.begin()
    assert phases.times_s() == {"ahead": 0, "behind": 0}


def test_no_border_waits_for_the_device(moments):
    """Beginning does, so that nothing of before is in the first phase; a border is a stamp, one where phases meet."""
    phases = Phases(NAMES, "cuda")
    phases.begin()
    phases.turn("ahead")
    phases.turn("behind")
    phases.turn("")
    assert moments.asked == ["wait for cuda", "event", "event", "event"]


def test_a_marked_phase_ends_with_the_device(moments):
    """The profiler tells a kernel's phase by the host's clock. Nothing is timed meanwhile."""
    phases = Phases(NAMES, "cuda")
    phases.begin(marked=True)
    moments.asked.clear()
    phases.turn("ahead")
    phases.turn("behind")
    moments.pass_s(1)
    phases.turn("")
    wait = "wait for cuda"
    assert moments.asked == [
        f"enter {MARK}ahead", wait, f"leave {MARK}ahead", f"enter {MARK}behind", wait, f"leave {MARK}behind",
    ]  # fmt: skip
    assert phases.times_s() == {"ahead": 0, "behind": 0}


@pytest.mark.parametrize("marked", [False, True])
def test_an_exception_ends_its_phase_and_is_the_one_that_is_told(moments, marked):
    """Nothing is asked of a device that broke, a mark is closed, and nothing of it is in what comes after."""
    phases = Phases(NAMES, "cuda")
    phases.begin(marked=marked)

    def fail():
        with phases.within("ahead"):
            phases.turn("behind")
            moments.broken = True
            moments.pass_s(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert moments.asked[-1] == (f"leave {MARK}behind" if marked else "event")
    moments.broken = False
    phases.turn("ahead")
    moments.pass_s(2)
    phases.turn("")
    assert phases.times_s() == {"ahead": 0 if marked else 4, "behind": 0}


def test_a_device_that_breaks_at_the_end_of_a_phase_leaves_no_mark(moments):
    """The wait at a border is where a device tells of what went wrong before."""
    phases = Phases(NAMES, "cuda")
    phases.begin(marked=True)

    def fail():
        with phases.within("ahead"):
            moments.broken = True

    with pytest.raises(RuntimeError, match="answers nothing"):
        fail()
    assert moments.asked[-1] == f"leave {MARK}ahead"


@pytest.mark.parametrize("marked", [False, True])
def test_begin_leaves_an_open_phase(moments, marked):
    """What was left open has no time of the next call, whichever kind that is, and its mark does not stay."""
    phases = Phases(NAMES, "cpu")
    phases.begin(marked=marked)
    phases.turn("ahead")
    moments.asked.clear()
    phases.begin(marked=not marked)
    assert moments.asked == [f"leave {MARK}ahead"] * marked + ["wait for cpu"]
    phases.begin()
    moments.pass_s(1)
    phases.turn("behind")
    moments.pass_s(2)
    phases.turn("")
    assert phases.times_s() == {"ahead": 0, "behind": 2}
