"""Replicates on several sites at once, with fakes at the seam: whole replicates are spread, and none is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time

import pytest

from harness.errors import InvalidRunError
from harness.records.record import Failure, Fragment, Notice
from harness.run.budget import Budget, TooShortError
from harness.run.executors import Place, WorkerLostError
from harness.run.plan import make_plan
from harness.run.runner import run_plan
from harness.run.site import Site
from harness.run.sites import local
from harness.run.sites import spread as spreading
from harness.run.sites.local import LocalStation
from harness.run.sites.spread import REFUSED, run_spread

PEAKS = frozenset({"peaks"})
SITE = Site(device="cpu", threads=1, tokens_path="t", tokens={"hash": "h"})


def wait_for(condition):
    """Until it holds, 30 s at most."""
    deadline = time.monotonic() + 240
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)


class Fake:
    """An executor and its worker; `meet` is waited for before a trial is built, `lost_at` is the launch that fails."""

    start_latency_s = 0.01

    def __init__(self, *, step_time_s=0.5, meet=None, lost_at=None, blocks=False):
        self.step_time_s, self.meet, self.lost_at, self.blocks = step_time_s, meet, lost_at, blocks
        self.launches = 0
        self.closed = threading.Event()

    def make_place(self, trial, log):
        return Place(scratch=trial, log_path=log)

    def clear_place(self, trial):
        pass

    def launch(self):
        self.launches += 1
        if self.launches == self.lost_at:
            raise InvalidRunError("its zygote is gone")
        return self

    def ask(self, command, trial, timeout_s, **arguments):
        if command == "build" and self.meet is not None:
            self.meet.wait(30)
        if command == "turn" and self.blocks:
            assert self.closed.wait(30)
            raise WorkerLostError("crashed", Failure(phase="turn", kind="ProcessDied", message="killed"))
        samples = {"step_time_s": (self.step_time_s,) * arguments["steps"]} if command == "turn" else {}
        return Fragment(samples=samples)

    def close(self):
        """Of the worker after each trial; of the executor where a run is broken off."""
        if self.blocks:
            self.closed.set()


class Quiet:
    """A watcher that notes what has ended."""

    def __init__(self):
        self.ended = []

    def trial_phase(self, slot, phase):
        pass

    def trial_ended(self, record):
        self.ended.append(record.trial)


@pytest.fixture
def plan(small_study):
    """Six replicates of two variants and a control, training only."""
    protocol = dataclasses.replace(small_study.protocol, replicates=6)
    return make_plan(dataclasses.replace(small_study, protocol=protocol), phases=("train",))


def spread(plan, fakes, **options):
    saved, watcher = [], Quiet()
    stations = [LocalStation(name=name, executors={"": fake}, site=SITE) for name, fake in fakes.items()]
    options = {"save": saved.append, "watcher": watcher} | options
    measured = run_spread(plan, stations, **options)
    return measured, saved, watcher


def test_each_replicate_is_whole_on_one_site(plan):
    """All trials are measured once, in the plan's order, each replicate on one site and both sites at once."""
    together = threading.Barrier(2)

    class Meeting(Fake):
        def ask(self, command, trial, timeout_s, **arguments):
            if command == "build" and self.launches == 1:
                together.wait(30)  # a site that waited for the other to end would wait for ever
            return super().ask(command, trial, timeout_s, **arguments)

    measured, saved, watcher = spread(plan, {"a": Meeting(), "b": Meeting()})
    assert [record.trial for record in measured.records] == [slot.trial for slot in plan.slots]
    assert {record.status for record in measured.records} == {"ok"}
    sites = {}
    for record in measured.records:
        sites.setdefault(record.replicate, set()).add(record.site)
    assert all(len(of_one) == 1 for of_one in sites.values())
    assert set.union(*sites.values()) == {"a", "b"}
    assert (
        sorted(record.trial for record in saved) == sorted(watcher.ended) == sorted(slot.trial for slot in plan.slots)
    )


def test_a_lost_site_loses_only_the_replicate_under_way_and_another_measures_it(plan):
    """A notice names the site and why; nothing is missing."""
    lossy = Fake(lost_at=2)

    class Waiting(Fake):
        def launch(self):
            wait_for(lambda: lossy.launches == 2)
            return super().launch()

    measured, saved, _ = spread(plan, {"a": Waiting(), "b": lossy})
    assert {(record.status, record.site) for record in measured.records} == {("ok", "a")}
    assert len(measured.records) == len(plan.slots)
    assert "b" in {record.site for record in saved}  # what it had of its replicate is measured again
    (notice,) = measured.notices
    assert notice.code == "site-lost"
    assert "site b was lost: its zygote is gone" in notice.message


def test_what_replicates_had_no_time_for_is_known_of_all_sites(plan, monkeypatch):
    """Wherever they were measured."""

    def run(part, *arguments, **options):
        return dataclasses.replace(run_plan(part, *arguments, **options), left_out={part.groups[0].replicate: PEAKS})

    monkeypatch.setattr(local, "run_plan", run)
    measured, _, _ = spread(plan, {"a": Fake(), "b": Fake()})
    assert measured.left_out == dict.fromkeys(range(6), PEAKS)


def test_a_site_that_is_too_slow_for_its_minutes_is_lost_and_others_are_not(plan, monkeypatch):
    """They measure its replicates, and what was measured is kept; with none left the run ends by its words."""

    begun = threading.Event()

    def run(part, executors, *arguments, **options):
        if executors[""] is slow:
            begun.set()
            raise TooShortError("max_minutes = 1: not even one replicate fits")
        assert begun.wait(30)
        return run_plan(part, executors, *arguments, **options)

    slow = Fake()
    monkeypatch.setattr(local, "run_plan", run)
    measured, _, _ = spread(plan, {"a": Fake(), "slow": slow})
    assert {(record.status, record.site) for record in measured.records} == {("ok", "a")}
    assert len(measured.records) == len(plan.slots)
    (notice,) = measured.notices
    assert "site slow was lost: max_minutes = 1: not even one replicate fits" in notice.message
    with pytest.raises(InvalidRunError, match="site slow: max_minutes = 1: not even one"):
        spread(plan, {"slow": slow})


def test_no_replicate_is_begun_on_an_idle_site_where_the_time_is_over(plan, monkeypatch):
    """It would be too slow for what is left of the minutes, and with it lost the whole run."""
    idle, asked = threading.Event(), []

    class Late(Fake):
        def launch(self):
            assert idle.wait(30)
            raise InvalidRunError("its zygote is gone")

    def find_next(shared, station, following=spreading._next):
        groups = following(shared, station)
        if groups is None:
            idle.set()
        return groups

    def stop(records):
        asked.append(len(records))
        return "another replicate would end after the limit" if idle.is_set() else None

    monkeypatch.setattr(spreading, "_next", find_next)
    measured, _, _ = spread(plan, {"a": Late(), "b": Fake()}, stop=stop)
    assert measured.stopped == "another replicate would end after the limit"
    assert {record.site for record in measured.records if record.status == "ok"} == {"b"}
    assert {record.status for record in measured.records} == {"ok", "not_run"}
    assert [notice.code for notice in measured.notices] == ["site-lost"]


@pytest.mark.parametrize("heard_first", ["the loss", "the end"])
def test_a_replicate_that_is_lost_last_goes_to_a_site_that_had_nothing_left_to_do(plan, monkeypatch, heard_first):
    """A site that has found nothing is begun again for it, whether its end is heard after the loss of the other or
    before."""
    begun, found_nothing, lost, ended = (threading.Event() for _ in range(4))
    following, telling, hearing, heard = spreading._next, spreading._lost, spreading._hear, []

    def find_next(shared, station):
        groups = following(shared, station)
        if groups is None and station.name == "a":
            found_nothing.set()
            if heard_first == "the loss":
                lost.wait(30)  # it says that it has ended only then
        return groups

    def tell_loss(*arguments, **options):
        lost.set()
        return telling(*arguments, **options)

    def hear(*arguments):
        if heard:
            ended.set()  # what was heard before has been dealt with
        heard.append(hearing(*arguments))
        return heard[-1]

    class Quick(Fake):
        def launch(self):
            begun.wait(30)  # else it could take the other's as well
            return super().launch()

    class Late(Fake):
        def launch(self):
            begun.set()
            (found_nothing if heard_first == "the loss" else ended).wait(30)
            return super().launch()

    for name, change in (("_next", find_next), ("_lost", tell_loss), ("_hear", hear)):
        monkeypatch.setattr(spreading, name, change)
    measured, _, _ = spread(plan, {"a": Quick(), "b": Late(lost_at=1)})
    assert [station.name for station, _ in heard[:2]] == (["b", "a"] if heard_first == "the loss" else ["a", "b"])
    assert {(record.status, record.site) for record in measured.records} == {("ok", "a")}
    assert len(measured.records) == len(plan.slots)


def test_where_all_sites_are_lost_the_run_ends_by_the_reason(plan):
    """What was measured is kept, and the rest has a record that says that it was not run."""
    saved = []
    with pytest.raises(InvalidRunError, match="its zygote is gone"):
        spread(plan, {"a": Fake(lost_at=4), "b": Fake(lost_at=4)}, save=saved.append)
    last = {record.trial: record.status for record in saved}
    assert set(last) == {slot.trial for slot in plan.slots}
    assert list(last.values()).count("ok") == 6
    assert {"not_run", "interrupted"} >= set(last.values()) - {"ok"}


def test_where_the_one_that_came_was_refused_the_reason_says_so(plan, monkeypatch):
    """It might have gone on."""

    class Refused:
        notices = (Notice(code=REFUSED, message="site n1 came and takes no part: it is unlike.", remedy=""),)

        def looking(self, add):
            return contextlib.nullcontext()

        def is_expected(self):
            return False

        def lost(self, name):
            pass

    monkeypatch.setattr("harness.run.sites.spread.ASK_S", 0.01)
    with pytest.raises(InvalidRunError, match=r"its zygote is gone\. site n1 came and takes no part: it is unlike"):
        spread(plan, {"a": Fake(lost_at=4)}, joining=Refused())


def test_a_reason_to_stop_ends_after_the_replicates_under_way(plan):
    """Records of whole replicates only."""
    measured, _, _ = spread(plan, {"a": Fake(), "b": Fake()}, stop=lambda records: "enough" if records else None)
    assert measured.stopped == "enough"
    replicates = [record.replicate for record in measured.records]
    assert 1 <= len(set(replicates)) <= 3
    assert all(replicates.count(one) == 3 for one in set(replicates))


def test_the_user_ends_what_is_under_way_everywhere(plan):
    """Trials whose processes were killed for it are interrupted, and crashed is none of them."""

    blocked = Fake(blocks=True)

    class Waiting(Fake):
        def launch(self):
            wait_for(lambda: blocked.launches)
            return super().launch()

    class Told:
        """Somebody who ends the run as soon as the site that blocks is at work."""

        @contextlib.contextmanager
        def interruptible(self):
            wait_for(lambda: blocked.launches)
            raise KeyboardInterrupt
            yield

    measured, _, _ = spread(plan, {"a": Waiting(), "b": blocked}, stops=Told())
    assert measured.interrupted
    states = {record.status for record in measured.records}
    assert "interrupted" in states
    assert "crashed" not in states
    assert len(measured.records) == len(plan.slots)
    assert {record.site for record in measured.records if record.status == "interrupted"} == {"b"}


def test_what_is_no_sites_fault_ends_the_run(plan):
    """A record that cannot be saved is raised, as from one site."""

    def save(record):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        spread(plan, {"a": Fake(), "b": Fake()}, save=save)


@pytest.mark.parametrize("limit_s", [None, 3600.0])
def test_a_run_with_and_without_a_limit_of_time_is_measured_whole(plan, limit_s):
    """Without one no site has any, either."""
    measured, _, _ = spread(plan, {"a": Fake(), "b": Fake()}, budget=Budget(limit_s, replicates=6))
    assert [record.status for record in measured.records] == ["ok"] * len(plan.slots)


class Clock(threading.local):
    """Each site's own, which its fakes advance."""

    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_a_straggler_is_cut_by_the_budget_and_the_others_are_not(plan, monkeypatch):
    """A third of 300 s holds three rounds of a site whose rounds take 30 s: all its trials have as many turns. The
    other has all of its turns."""
    clock, begun, nothing_left, following = Clock(), threading.Event(), threading.Event(), spreading._next
    protocol = dataclasses.replace(plan.study.protocol, turns=6)
    study = dataclasses.replace(plan.study, protocol=protocol)
    plan = make_plan(study, phases=("train",), interleaving="lockstep")

    class Timed(Fake):
        def launch(self):
            if self is slow:
                begun.set()
                nothing_left.wait(30)  # so that it measures one replicate
            begun.wait(30)
            return super().launch()

        def ask(self, command, trial, timeout_s, **arguments):
            clock.now_s += self.step_time_s * arguments["steps"] if command == "turn" else 0.0
            return super().ask(command, trial, timeout_s, **arguments)

    def find_next(shared, station):
        groups = following(shared, station)
        if groups is None:
            nothing_left.set()
        return groups

    monkeypatch.setattr(spreading, "_next", find_next)
    slow, quick = Timed(step_time_s=5.0), Timed()
    measured, _, _ = spread(plan, {"slow": slow, "quick": quick}, budget=Budget(300.0, replicates=6, clock=clock))
    assert {record.status for record in measured.records} == {"ok"}
    turns = {}
    for record in measured.records:
        if not record.trial.endswith("-solo"):
            turns.setdefault(record.site, []).append(len(record.turn_lengths))
    assert turns == {"slow": [3] * 3, "quick": [6] * 15}


def test_what_earlier_records_settle_is_not_measured_again(plan):
    """A run that broke off is gone on with on any sites."""
    first, _, _ = spread(plan, {"a": Fake()}, stop=lambda records: "enough")
    fakes = {"b": Fake(), "c": Fake()}
    measured, saved, _ = spread(plan, fakes, earlier=first.records)
    assert len(measured.records) == len(plan.slots)
    assert len(saved) == len(plan.slots) - len(first.records)
    assert {record.site for record in measured.records} >= {"a"}
