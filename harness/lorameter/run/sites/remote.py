"""Sites on other machines, as whoever asks them sees them: orders go out, and records come back over a link.

A link is what a scheduler gives: lines to a post and lines from it (`lorameter.run.sites.messages`). Whatever becomes
of it, a node that is killed or an answer that cannot be read, the site is lost, and what it had not ended is measured
elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lorameter.errors import InvalidRunError, UsageError, redact, said_by
from lorameter.machine.hardware_class import say_kind
from lorameter.machine.provenance import MachineFacts
from lorameter.records import codec
from lorameter.records.record import TrialRecord
from lorameter.run.budget import Budget, Part
from lorameter.run.device_lock import IfBusy
from lorameter.run.group_runner import ProgressListener
from lorameter.run.plan import Plan
from lorameter.run.plan_spec import PlanSpec
from lorameter.run.prepare import Ready
from lorameter.run.sites.messages import (
    Describe,
    Done,
    Hold,
    Measure,
    NodeDescription,
    NodeMessage,
    Order,
    Prepare,
    read_message,
    write_order,
)

T = TypeVar("T")


class Link(Protocol):
    """The way to one post."""

    def ask(self, order: str) -> Iterator[str]:
        """The messages of the answer as they come. May raise anything where the post is gone."""

    def end(self) -> None:
        """Have the post end what is under way; it still answers. Never raises."""

    def close(self) -> None:
        """End the post. Never raises."""


class RemoteNode:
    """Implements `Station` by a post behind a link. `share` and `shares` divide the CPUs of a machine with several."""

    def __init__(self, name: str, link: Link, *, share: int = 0, shares: int = 1) -> None:
        self.name, self.shares = name, shares
        self._link = link
        self._order = Describe(site=name, folder=str(Path.cwd()), share=share, shares=shares)
        self._description: NodeDescription | None = None
        self._logs: Path | None = None
        self._budget: Budget | None = None

    @property
    def description(self) -> NodeDescription:
        """What it says of itself; it is asked once. Raises `InvalidRunError` where it does not answer."""
        if self._description is None:
            answer = self._ask(self._order)
            self._description = self._read(NodeDescription, answer, "what it says of itself")
        return self._description

    @property
    def facts(self) -> MachineFacts:
        """Of its machine."""
        return self.description.facts

    @property
    def machine(self) -> str:
        """The kind of it, for a reader."""
        return say_kind(self.facts.machine)

    def hold(self, if_busy: IfBusy, tell: Callable[[str], object], *, ranks: int = 1) -> bool:
        """Let nobody else measure there until the post ends, on a GPU for each of the `ranks` of a trial; says whether
        it had to wait for somebody."""
        answer = self._ask(Hold(if_busy=if_busy, ranks=ranks), lambda message: tell(f"{self.name}: {message.text}"))
        if waited := bool(answer.get("waited")):
            self._description = None  # of its free memory
        return waited

    def prepare(self, plan: PlanSpec, folder: Path, left_s: float, hear: Callable[[NodeMessage], object]) -> Ready:
        """Have the trials of a plan prepared there; logs are written into the `folder` of the run.

        Raises:
            UsageError: what the study asks for cannot be done.
            InvalidRunError: this place cannot do it.
        """
        self._logs = folder / "logs"
        answer = self._ask(Prepare(plan=plan, left_s=_finite(left_s)), hear)
        return self._read(Ready, answer, "what it has prepared")

    def measure(
        self, part: Plan, *, save: Callable[[TrialRecord], None], watcher: ProgressListener, budget: Budget
    ) -> frozenset[Part]:
        """Send the replicate, and save its records as they come."""
        slots = {slot.trial: slot for slot in part.slots}
        last: dict[str, TrialRecord] = {}
        missing = set(slots)

        def hear(message: NodeMessage) -> None:
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
            done = self._read(Done, self._ask(order, hear), "what it has measured")
            missing &= set(done.trials)
            if missing:
                raise InvalidRunError(f"it says that it has ended and left out {', '.join(sorted(missing))}")
            return frozenset(done.lacks)
        except InvalidRunError:
            self.end()  # what is not believed must not go on
            raise

    def end(self) -> None:
        """The post kills what it measures, and sends what there is of it."""
        self._link.end()

    def close(self) -> None:
        """End the post."""
        self._link.close()

    def _ask(self, order: Order, hear: Callable[[NodeMessage], object] = lambda message: None) -> dict[str, Any]:
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

    def _write_log(self, message: NodeMessage) -> None:
        if self._logs is not None:
            self._logs.mkdir(parents=True, exist_ok=True)
            with (self._logs / f"{Path(message.trial).name}.log").open("a", encoding="utf-8") as file:
                file.write(redact(message.text))


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None
