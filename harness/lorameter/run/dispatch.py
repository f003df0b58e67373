"""How the processes of a group are asked: one alone, or several at once where nothing is timed.

What a process answers goes into the record of its trial; its death is a row for each trial that it hosted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

from lorameter.records.os_errors import REFUSED, SystemLimitError
from lorameter.records.record import PartialRecord
from lorameter.run.executors import AsyncWorker, Worker, WorkerLostError
from lorameter.run.group_records import GroupRecords
from lorameter.run.parallel import WorkerTasks, walk
from lorameter.run.plan import Slot
from lorameter.studies.command import COMMANDS, ROUNDS

Arguments = Mapping[str, Mapping[str, Any]]
"""Of commands, by their words."""


class PhaseListener(Protocol):
    """Is told what is going on, between turns; must return quickly."""

    def trial_phase(self, slot: Slot, phase: str) -> None:
        """A trial enters a phase."""


class Dispatcher:
    """Asks the workers of a group's trials."""

    def __init__(
        self, sheet: GroupRecords, watcher: PhaseListener, clock: Callable[[], float], *, lanes: int, timeout_s: float
    ) -> None:
        """`lanes` are the processes that may be at work at once where nothing is timed."""
        self.workers: dict[str, Worker] = {}
        """By the trials that they host."""
        self._sheet, self._watcher, self._clock = sheet, watcher, clock
        self._lanes, self._timeout_s = lanes, timeout_s
        self.first: frozenset[str] = frozenset()
        """Trials that have more to do than others like them, and are begun first."""
        self.own: dict[tuple[str, str], Mapping[str, Any]] = {}
        """Arguments that a command has for one trial alone, by trial and word."""
        self._busy_s: dict[str, float] = {}
        """What untimed commands have taken of each trial: the longest of the others comes next."""

    def ask(self, trial: str, command: str, **arguments: Any) -> None:
        """Have one trial carry out a command, and nothing else be done meanwhile."""
        if not self._sheet.is_ok(trial):
            return
        if COMMANDS[command].by == "trial":
            self._watcher.trial_phase(self._sheet.slots[trial], command)
        worker = self.workers[trial]
        turn = arguments["steps"] if COMMANDS[command] is ROUNDS["steps"] else None
        self._take(trial, lambda: worker.ask(command, trial, self._timeout_s, **arguments), turn=turn)

    def each(self, words: Sequence[str], arguments: Arguments) -> dict[str, float]:
        """Commands of all trials that are there for them, none of them timed: on as many cores as are idle, those of
        one trial in their order. Returns the seconds that went to each, of those that all took together."""
        busy, begin = dict.fromkeys(words, 0.0), self._clock()
        if self._lanes == 1:
            for word in words:
                for trial in self._sheet.live(COMMANDS[word].measure):
                    since = self._clock()
                    self.ask(trial, word, **arguments.get(word, {}), **self.own.get((trial, word), {}))
                    busy[word] += self._clock() - since
                self._sheet.checkpoint(word)
        elif words:
            self._side_by_side(words, arguments, busy)
            self._sheet.checkpoint(words[-1])
        together = sum(busy.values())
        share = (self._clock() - begin) / together if together else 0.0
        return {word: seconds * share for word, seconds in busy.items()}

    def _side_by_side(self, words: Sequence[str], arguments: Arguments, busy: dict[str, float]) -> None:
        hosted: dict[int, list[str]] = {}
        for trial in self._sheet.live():
            hosted.setdefault(id(self.workers[trial]), []).append(trial)
        begun: dict[str, float] = {}

        def begin(errand: WorkerTasks, word: str, trial: str) -> bool:
            measure, slot = COMMANDS[word].measure, self._sheet.slots[trial]
            if not self._sheet.is_ok(trial) or (measure is not None and measure not in slot.measures):
                return False
            self._watcher.trial_phase(slot, word)
            begun[trial] = self._clock()
            own = self.own.get((trial, word), {})
            cast(AsyncWorker, errand.worker).send(word, trial, **arguments.get(word, {}), **own)
            return True

        def end(errand: WorkerTasks, word: str, trial: str) -> None:
            worker = cast(AsyncWorker, errand.worker)
            self._take(trial, lambda: worker.receive(word, self._timeout_s))
            seconds = self._clock() - begun[trial]
            busy[word] += seconds
            self._busy_s[trial] = self._busy_s.get(trial, 0.0) + seconds

        errands = [
            WorkerTasks(self.workers[trials[0]], deque((word, trial) for word in words for trial in trials))
            for trials in hosted.values()
        ]

        def order(errand: WorkerTasks) -> tuple[bool, float]:
            trials = hosted[id(errand.worker)]
            return self.first.isdisjoint(trials), -sum(self._busy_s.get(trial, 0.0) for trial in trials)

        errands.sort(key=order)
        walk(errands, lanes=self._lanes, begin=begin, end=end, timeout_s=self._timeout_s)

    def _take(self, trial: str, answer: Callable[[], PartialRecord], turn: int | None = None) -> None:
        try:
            fragment = answer()
        except WorkerLostError as lost:
            worker = self.workers[trial]
            for other, host in self.workers.items():
                if host is worker and self._sheet.is_ok(other):
                    self._sheet.add(other, PartialRecord().failed(lost.status, lost.failure))
            return
        self._sheet.add(trial, fragment, turn=turn)
        raise_refused(trial, fragment)


def raise_refused(trial: str, fragment: PartialRecord) -> None:
    """What the system refuses to this trial it would refuse to the next ones, and none of them is to blame."""
    if fragment.failure is not None and fragment.failure.kind == REFUSED:
        raise SystemLimitError(f"{trial} in {fragment.failure.phase}: {fragment.failure.message}")
