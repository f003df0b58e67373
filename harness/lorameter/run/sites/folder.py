"""The folder of a job: its order, its state, and the run that it measures.

FOLDER/order.json   the order; written before the job is started
FOLDER/state.json   the machine of the job, and its outcome
FOLDER/RUN/         an ordinary run with the replicates of the order
FOLDER/job.log      the output of the job

A job executes the interpreters and requirements in its order. Others may be able to replace files in a shared folder,
so the command line of the job has the SHA-256 of its order, and the job executes no other.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

from lorameter.errors import require
from lorameter.machine.provenance import MachineFacts
from lorameter.records import codec, fileio
from lorameter.run.plan import PlanSpec
from lorameter.run.workers import IfBusy

JOBS = "jobs"
"""The folder of all jobs, in the folder of their run; removed when the run has ended."""
LOG = "job.log"
ORDER, STATE = "order.json", "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOrder:
    """The order of a job."""

    plan: PlanSpec | None = None
    """The plan to measure; without one the job describes its machine."""
    site: str = ""
    """Name of the site; empty: the node's name."""
    cwd: str
    if_busy: IfBusy = "share"
    """The action if the device is in use; "share" if the process that started the job already holds the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """The state of a job, written by the job."""

    site: str = ""
    machine: str = ""
    """A description of its hardware."""
    facts: MachineFacts | None = None
    """The machine and its installed software; only for a job without a plan."""
    free_bytes: int | None = None
    """Free memory of the device, None if unknown; only for a job without a plan."""
    ended: bool = False
    error: str = ""
    """Why the job ended early."""
    usage: bool = False
    """Whether the user can fix the error (`UsageError`)."""


def job_command(folder: Path, digest: str) -> list[str]:
    """The command line of a job; `digest` is that of its order."""
    return [sys.executable, "-m", "lorameter.run.sites.job", str(folder), digest]


def write_order(folder: Path, order: JobOrder) -> str:
    """Write the order of a job; returns its digest."""
    text = codec.dumps(order)
    fileio.write_whole(folder / ORDER, text)
    return _hash(text)


def read_order(folder: Path, digest: str | None) -> JobOrder:
    """The order of a job. Raises `UsageError` if it does not have this digest; with None, nothing of it may be
    executed."""
    text = fileio.read_text(folder / ORDER)
    require(
        digest in (None, _hash(text)),
        f"{folder / ORDER}: it is not the order that was submitted, so it was not executed: another user has replaced "
        "it. Name a folder with --runs-dir that only you can write to.",
    )
    return codec.from_json(JobOrder, codec.parse(text), ORDER)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def read_state(folder: Path) -> JobState:
    """The state of a job; empty before the job has started."""
    try:
        text = (folder / STATE).read_text()
    except FileNotFoundError:
        return JobState()
    return codec.from_json(JobState, codec.parse(text), STATE)
