"""What is asked of a site on another machine, and what it answers: orders and messages, each one line of JSON.

How lines travel is the scheduler's part (`lorameter.run.sites.ray`, `lorameter.run.sites.slurm`). An order is carried
out when its last message says so. One that fails says why, and a stream that breaks off before either is a place that
is lost: silence is never an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lorameter.errors import UsageError
from lorameter.machine.provenance import MachineFacts
from lorameter.records import codec
from lorameter.records.record import TrialRecord
from lorameter.run.budget import Part
from lorameter.run.device_lock import IfBusy
from lorameter.run.plan_spec import PlanSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Describe:
    """Say what this place is. It comes first."""

    site: str
    """The name that the place has in records and logs."""
    folder: str
    """Where whoever asks was started: relative paths of a study mean the same here, if it is there."""
    share: int = 0
    """Which of several sites on one machine this is."""
    shares: int = 1
    """How many these are: they divide its CPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Let nobody else measure on its devices from now on."""

    if_busy: IfBusy = "wait"
    ranks: int = 1
    """Of a trial: the first of the GPUs there are theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Start workers, make tokens and bases for the trials of a plan."""

    plan: PlanSpec
    left_s: float | None = None
    """Of the time that the run may take; None where it is not limited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Measure a replicate of the plan."""

    trials: tuple[str, ...]
    left_s: float | None = None
    replicates: int = 1
    """How many this place will measure, as far as can be said."""
    afresh: bool = False
    """Whether the time counts anew; else it is that of the replicate before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The answer to `Measure`."""

    trials: tuple[str, ...]
    lacks: tuple[Part, ...] = ()
    """What there was no time for."""


Order = Describe | Hold | Prepare | Measure
ORDERS: Mapping[str, type[Order]] = {one.__name__: one for one in (Describe, Hold, Prepare, Measure)}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDescription:
    """What a place says of itself."""

    facts: MachineFacts
    harness: str
    device_id: str
    machine: str
    """The same for two places on one machine, whose devices may be one."""
    free_bytes: int | None
    boards: tuple[str, ...] = ()
    """UUIDs of the GPUs that it sees, or sees parts of, in its order; empty where one is not told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeMessage:
    """A part of an answer."""

    says: Literal["record", "ended", "phase", "log", "data", "told", "done", "failed"]
    trial: str = ""
    """Whose record, end or phase; the name of the log."""
    text: str = ""
    """The phase, what was printed, what is told, or why it failed."""
    record: TrialRecord | None = None
    answer: dict[str, Any] = field(default_factory=dict)
    """What the order asked for, in the last message."""
    usage: bool = False
    """Whether it failed for what was asked, and would anywhere."""

    @property
    def is_last(self) -> bool:
        """Whether the order has been carried out, or has failed."""
        return self.says in ("done", "failed")


def write_order(order: Order) -> str:
    """One line."""
    return codec.dumps({"do": type(order).__name__, "with": codec.to_json(order)})


def read_order(text: str) -> Order:
    """Raises `UsageError` for what is none."""
    data = _parse(text, "order")
    kind = ORDERS.get(str(data.get("do")))
    if kind is None:
        raise UsageError(f"order {data.get('do')!r}: not known. Install one version of lorameter in all places.")
    return codec.from_json(kind, data.get("with"), f"order {data.get('do')}")


def read_message(text: str) -> NodeMessage:
    """Raises `UsageError` for what is none."""
    return codec.from_json(NodeMessage, _parse(text, "message"), "message")


def _parse(text: str, what: str) -> dict[str, Any]:
    try:
        data = codec.parse(text)
    except codec.NotJsonError as error:
        raise UsageError(f"{what}: no JSON: {error}.") from None
    if not isinstance(data, dict):
        raise UsageError(f"{what}: a table is expected.")
    return data
