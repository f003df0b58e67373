"""What several sites on other machines are asked at once: what they are, and whether they are alike; to hold their
devices; to prepare the same.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lorameter.errors import InvalidRunError
from lorameter.machine import provenance
from lorameter.machine.hardware_class import OF_A_KIND
from lorameter.records import codec
from lorameter.records.record import Notice
from lorameter.run.device_lock import IfBusy
from lorameter.run.display import Display
from lorameter.run.plan import Plan
from lorameter.run.plan_spec import PlanSpec
from lorameter.run.prepare import Ready
from lorameter.run.sites.local import check_alike
from lorameter.run.sites.messages import NodeDescription, NodeMessage
from lorameter.run.sites.remote import RemoteNode
from lorameter.run.sites.sides import check_sides
from lorameter.verdicts.comparison_input import differences

T = TypeVar("T")


def describe_all(stations: Sequence[RemoteNode], *, mixed: bool = False, ranks: int = 1) -> tuple[Notice, ...]:
    """Ask all what they are; says what is to be known of them together. The `ranks` of a trial take the first GPUs
    that a site sees.

    Raises `InvalidRunError` for one that is unlike the first, by its name, with what differs: times of different
    machines are not those of one. Where sites are `mixed` the machine may differ, and what is installed may not.
    """
    _at_once(stations, lambda station: station.description)
    for station in stations[1:]:
        check_like(stations[0], station, mixed=mixed)
    return (*_sharing_boards(stations, ranks), *_sharing(stations))


def check_like(first: RemoteNode, station: RemoteNode, *, mixed: bool = False) -> None:
    """Raises `InvalidRunError` for a site that is unlike the first, with what differs; `mixed`: in more than the kind
    of its machine."""
    without = OF_A_KIND if mixed else ()
    found = differences(_likeness(first.description, without), _likeness(station.description, without))
    if found:
        said = "; ".join(f"{one.field} is {one.candidate!r} there and {one.base!r} here" for one in found)
        of_kind = all(one.field in OF_A_KIND for one in found)
        raise InvalidRunError(
            f"site {station.name} is unlike the first, {first.name}: {said}. Measure it in a run of its own: leave it "
            "out by --sites on Ray, by nodelist, exclude or constraint on SLURM"
            f"{', or have each site judged by itself by --mixed' if of_kind else ''}."
        )


def _sharing(stations: Sequence[RemoteNode]) -> Iterator[Notice]:
    """Sites that are not apart. Raises `InvalidRunError` where a GPU was reserved for each and none is used."""
    for one in _by_device(stations).values():
        names = ", ".join(station.name for station in one)
        if len(one) > 1 and one[0].facts.machine.device == "cpu" and any(station.shares > 1 for station in one):
            raise InvalidRunError(
                f"sites {names}: the cluster has a GPU for each, and torch there measures on the CPU. Install torch "
                "for CUDA on the node, or start it without its GPUs."
            )
        if len(one) > 1:
            yield Notice(
                code="nodes-share-device",
                message=f"sites {names} are on one machine and measure on one device at the same time, so they slow "
                "each other down.",
                remedy="Have one site on each machine: by one node of Ray there, by --sites, or by exclusive jobs.",
            )


def _sharing_boards(stations: Sequence[RemoteNode], ranks: int) -> Iterator[Notice]:
    """Of sites that are parts of one GPU."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for station in stations:
        said = station.description
        for board in filter(None, said.boards[:ranks]):
            found.setdefault((said.machine, board), {})[said.device_id] = station.name
    for (_, board), sites in found.items():
        if len(sites) > 1:
            yield Notice(
                code="nodes-share-device",
                message=f"sites {', '.join(sites.values())} are parts of one GPU ({board}), so they slow each other "
                "down.",
                remedy="Have one site on each GPU: name its nodes by --sites, or ask for whole GPUs.",
            )


def _by_device(stations: Iterable[RemoteNode]) -> dict[tuple[str, str], list[RemoteNode]]:
    found: dict[tuple[str, str], list[RemoteNode]] = {}
    for station in stations:
        found.setdefault((station.description.machine, station.description.device_id), []).append(station)
    return found


def free_bytes_of(stations: Sequence[RemoteNode]) -> int | None:
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


def _likeness(description: NodeDescription, without: Sequence[str]) -> dict[str, Any]:
    facts = provenance.fingerprint_fields(provenance.place_of(description.facts), without)
    place: dict[str, Any] = codec.to_json(facts)
    return {"harness": description.harness, **place}


def hold_all(stations: Iterable[RemoteNode], if_busy: IfBusy, tell: Callable[[str], object], *, ranks: int = 1) -> bool:
    """Hold each device once, always in the same order; says whether anybody had to be waited for."""
    devices = _by_device(stations)
    waited = [devices[key][0].hold(if_busy, tell, ranks=ranks) for key in sorted(devices)]
    return any(waited)


def prepare_all(
    stations: Sequence[RemoteNode],
    plan: PlanSpec,
    rest: Plan,
    folder: Path,
    left_s: float,
    shown: Display,
    *,
    without: list[Notice] | None = None,
) -> tuple[Ready, list[RemoteNode]]:
    """Have a plan prepared in all places at once; what the first says of it is the run's. Returns who can measure as
    well: all, or those who did not fail if what became of the others may be noted in `without`.

    Raises:
        UsageError: what the study asks for cannot be done.
        InvalidRunError: a place that cannot do it, has another program, or makes other tokens of the same data.
    """
    slots = {slot.trial: slot for slot in rest.slots}

    def prepare(station: RemoteNode) -> Ready:
        def hear(message: NodeMessage) -> None:
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
    """Raises `InvalidRunError` where the other site has another program than the first, other sides of an A/B, or makes
    other tokens."""
    check_alike(other, ready.hellos.values(), found.hellos.values())
    check_sides(first, ready.sides, other, found.sides)
    for ours, theirs in zip(ready.tokens, found.tokens, strict=True):
        if ours.hash != theirs.hash:
            raise InvalidRunError(
                f"site {other} makes other tokens of {ours.data}: their hash is {theirs.hash[:12]} there "
                f"and {ours.hash[:12]} on {first}. Give all nodes the same data and tokenizer."
            )


def those_that_answer(stations: Sequence[RemoteNode], without: list[Notice]) -> list[RemoteNode]:
    """Those that say what they are; of the others it is noted why. Raises `InvalidRunError` where none does."""
    return [stations[number] for number in sorted(_at_once(stations, lambda station: station.description, without))]


def _at_once(
    stations: Sequence[RemoteNode], ask: Callable[[RemoteNode], T], without: list[Notice] | None = None
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
