"""The sides of an A/B on other machines: each node puts them up for itself, from a word that means the same there.

An interpreter is named by its path, which every node must see, and requirements are built by each node in its own
cache. A revision is a worktree of a repository that whoever starts an A/B stands in. Put up by several nodes in one
repository on a shared disk, each would take the others' worktrees for abandoned, so it is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorameter.errors import InvalidRunError, UsageError, redact
from lorameter.machine.provenance import MachineFacts
from lorameter.records.record import Side
from lorameter.run.executors.environments import parse_requirements
from lorameter.run.executors.host import Host
from lorameter.run.executors.sides import DECLARED, OpenSide, SideKind, name_side
from lorameter.run.plan_spec import SideSpec
from lorameter.verdicts.comparison_input import differences


def write_sides(specs: Mapping[Side, str], repository: Path, asked: str) -> tuple[SideSpec, ...]:
    """What the nodes are told of the sides; `asked` says where that is, for messages.

    Raises:
        UsageError: a side that is not the same on another machine, or whose word may hold a credential.
    """
    return tuple(_write_side(side, spec, repository, f"{asked}, --{side} {spec}") for side, spec in specs.items())


def _write_side(side: Side, spec: str, repository: Path, where: str) -> SideSpec:
    if redact(spec) != spec:
        raise UsageError(
            f"{where}: it holds what may be a credential, and would be written where other machines read it. Have pip "
            "know it there, by its configuration or a .netrc."
        )
    if spec.startswith(os.sep) and parse_requirements(spec) is None:
        return SideSpec(side=side, kind="interpreter", spec=spec)  # it may be there and not here
    kind, full = name_side(spec, repository)
    if kind == "revision":
        raise UsageError(
            f"{where}: a revision is checked out on this machine only. Build an environment of it where all nodes see "
            "it and name the path of its Python, give requirements, or use --sites of this machine."
        )
    if kind == "interpreter" and os.sep not in spec:
        raise UsageError(f"{where}: it may be another Python on each node. Name its path, such as {full}.")
    return SideSpec(side=side, kind=kind, spec=full)


def open_as(side: SideSpec) -> OpenSide:
    """What whoever starts an A/B knows of a side that others put up; nothing is started in its host."""
    kind: SideKind = side.kind
    label = " ".join(parse_requirements(side.spec) or ()) or side.spec
    return OpenSide(spec=side.spec, kind=kind, host=Host(), label=label, declared=DECLARED[kind])


_OF_A_SIDE = ("python", "libraries", "cuda", "packages")


def check_sides(first: str, ours: Mapping[str, MachineFacts], other: str, theirs: Mapping[str, MachineFacts]) -> None:
    """Raises `InvalidRunError` where a side is another on the other site than on the first."""
    for side in dict.fromkeys((*ours, *theirs)):
        known, found = (_about(sides.get(side)) for sides in (ours, theirs))
        said = _said(known, found)
        if said:
            raise InvalidRunError(f"site {other}: its {side} is another than on {first}: {said}. Make them alike.")


def _about(facts: MachineFacts | None) -> dict[str, Any]:
    host = {} if facts is None else facts.host or {}
    return {name: host.get(name) for name in _OF_A_SIDE}


def _said(known: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    some: Iterable[Any] = differences(known, found)[:3]
    return "; ".join(f"{one.field} is {one.candidate!r} there and {one.base!r} on the first" for one in some)
