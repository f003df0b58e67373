"""What sites of one machine cost each other, by an A/A: the first measures alone, and the same while others measure.

A run with sites and one without, at different times, would not say it: a machine differs from itself by more than
neighbours cost. So both are measured in each of several rounds, in an order that is shuffled, and compared within it.
The neighbours train the same, as often as it takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import queue
import random
import threading
from collections.abc import Callable, Sequence

from harness.records.beside import ALONE, BESIDE, name_trial
from harness.records.record import TrialRecord
from harness.run.budget import Budget
from harness.run.plan import Group, Plan, Slot
from harness.run.sites.spread import JOIN_S, Station

ROUNDS = 6
"""Pairs; each takes as long as two trials of a replicate."""
NEIGHBOUR = "neighbour"


def measure_beside(
    plan: Plan, stations: Sequence[Station], save: Callable[[TrialRecord], None], rounds: int = ROUNDS
) -> None:
    """Have the first station measure the plan's reference alone and beside the others; its records are saved.

    Raises:
        InvalidRunError: a station is lost.
        KeyboardInterrupt: the user ended it; so is what is under way.
    """
    first, *others = stations
    drawn = random.Random(plan.study.protocol.seed)
    for number in range(rounds):
        for how in drawn.sample((ALONE, BESIDE), 2):
            _measure(plan, first, others if how == BESIDE else (), how, number, save)


def _measure(
    plan: Plan,
    first: Station,
    neighbours: Sequence[Station],
    how: str,
    number: int,
    save: Callable[[TrialRecord], None],
) -> None:
    told: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    ended = threading.Event()

    def keep(record: TrialRecord) -> None:
        save(record.replaced(site=first.name))

    def measure() -> None:
        part = _part(plan, name_trial(how, number, first.name))
        first.measure(part, save=keep, watcher=_Deaf(), budget=Budget())

    def accompany(station: Station) -> None:
        for again in itertools.count():
            if ended.is_set():
                return
            part = _part(plan, f"{name_trial(NEIGHBOUR, number, station.name)}-{again}")
            station.measure(part, save=lambda record: None, watcher=_Deaf(), budget=Budget())

    def run(work: Callable[[], None], *, tells: bool) -> None:
        try:
            work()
        except BaseException as error:  # is raised where it is waited for
            told.put(error)
        else:
            if tells:
                told.put(None)

    works = [(measure, True), *((lambda station=station: accompany(station), False) for station in neighbours)]
    threads = [
        threading.Thread(target=run, args=(work,), kwargs={"tells": tells}, daemon=True) for work, tells in works
    ]
    for thread in threads:
        thread.start()
    try:
        error = told.get()
        if error is not None:
            raise error
    except BaseException:
        for station in (first, *neighbours):
            with contextlib.suppress(Exception):  # its thread may be about to end by itself
                station.end()
        raise
    finally:
        ended.set()
        for thread in threads:
            thread.join(JOIN_S)


def _part(plan: Plan, trial: str) -> Plan:
    """A plan of one trial of the reference, by this name."""
    slot = next(slot for slot in plan.slots if slot.role == "control" and "steps" in slot.measures)
    alone = dataclasses.replace(slot, trial=trial, interleaving="replicates", measures=("steps",), instrument="spy")
    turns = ((trial,),) * plan.study.protocol.turns
    return dataclasses.replace(plan, groups=(Group(replicate=slot.replicate, launches=((alone,),), turns=turns),))


class _Deaf:
    """A watcher that shows nothing: these are no trials of the plan."""

    def trial_phase(self, slot: Slot, phase: str) -> None:
        """As the watcher's."""

    def trial_ended(self, record: TrialRecord) -> None:
        """As the watcher's."""
