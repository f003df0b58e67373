"""What sites of one machine cost each other is measured with them: the first alone, and while all others measure."""

from __future__ import annotations

import json
import threading

import pytest

from harness.errors import InvalidRunError
from harness.records import beside
from harness.run.plan import make_plan
from harness.run.site import begin_record
from harness.run.sites.beside import measure_beside
from harness.verdicts import calibrate
from harness.verdicts.beside import cost_of_neighbours


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """A gate's rates are another matter."""
    monkeypatch.setattr(calibrate, "DRAWS", 10)


CALIBRATE = ("--replicates", "6", "--inject-rows", "8", "--json")


@pytest.mark.parametrize(("factor", "verdict"), [(1.05, "regressed"), (1.0, "equivalent")])
def test_a_calibration_on_sites_says_what_neighbours_cost(placed, run, pretended, factor, verdict):
    """By pairs of one round, in its document, on its page, and in a notice of its run."""
    pretended.SLOW[("cpus-0", "beside-")] = factor
    code, last, said = run("calibrate", placed(""), "--sites", "0,1", *CALIBRATE, meeting=2)
    assert code == 0, said
    told = json.JSONDecoder().raw_decode(said[said.index("{") :])[0]["calibration"]["neighbours"]
    assert told["ratio"] == pytest.approx(factor)
    assert (told["verdict"], told["replicates"]) == (verdict, 6)
    (notice,) = (one for one in last.manifest.notices if one.code == "sites-neighbours")
    assert f"a step on the first takes {factor:.2f}" in notice.message
    assert {record.trial for record in last.records} == set(last.manifest.order)
    code, _, said = run("calibrate", "--resume", last.manifest.run)
    assert f"beside neighbours {factor:.2f}" in said


def test_of_one_site_there_is_nothing_to_say(placed, run):
    """Nor is anything measured for it."""
    code, last, said = run("calibrate", placed(""), *CALIBRATE)
    assert code == 0, said
    assert json.JSONDecoder().raw_decode(said[said.index("{") :])[0]["calibration"]["neighbours"] is None
    assert not (last.path / beside.FILE).exists()


class At:
    """A station; `active` are the neighbours that measure, `come` says that one does."""

    active, come, lock = 0, threading.Event(), threading.Lock()

    def __init__(self, name, *, lost=False):
        self.name, self.machine, self.lost = name, "", lost
        self.trials, self.ended = [], threading.Event()

    def measure(self, part, *, save, watcher, budget):
        (slot,) = part.slots
        self.trials.append(slot.trial)
        if slot.trial.startswith("neighbour-"):
            if self.lost:
                raise InvalidRunError("it is gone")
            with At.lock:
                At.active += 1
            At.come.set()
            self.ended.wait(0.01)
            with At.lock:
                At.active -= 1
        elif slot.trial.startswith("beside-"):
            At.come.clear()
            while not (At.come.wait(0.01) or self.ended.is_set()):
                pass
        else:
            assert At.active == 0
        save(begin_record(slot, "ok").replaced(samples={"step_time_s": (0.1,)}))

    def end(self):
        self.ended.set()


def test_the_others_measure_beside_and_are_silent_while_it_measures_alone(small_study, tmp_path):
    """As often as it takes; in each round once, in an order that is drawn."""
    stations = [At("a"), At("b"), At("c")]
    measure_beside(make_plan(small_study, phases=("train",)), stations, lambda one: beside.append(tmp_path, one), 5)
    first = stations[0].trials
    assert sorted(first) == sorted(f"{how}-{number}-a" for how in ("alone", "beside") for number in range(5))
    assert len({tuple(one.partition("-")[0] for one in first[at : at + 2]) for at in range(0, 10, 2)}) == 2
    assert all(one.startswith("neighbour-") for station in stations[1:] for one in station.trials)
    assert all({one.split("-")[1] for one in station.trials} == set("01234") for station in stations[1:])
    assert cost_of_neighbours(tmp_path).ratio == pytest.approx(1.0)


def test_a_neighbour_that_is_lost_ends_it(small_study):
    """And what is under way beside it."""
    first, lost = At("a"), At("b", lost=True)
    with pytest.raises(InvalidRunError, match="it is gone"):
        measure_beside(make_plan(small_study, phases=("train",)), [first, lost], lambda record: None)
    assert first.ended.is_set()


def test_a_round_that_is_half_or_cannot_be_read_is_left_out(small_study, tmp_path):
    """Of one whose trial failed, or whose line a crash cut short."""
    slot = make_plan(small_study, phases=("train",)).slots[0]

    def keep(trial, status="ok", step_time_s=0.1):
        record = begin_record(slot, status).replaced(trial=trial, samples={"step_time_s": (step_time_s,)})
        beside.append(tmp_path, record)

    assert cost_of_neighbours(tmp_path) is None
    for number in range(3):
        keep(f"alone-{number}-a")
        keep(f"beside-{number}-a", "ok" if number else "crashed", 0.2)
    with (tmp_path / beside.FILE).open("a") as file:
        file.write('{"trial": "alone-3-a"')
    found = cost_of_neighbours(tmp_path)
    assert (found.replicates, found.ratio) == (2, pytest.approx(2.0))
