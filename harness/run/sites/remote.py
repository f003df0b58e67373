"""Sites on other machines, as whoever asks them sees them: orders go out, and records come back over a link.

A link is what a scheduler gives: lines to a post and lines from it (`harness.run.sites.block`). Whatever happens to it,
a node that is killed or an answer that cannot be read, the site is lost, and what it had not ended is measured
elsewhere.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from harness.errors import InvalidRunError, UsageError, said_by
from harness.machine import provenance
from harness.machine.provenance import Facts
from harness.records import codec
from harness.records.record import Notice, TrialRecord
from harness.run.budget import Budget
from harness.run.conductor import Watcher
from harness.run.device import IfBusy
from harness.run.display import Display
from harness.run.plan import Plan
from harness.run.ready import Ready
from harness.run.sites.block import (
    Describe,
    Description,
    Hold,
    Measure,
    Message,
    Order,
    Prepare,
    read_message,
    write_order,
)
from harness.run.sites.local import check_alike
from harness.run.written import WrittenPlan
from harness.verdicts.comparand import differences

T = TypeVar("T")


class Link(Protocol):
    """The way to one post."""

    def ask(self, order: str) -> Iterator[str]:
        """The messages of the answer as they come. May raise anything where the post is gone."""

    def end(self) -> None:
        """Have the post end what is under way; it still answers. Never raises."""

    def close(self) -> None:
        """End the post. Never raises."""


class RemoteStation:
    """Implements `Station` by a post behind a link. `share` and `shares` divide the CPUs of a machine with several."""

    def __init__(self, name: str, link: Link, *, share: int = 0, shares: int = 1) -> None:
        self.name, self.shares = name, shares
        self._link = link
        self._order = Describe(site=name, folder=str(Path.cwd()), share=share, shares=shares)
        self._description: Description | None = None
        self._logs: Path | None = None
        self._budget: Budget | None = None

    @property
    def description(self) -> Description:
        """What it says of itself; it is asked once. Raises `InvalidRunError` where it does not answer."""
        if self._description is None:
            answer = self._ask(self._order)
            self._description = self._read(Description, answer, "what it says of itself")
        return self._description

    @property
    def facts(self) -> Facts:
        """Of its machine."""
        return self.description.facts

    def hold(self, if_busy: IfBusy, tell: Callable[[str], object]) -> bool:
        """Let nobody else measure there until the post ends; says whether it had to wait for somebody."""
        answer = self._ask(Hold(if_busy=if_busy), lambda message: tell(f"{self.name}: {message.text}"))
        if waited := bool(answer.get("waited")):
            self._description = None  # of its free memory
        return waited

    def prepare(self, plan: WrittenPlan, folder: Path, left_s: float, hear: Callable[[Message], object]) -> Ready:
        """Have the trials of a plan prepared there; logs are written into the `folder` of the run.

        Raises:
            UsageError: what the study asks for cannot be done.
            InvalidRunError: this place cannot do it.
        """
        self._logs = folder / "logs"
        answer = self._ask(Prepare(plan=plan, left_s=_finite(left_s)), hear)
        return self._read(Ready, answer, "what it has prepared")

    def measure(self, part: Plan, *, save: Callable[[TrialRecord], None], watcher: Watcher, budget: Budget) -> None:
        """Send the replicate, and save its records as they come."""
        slots = {slot.trial: slot for slot in part.slots}
        last: dict[str, TrialRecord] = {}
        missing = set(slots)

        def hear(message: Message) -> None:
            slot = slots.get(message.trial)
            if slot is None:
                raise InvalidRunError(f"it speaks of trial {message.trial!r}, for which it was not asked")
            if message.says == "phase":
                watcher.trial_phase(slot, message.text)
            elif message.says == "record" and message.record is not None:
                if (message.record.trial, message.record.variant) != (slot.trial, slot.variant.id):
                    raise InvalidRunError(f"its record of {slot.trial} is of another trial")
                last[slot.trial] = message.record
                save(message.record)
            elif message.says == "ended" and slot.trial in last:
                missing.discard(slot.trial)
                watcher.trial_ended(last[slot.trial])

        left_s, afresh = _finite(budget.left_s), budget is not self._budget
        self._budget = budget
        order = Measure(trials=tuple(slots), left_s=left_s, replicates=budget.replicates, afresh=afresh)
        try:
            self._ask(order, hear)
            if missing:
                raise InvalidRunError(f"it says that it has ended and left out {', '.join(sorted(missing))}")
        except InvalidRunError:
            self.end()  # what is not believed must not go on
            raise

    def end(self) -> None:
        """The post kills what it measures, and sends what there is of it."""
        self._link.end()

    def close(self) -> None:
        """End the post."""
        self._link.close()

    def _ask(self, order: Order, hear: Callable[[Message], object] = lambda message: None) -> dict[str, Any]:
        """The answer to an order; everything else that is said is heard. Raises `InvalidRunError` where none comes."""
        for line in self._lines(write_order(order)):
            try:
                message = read_message(line)
            except UsageError as error:
                raise InvalidRunError(f"its answer cannot be read: {error}") from None
            if message.says == "log":
                self._write_log(message)
            elif message.says == "failed":
                raise (UsageError if message.usage else InvalidRunError)(f"site {self.name}: {message.text}.")
            elif message.says == "done":
                return message.answer
            else:
                hear(message)
        raise InvalidRunError("its answer broke off")

    def _lines(self, order: str) -> Iterator[str]:
        """The link's, whose errors are all one: nobody answers there any more."""
        lines = self._link.ask(order)
        while True:
            try:
                line = next(lines)
            except StopIteration:
                return
            except Exception as error:
                raise InvalidRunError(f"it does not answer any more: {said_by(error)}") from error
            yield line

    def _read(self, cls: type[T], answer: dict[str, Any], what: str) -> T:
        try:
            return codec.from_json(cls, answer, what)
        except UsageError as error:
            raise InvalidRunError(f"site {self.name}: {error}") from None

    def _write_log(self, message: Message) -> None:
        if self._logs is not None:
            self._logs.mkdir(parents=True, exist_ok=True)
            with (self._logs / f"{Path(message.trial).name}.log").open("a", encoding="utf-8") as file:
                file.write(message.text)


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


def describe_all(stations: Sequence[RemoteStation]) -> tuple[Notice, ...]:
    """Ask all what they are; says what is to be known of them together.

    Raises `InvalidRunError` for one that is unlike the first, by its name, with what differs: times of different
    machines are not those of one.
    """
    _at_once(stations, lambda station: station.description)
    for station in stations[1:]:
        check_like(stations[0], station)
    return tuple(_sharing(stations))


def check_like(first: RemoteStation, station: RemoteStation) -> None:
    """Raises `InvalidRunError` for a site that is unlike the first, with what differs."""
    found = differences(_likeness(first.description), _likeness(station.description))
    if found:
        said = "; ".join(f"{one.field} is {one.candidate!r} there and {one.base!r} here" for one in found)
        raise InvalidRunError(
            f"site {station.name} is unlike the first, {first.name}: {said}. Measure it in a run of its own: leave it "
            "out by --sites on Ray, by nodelist, exclude or constraint on SLURM."
        )


def _sharing(stations: Sequence[RemoteStation]) -> Iterator[Notice]:
    """Sites that are not apart. Raises `InvalidRunError` where a card was reserved for each and none is used."""
    for one in _by_device(stations).values():
        names = ", ".join(station.name for station in one)
        if len(one) > 1 and one[0].facts.machine.device == "cpu" and any(station.shares > 1 for station in one):
            raise InvalidRunError(
                f"sites {names}: the cluster has a card for each, and torch there measures on the CPU. Install torch "
                "for CUDA on the node, or start it without its cards."
            )
        if len(one) > 1:
            yield Notice(
                code="sites-together",
                message=f"sites {names} are on one machine and measure on one device at the same time, so they slow "
                "each other down.",
                remedy="Have one site on each machine: by one node of Ray there, by --sites, or by exclusive jobs.",
            )


def _by_device(stations: Iterable[RemoteStation]) -> dict[tuple[str, str], list[RemoteStation]]:
    found: dict[tuple[str, str], list[RemoteStation]] = {}
    for station in stations:
        found.setdefault((station.description.machine, station.description.device_id), []).append(station)
    return found


def free_bytes_of(stations: Sequence[RemoteStation]) -> int | None:
    """Memory that is free on the device of the site that has least of it, where several share one their part; None
    where one cannot say."""
    known: list[int] = []
    for one in _by_device(stations).values():
        for station in one:
            free = station.description.free_bytes
            if free is None:
                return None
            known.append(free // len(one))
    return min(known)


def _likeness(description: Description) -> dict[str, Any]:
    place: dict[str, Any] = codec.to_json(provenance.comparable(provenance.place_of(description.facts)))
    return {"harness": description.harness, **place}


def hold_all(stations: Iterable[RemoteStation], if_busy: IfBusy, tell: Callable[[str], object]) -> bool:
    """Hold each device once, always in the same order; says whether anybody had to be waited for."""
    devices = _by_device(stations)
    waited = [devices[key][0].hold(if_busy, tell) for key in sorted(devices)]
    return any(waited)


def prepare_all(
    stations: Sequence[RemoteStation],
    plan: WrittenPlan,
    rest: Plan,
    folder: Path,
    left_s: float,
    shown: Display,
    *,
    without: list[Notice] | None = None,
) -> tuple[Ready, list[RemoteStation]]:
    """Have a plan prepared in all places at once; what the first says of it is the run's. Returns who can measure as
    well: all, or those who did not fail if what became of the others may be noted in `without`.

    Raises:
        UsageError: what the study asks for cannot be done.
        InvalidRunError: a place that cannot do it, has another program, or makes other tokens of the same data.
    """
    slots = {slot.trial: slot for slot in rest.slots}

    def prepare(station: RemoteStation) -> Ready:
        def hear(message: Message) -> None:
            if station is not stations[0]:  # all do the same
                return
            if message.says == "data":
                shown.tokens_prepared(message.text)
            elif message.says == "phase" and message.trial in slots:
                shown.trial_phase(slots[message.trial], message.text)

        return station.prepare(plan, folder, left_s, hear)

    answers = _at_once(stations, prepare, without)
    (chief, first), *others = ((stations[number], ready) for number, ready in sorted(answers.items()))
    for station, ready in others:
        check_prepared(chief.name, first, station.name, ready)
    return first, [chief, *(station for station, _ in others)]


def check_prepared(first: str, ready: Ready, other: str, found: Ready) -> None:
    """Raises `InvalidRunError` where the other site has another program than the first, or makes other tokens."""
    check_alike(other, ready.hellos.values(), found.hellos.values())
    for ours, theirs in zip(ready.tokens, found.tokens, strict=True):
        if ours.hash != theirs.hash:
            raise InvalidRunError(
                f"site {other} makes other tokens of {ours.data}: their hash is {theirs.hash[:12]} there "
                f"and {ours.hash[:12]} on {first}. Give all nodes the same data and tokenizer."
            )


def those_that_answer(stations: Sequence[RemoteStation], without: list[Notice]) -> list[RemoteStation]:
    """Those that say what they are; of the others it is noted why. Raises `InvalidRunError` where none does."""
    return [stations[number] for number in sorted(_at_once(stations, lambda station: station.description, without))]


def _at_once(
    stations: Sequence[RemoteStation], ask: Callable[[RemoteStation], T], without: list[Notice] | None = None
) -> dict[int, T]:
    """What each says, by its place, all asked at once. Raises what the first of them raises, with its name; of one that
    is lost it is noted in `without`, if that is given and another is left."""
    told: queue.SimpleQueue[tuple[int, T | BaseException]] = queue.SimpleQueue()

    def run(number: int) -> None:
        try:
            told.put((number, ask(stations[number])))
        except BaseException as error:  # is raised where it is waited for
            told.put((number, error))

    for number in range(len(stations)):  # a thread that waits for a post that is gone must not keep us from ending
        threading.Thread(target=run, args=(number,), daemon=True).start()
    answers: dict[int, T] = {}
    for left in reversed(range(len(stations))):
        number, answer = told.get()
        if not isinstance(answer, BaseException):
            answers[number] = answer
        elif without is None or not isinstance(answer, InvalidRunError) or not (answers or left):
            raise _named(stations[number].name, answer)
        else:
            said = f"site {stations[number].name} was lost before it measured: {str(answer).rstrip('.')}."
            remedy = "If its job is requeued, it takes part when it starts."
            without.append(Notice(code="site-lost", message=said, remedy=remedy))
            stations[number].close()
    return answers


def _named(site: str, error: BaseException) -> BaseException:
    if isinstance(error, InvalidRunError) and site not in str(error):
        return InvalidRunError(f"site {site}: {error}.")
    return error
