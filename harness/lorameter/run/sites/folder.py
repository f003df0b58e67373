"""The folder of a job: the order that it carries out, its state, and the run that it measures.

FOLDER/order.json   what to measure; written before the job is started
FOLDER/state.json   where the job runs, which replicates it has finished, how it ended
FOLDER/RUN/         an ordinary run, of the replicates of the order
FOLDER/job.log      what the job printed

A job runs what its order names, so the folder must be writable by its user alone.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from lorameter.errors import UsageError
from lorameter.machine.provenance import MachineFacts
from lorameter.records import codec
from lorameter.records.fileio import write_whole
from lorameter.run.device_lock import IfBusy
from lorameter.run.resume import PlanSpec

MODULE = "lorameter.run.sites.job"
"""`python -m MODULE FOLDER` runs a job."""
JOBS = "jobs"
"""The folder of all jobs, in the folder of their run; removed when the run has ended."""
LOG = "job.log"
_ORDER, _STATE = "order.json", "state.json"
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOrder:
    """What a job is to do."""

    plan: PlanSpec | None = None
    """What to measure; without a plan the job describes its machine."""
    site: str = ""
    """Name of the site; empty: the node's name."""
    cwd: str
    if_busy: IfBusy | None = None
    """What to do if the device is in use; None: the process that started the job holds the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What a job says of itself."""

    site: str = ""
    machine: str = ""
    """Its kind, for a reader."""
    facts: MachineFacts | None = None
    """Of a job without a plan: its machine and what is installed there."""
    free_bytes: int | None = None
    """Of a job without a plan: free memory of its device; None if unknown."""
    finished: tuple[int, ...] = ()
    """Replicates whose trials have all ended."""
    ended: bool = False
    error: str = ""
    """Why it ended early."""
    usage: bool = False
    """Whether the error is the user's to fix (`UsageError`)."""


def command(python: str, folder: Path) -> list[str]:
    """The command line of a job."""
    return [python, "-m", MODULE, str(folder)]


def write_order(folder: Path, order: JobOrder) -> None:
    """Write the order of a job."""
    write_whole(folder / _ORDER, codec.dumps(order))


def read_order(folder: Path) -> JobOrder:
    """The order of a job. Raises `UsageError` if it was written by another version of lorameter."""
    return codec.from_json(JobOrder, codec.parse((folder / _ORDER).read_text()), _ORDER)


def write_state(folder: Path, state: JobState) -> None:
    """Write the state of a job."""
    write_whole(folder / _STATE, codec.dumps(state))


def read_state(folder: Path) -> JobState:
    """The state of a job; an empty one before it has started."""
    try:
        text = (folder / _STATE).read_text()
    except FileNotFoundError:
        return JobState()
    return codec.from_json(JobState, codec.parse(text), _STATE)


def make_private(folder: Path, mode: int = stat.S_IRWXU) -> None:
    """Make a folder that other users cannot write into, if it is missing. Raises `UsageError` as `check_private`."""
    folder.mkdir(mode=mode, parents=True, exist_ok=True)
    check_private(folder)


def check_private(folder: Path) -> None:
    """Check that no other user can write into a folder, or put another one in its place.

    Raises:
        UsageError: it is a symbolic link or no folder, belongs to another user, or is writable by its group or others;
            or its parent belongs to another user than root, or is writable by others without the sticky bit.
    """
    own, parent = folder.lstat(), folder.parent.stat()
    if not stat.S_ISDIR(own.st_mode):
        raise _refusal(folder, "it is no folder, or a symbolic link")
    if own.st_uid != os.geteuid():
        raise _refusal(folder, "it belongs to another user")
    if _others_can_write(own):
        raise _refusal(folder, "other users can write into it")
    if parent.st_uid not in (0, os.geteuid()):
        raise _refusal(folder.parent, "it belongs to another user")
    if _others_can_write(parent) and not parent.st_mode & stat.S_ISVTX:
        raise _refusal(folder.parent, "other users can rename what is in it")


def _refusal(folder: Path, why: str) -> UsageError:
    return UsageError(
        f"folder {folder}: {why}, and jobs run code that files in it name. Use a --runs-dir of your own, or one with "
        "the sticky bit (chmod +t) that belongs to you or root."
    )


def _others_can_write(found: os.stat_result) -> bool:
    """The group of a user's own name has that user alone in it."""
    try:
        own_group = grp.getgrgid(found.st_gid).gr_name == pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a number without a name
        own_group = False
    return bool(found.st_mode & (stat.S_IWOTH if own_group else _OTHERS))
