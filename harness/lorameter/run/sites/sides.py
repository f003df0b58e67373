"""The sides of an A/B that is measured in jobs: each job opens them for itself, from a word that means the same there.

An interpreter is named by its path, a revision by its commit, and requirements are installed by each node into its own
cache. On other machines a revision is refused: worktrees that several nodes make in one repository on a shared disk
look abandoned to each other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lorameter.errors import UsageError, redact
from lorameter.records.record import Side
from lorameter.run.workers.environment import Host, parse_requirements
from lorameter.run.workers.sides import DECLARED, OpenSide, SideKind, name_side


def write_sides(
    specs: Mapping[Side, str], repository: Path, asked: str, *, local: bool = False
) -> dict[Side, OpenSide]:
    """The sides as a job opens them; nothing is opened here.

    Args:
        specs: a revision, an interpreter or requirements, by side.
        repository: a folder in the repository whose revisions are meant.
        asked: where the jobs run, for messages.
        local: whether they run on this machine.

    Raises:
        UsageError: a side that is another one on another machine, or whose word may hold a credential.
    """
    return {
        side: _write_side(spec, repository, f"{asked}, --{side} {spec}", local=local) for side, spec in specs.items()
    }


def _write_side(spec: str, repository: Path, where: str, *, local: bool) -> OpenSide:
    if redact(spec) != spec:
        raise UsageError(
            f"{where}: it holds what may be a credential, and would be written into a file. Have pip know it by its "
            "configuration or a .netrc."
        )
    if not local and spec.startswith(os.sep) and parse_requirements(spec) is None:
        return _side("interpreter", spec, spec)  # it may exist there and not here
    kind, full = name_side(spec, repository)
    if kind == "revision" and not local:
        raise UsageError(
            f"{where}: a revision is checked out on this machine only. Build an environment of it where all nodes see "
            "it and name the path of its Python, give requirements, or use --sites of this machine."
        )
    if kind == "interpreter" and not local and os.sep not in spec:
        raise UsageError(f"{where}: it may be another Python on each node. Name its path, such as {full}.")
    return _side(kind, full, spec)


def _side(kind: SideKind, spec: str, asked: str) -> OpenSide:
    label = " ".join(parse_requirements(spec) or ()) or spec
    if kind == "revision":
        label = asked if spec.startswith(asked) else f"{asked} ({spec[:9]})"
    return OpenSide(spec=spec, kind=kind, host=Host(), label=label, declared=DECLARED[kind])
