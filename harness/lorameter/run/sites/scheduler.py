"""Replicates on several sites at once.

What is spread is the replicate: its variants take turns on one site, so every ratio is within a site, and a site that
is slower than its like is in no ratio. Each site has a thread that waits for its processes, and takes the next
replicate when it has measured one; the records of all go through one lock to one file. How a replicate is measured is
the station's affair: by processes of this machine, or of another that sends the records. A site that is lost loses the
replicate that it was measuring, which another one measures from its beginning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lorameter.errors import InvalidRunError
from lorameter.records.record import Failure, Notice, TrialRecord
from lorameter.run.budget import Budget, Part
from lorameter.run.group_runner import ProgressListener
from lorameter.run.interrupts import InterruptHandler
from lorameter.run.plan import Group, Plan, Slot
from lorameter.run.runner import Measured, Stop, find_unfinished, records_outside
from lorameter.run.sites.node import LateArrivals, Node
from lorameter.run.trial_setup import begin_record


@dataclass(slots=True)
class _Shared:
    """What the threads share; everything in it is read and written under the lock."""

    waiting: deque[tuple[Group, ...]]
    """Replicates that nobody measures yet."""
    ended: dict[str, TrialRecord]
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: bool = False
    """Whether no further replicate is begun."""
    reason: str | None = None
    """Why, where that was asked for."""
    broken_off: bool = False
    """Whether those under way are ended, too."""
    most: int | None = None
    """How many replicates a site may take, where each is to have as many as the others."""
    taken: Counter[int] = field(default_factory=Counter)
    """By site."""
    skipped: frozenset[Part] = frozenset()
    """What there was no time for on some site."""


def run_distributed(
    plan: Plan,
    stations: Sequence[Node],
    *,
    save: Callable[[TrialRecord], None],
    watcher: ProgressListener,
    stop: Stop = lambda records: None,
    budget: Budget | None = None,
    earlier: Sequence[TrialRecord] = (),
    stops: InterruptHandler | None = None,
    joining: LateArrivals | None = None,
) -> Measured:
    """Measure every trial of the plan, as `run_plan` does, replicates on all stations at once.

    `stop` is asked after each replicate; those under way on other sites are measured to their end. What `budget` has
    left is what each site has, for its part of the replicates, which go on beside each other. Those who are `joining`
    take part as soon as they can measure, and are waited for where nobody else is left. Of a study whose sites are
    mixed each has its part of the replicates, however quick it is; the part of one that is lost goes to the others.

    Raises:
        InvalidRunError: all sites were lost, and none will come; the message is that of the last.
        Exception: what is no site's fault (a full disk), after the others have been ended.
    """
    stops = stops or InterruptHandler()
    unsettled = find_unfinished(plan, earlier, whole=True)
    kept = records_outside(unsettled, earlier)
    whole, waiting = budget or Budget(), _by_replicate(unsettled)
    each = math.ceil(len(waiting) / len(stations))
    most = each if plan.study.protocol.mixed else None
    shared = _Shared(waiting=waiting, ended={record.trial: record for record in kept}, most=most)
    told: queue.SimpleQueue[tuple[Node, BaseException]] = queue.SimpleQueue()
    guarded = _Guarded(watcher, shared.lock)
    threads: list[threading.Thread] = []
    at_work, idle, known = set[int](), list[Node](), list[Node]()

    def begin(station: Node) -> None:
        arguments = (plan, station, shared, save, guarded, stop, whole.share(each), told)
        threads.append(threading.Thread(target=_measure, args=arguments, daemon=True))
        at_work.add(id(station))
        threads[-1].start()

    def come(station: Node) -> None:
        known.append(station)
        begin(station)

    for station in stations:
        come(station)
    error, lost = None, list[Notice]()
    with contextlib.ExitStack() as stack:
        if joining is not None:
            stack.enter_context(joining.looking(lambda station: told.put((station, _COME))))
        try:
            while at_work or (joining is not None and shared.waiting and not shared.closing):
                with stops.interruptible():
                    heard = _hear(told, None if at_work else joining)
                if heard is None:
                    break
                station, failed = heard
                at_work.discard(id(station))
                if failed is _DONE:
                    idle.append(station)
                elif failed is _COME:
                    if not _is_over(plan, shared, stop):
                        come(station)
                elif isinstance(failed, InvalidRunError):
                    if joining is not None:
                        joining.lost(station.name)
                    lost.append(_lost(station, failed, len(at_work) + len(idle), waits=joining is not None))
                    error = failed
                    with shared.lock:
                        shared.most = None
                else:
                    raise failed
                if error is not None and idle and shared.waiting and not _is_over(plan, shared, stop):
                    begin(idle.pop())  # it had nothing to do, and now there is something
        except BaseException as broken:
            _break_off(known, threads, shared)
            _give_up(plan, unsettled, shared, save, watcher)
            if not isinstance(broken, KeyboardInterrupt):
                raise
            return Measured(
                records=_in_order(plan, shared.ended),
                interrupted=True,
                notices=_notices(lost, joining),
                skipped=shared.skipped,
            )
    if shared.waiting and error is not None and shared.reason is None:
        _give_up(plan, unsettled, shared, save, watcher)
        raise _last_words(error, joining)
    return Measured(
        records=_in_order(plan, shared.ended),
        stopped=shared.reason,
        notices=_notices(lost, joining),
        skipped=shared.skipped,
    )


REFUSED = "site-refused"
"""Code of the notice of one who came and takes no part."""
ASK_S = 5.0
"""How often those who are joining are asked whether anybody will, where nobody is at work."""
_Heard = tuple[Node, BaseException]


def _hear(told: queue.SimpleQueue[_Heard], joining: LateArrivals | None) -> _Heard | None:
    """What is told next; None where it would be of somebody who is joining, and nobody is."""
    while True:
        with contextlib.suppress(queue.Empty):
            return told.get(timeout=None if joining is None else ASK_S)
        if joining is not None and not joining.is_expected():
            return None


def _last_words(error: InvalidRunError, joining: LateArrivals | None) -> InvalidRunError:
    """Of the last one that was lost, with what became of those who came and were refused, who might have gone on."""
    refused = [] if joining is None else [one.message for one in joining.notices if one.code == REFUSED]
    return InvalidRunError(" ".join((f"{str(error).rstrip('.')}.", *refused))) if refused else error


def _notices(lost: Sequence[Notice], joining: LateArrivals | None) -> tuple[Notice, ...]:
    return (*lost, *(() if joining is None else joining.notices))


class _DoneError(Exception):
    """A thread has nothing left to do."""


_DONE = _DoneError()
_COME = _DoneError()
"""Another one has come that is to have something to do."""


def _measure(
    plan: Plan,
    station: Node,
    shared: _Shared,
    save: Callable[[TrialRecord], None],
    watcher: ProgressListener,
    stop: Stop,
    budget: Budget,
    told: queue.SimpleQueue[tuple[Node, BaseException]],
) -> None:
    """The thread of a station: replicates, one after the other, until there is none or it is lost."""

    def keep(record: TrialRecord) -> None:
        with shared.lock:
            machine = station.machine if plan.study.protocol.mixed else ""
            record = record.replaced(site=station.name, machine=machine)
            if shared.broken_off and record.status == "crashed":  # it was ended by us
                failure = Failure(phase="run", kind="Interrupted", message="stopped by the user")
                record = record.replaced(status="interrupted", failure=failure)
            save(record)
            shared.ended[record.trial] = record

    while (groups := _next(shared, station)) is not None:
        part = dataclasses.replace(plan, groups=groups)
        try:
            skipped = station.measure(part, save=keep, watcher=watcher, budget=budget)
            with shared.lock:
                shared.skipped |= skipped
                if not shared.closing:
                    shared.reason = stop(_in_order(plan, shared.ended))
                    shared.closing = shared.reason is not None
        except BaseException as error:
            if isinstance(error, InvalidRunError):
                with shared.lock:
                    shared.waiting.appendleft(groups)
            told.put((station, error))
            return
    told.put((station, _DONE))


def _is_over(plan: Plan, shared: _Shared, stop: Stop) -> bool:
    """Whether no further replicate is to be begun; asked where one would be that nobody was at work on."""
    with shared.lock:
        if not shared.closing and shared.ended:
            shared.reason = stop(_in_order(plan, shared.ended))
            shared.closing = shared.reason is not None
        return shared.closing


def _next(shared: _Shared, station: Node) -> tuple[Group, ...] | None:
    with shared.lock:
        full = shared.most is not None and shared.taken[id(station)] >= shared.most
        if full or shared.closing or not shared.waiting:
            return None
        shared.taken[id(station)] += 1
        return shared.waiting.popleft()


def _by_replicate(groups: Sequence[Group]) -> deque[tuple[Group, ...]]:
    found: dict[int, list[Group]] = {}
    for group in groups:
        found.setdefault(group.replicate, []).append(group)
    return deque(tuple(of_one) for of_one in found.values())


def _in_order(plan: Plan, ended: Mapping[str, TrialRecord]) -> tuple[TrialRecord, ...]:
    return tuple(ended[slot.trial] for slot in plan.slots if slot.trial in ended)


def _break_off(stations: Sequence[Node], threads: Sequence[threading.Thread], shared: _Shared) -> None:
    """End what is under way: its processes are killed, and each thread finds its worker gone."""
    with shared.lock:
        shared.closing = shared.broken_off = True
    for station in stations:
        with contextlib.suppress(Exception):  # its thread may be about to end by itself
            station.end()
    for thread in threads:
        thread.join(JOIN_S)


JOIN_S = 30.0
"""A thread whose processes are gone ends at once; one that does not must not hold up what was measured."""


def _give_up(
    plan: Plan,
    unsettled: Sequence[Group],
    shared: _Shared,
    save: Callable[[TrialRecord], None],
    watcher: ProgressListener,
) -> None:
    """A record for each trial that has none."""
    with shared.lock:
        left: list[Slot] = [slot for group in unsettled for slot in group.slots if slot.trial not in shared.ended]
        for slot in left:
            record = begin_record(slot, "not_run")
            save(record)
            shared.ended[slot.trial] = record
    for slot in left:
        watcher.trial_ended(shared.ended[slot.trial])


def _lost(station: Node, error: InvalidRunError, left: int, *, waits: bool) -> Notice:
    where = f" The replicate that it was measuring went to another of the {left} that are left."
    if not left:
        where = " Its replicate went to the next one that came, if any did." if waits else ""
    last = "" if left else ", the last one"
    why = str(error).rstrip(".").removeprefix(f"site {station.name}: ")
    return Notice(
        code="site-lost",
        message=f"site {station.name} was lost{last}: {why}.{where}",
        remedy="Look at its log; lorameter run --resume resumes what is missing.",
    )


class _Guarded:
    """A watcher that is told by one thread at a time."""

    def __init__(self, watcher: ProgressListener, lock: threading.Lock) -> None:
        self._watcher, self._lock = watcher, threading.Lock()

    def trial_phase(self, slot: Slot, phase: str) -> None:
        """As the watcher's."""
        with self._lock:
            self._watcher.trial_phase(slot, phase)

    def trial_ended(self, record: TrialRecord) -> None:
        """As the watcher's."""
        with self._lock:
            self._watcher.trial_ended(record)
