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

from lorameter.errors import InvalidRunError
from lorameter.records.interference import ALONE, BESIDE, name_trial
from lorameter.records.record import TrialRecord
from lorameter.run.budget import Budget
from lorameter.run.plan import Group, Plan, Slot
from lorameter.run.sites.node import Node
from lorameter.run.sites.scheduler import JOIN_S

PAIRS = 6
"""Pairs; each takes as long as two trials of a replicate."""
LEAST_PAIRS = 2
"""Fewer have no interval."""
NEIGHBOUR = "neighbour"


def measure_interference(
    plan: Plan,
    stations: Sequence[Node],
    save: Callable[[TrialRecord], None],
    rounds: int = PAIRS,
    budget: Budget | None = None,
) -> None:
    """Have the first station measure the plan's reference alone and beside the others; its records are saved. What the
    `budget` of the run has left is for its trials: a round that would take half of it or more is left out, beyond the
    first two.

    Raises:
        InvalidRunError: a station is lost.
        KeyboardInterrupt: the user ended it; so is what is under way.
    """
    first, *others = stations
    drawn = random.Random(plan.study.protocol.seed)
    budget = budget or Budget()
    for number in range(rounds):
        begin = budget.clock()
        for how in drawn.sample((ALONE, BESIDE), 2):
            _measure(plan, first, others if how == BESIDE else (), how, number, save)
        if number + 1 >= LEAST_PAIRS and budget.clock() - begin > budget.left_s / 2:
            return


def _measure(
    plan: Plan,
    first: Node,
    neighbours: Sequence[Node],
    how: str,
    number: int,
    save: Callable[[TrialRecord], None],
) -> None:
    told: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    ended = threading.Event()

    def keep(record: TrialRecord) -> None:
        save(record.replaced(site=first.name))

    def require_whole(record: TrialRecord) -> None:
        if record.status != "ok":  # beside one that does not train nothing is measured that neighbours cost
            why = f": {record.failure.message}" if record.failure else ""
            raise InvalidRunError(
                f"beside {first.name} the trial {record.trial} was to train and is {record.status}{why}"
            )

    def measure() -> None:
        part = _part(plan, name_trial(how, number, first.name))
        first.measure(part, save=keep, watcher=_Deaf(), budget=Budget())

    def accompany(station: Node) -> None:
        for again in itertools.count():
            if ended.is_set():
                return
            part = _part(plan, f"{name_trial(NEIGHBOUR, number, station.name)}-{again}")
            station.measure(part, save=require_whole, watcher=_Deaf(), budget=Budget())

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
        if error is None:
            ended.set()
            for thread in threads:  # a neighbour comes to the end of its trial, however long: what is next is alone
                thread.join()
            with contextlib.suppress(queue.Empty):
                error = told.get_nowait()
        if error is not None:
            raise error
    except BaseException:
        ended.set()
        for station in (first, *neighbours):
            with contextlib.suppress(Exception):  # its thread may be about to end by itself
                station.end()
        for thread in threads:
            thread.join(JOIN_S)
        raise


def _part(plan: Plan, trial: str) -> Plan:
    """A plan of one trial of the reference, by this name."""
    slot = next(slot for slot in plan.slots if slot.role == "control" and "steps" in slot.measures)
    alone = dataclasses.replace(slot, trial=trial, interleaving="replicates", measures=("steps",))
    turns = ((trial,),) * plan.study.protocol.turns
    return dataclasses.replace(plan, groups=(Group(replicate=slot.replicate, launches=((alone,),), turns=turns),))


class _Deaf:
    """A watcher that shows nothing: these are no trials of the plan."""

    def trial_phase(self, slot: Slot, phase: str) -> None:
        """As the watcher's."""

    def trial_ended(self, record: TrialRecord) -> None:
        """As the watcher's."""
