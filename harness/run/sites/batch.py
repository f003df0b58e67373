"""Jobs of SLURM, or processes of this machine that stand for them, by submitit: what is asked, and what comes of it.

A site is a job: an array of them is submitted, one task each. Without cards a job takes its node alone; with cards it
takes what it is given, and how many CPUs go with a card is the user's to say. submitit's own part is how a function
gets to the node and how a job is requeued when its time is over or it is preempted.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from harness.errors import InvalidRunError, UsageError, said_by, shorten
from harness.run.sites.exchange import SILENT_S
from harness.run.sites.job import SiteJob

SLURM, LOCAL = "slurm", "submitit-local"
OF_SLURM: Mapping[str, type] = {
    "partition": str, "account": str, "qos": str, "reservation": str, "constraint": str, "nodelist": str,
    "exclude": str, "gres": str, "gpus_per_node": int, "cpus_per_task": int, "mem": str, "time": int, "comment": str,
    "exclusive": str,
}  # fmt: skip
"""What is passed on, by the names that sbatch has for it."""
OURS: Mapping[str, type] = {"sites": int, "start_minutes": float, "silent_s": float}
TIME_MINUTES = 60
"""Of a job, where `time` is not given; one whose time is over is requeued."""
START_MINUTES = 10.0
LEAST_SILENT_S = 2.0
ASK_TIMEOUT_S = 30.0
FOR_EVER_MINUTES = 60 * 24 * 365


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What `--on` asks for."""

    on: str
    kind: Literal["slurm", "submitit-local"]
    sites: int = 1
    start_minutes: float = START_MINUTES
    """How long jobs are waited for before those that have started go on without the others."""
    silent_s: float = SILENT_S
    """After how long without a sign of life a job, or the driver, is taken for dead."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Passed on to the batch system."""


def is_batch(on: str) -> bool:
    """Whether it is one of these that `--on` names."""
    return on.partition(":")[0] in (SLURM, LOCAL)


def read_asked(on: str) -> Asked:
    """What is asked for, such as "slurm:sites=4,partition=gpu,gres=gpu:1,time=60".

    A value may hold commas: what has no "=" after one belongs to the value before it.

    Raises:
        UsageError: a key that is not known, or a value that is none.
    """
    name, _, listed = on.partition(":")
    kind: Literal["slurm", "submitit-local"] = "slurm" if name == SLURM else "submitit-local"
    known = {**OURS, **(OF_SLURM if kind == SLURM else {})}
    found: dict[str, Any] = {}
    for part in re.split(r",(?=[^,=]*=)", listed) if listed else ():
        key, equals, text = part.partition("=")
        if key not in known or not equals:
            raise UsageError(f"--on {on}: {key!r} is not known. Use KEY=VALUE of {', '.join(known)}.")
        if key in found:
            raise UsageError(f"--on {on}: {key} is given twice. Give it once.")
        found[key] = _read(on, key, text, known[key])
    sites, silent_s = found.get("sites", 1), found.get("silent_s", SILENT_S)
    if not 0 < sites < 1000:
        raise UsageError(f"--on {on}: sites={sites}: 1 to 999 are possible.")
    if silent_s < LEAST_SILENT_S:
        raise UsageError(f"--on {on}: silent_s={silent_s:g}: give {LEAST_SILENT_S:g} seconds or more.")
    passed = {key: value for key, value in found.items() if key not in OURS}
    return Asked(on=on, kind=kind, parameters=passed, **{key: found[key] for key in OURS if key in found})


def _read(on: str, key: str, text: str, kind: type) -> Any:
    if kind is str and text and text.isprintable():
        return text
    if kind is not str and text.isascii():
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if 0 < value < 1e6:
                return value
    raise UsageError(f"--on {on}: {key}={text!r}: a {'text' if kind is str else 'positive number'} is expected.")


def check_here(asked: Asked) -> None:
    """Raises `UsageError` where there is no submitit, or no SLURM, on this machine."""
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--on {asked.on}: submitit cannot be imported: {error}. Install lorameter[slurm] on all nodes."
        ) from None
    if asked.kind == SLURM and not all(map(shutil.which, ("sbatch", "srun", "squeue", "scancel"))):
        raise UsageError(
            f"--on {asked.on}: this machine has no sbatch. Start it on one that submits jobs to SLURM, or use "
            f"--on {LOCAL} for processes of this one."
        )


class Batch:
    """The jobs of one driver."""

    def __init__(self, asked: Asked, folder: Path) -> None:
        self._asked, self._folder = asked, folder / "jobs"
        self._jobs: list[Any] = []

    def submit(self, jobs: Sequence[SiteJob]) -> None:
        """Submit them, as one array. Raises `UsageError` with the batch system's words where it refuses them."""
        import submitit

        try:
            if self._asked.kind == SLURM:
                executor: submitit.Executor = submitit.SlurmExecutor(folder=self._folder, max_num_timeout=1000)
                executor.update_parameters(**sbatch_parameters(self._asked.parameters))
            else:
                executor = submitit.LocalExecutor(folder=self._folder)
                executor.update_parameters(timeout_min=FOR_EVER_MINUTES)
            self._jobs = executor.submit_array(jobs)
        except Exception as error:  # submitit's, subprocess's, and whatever a version of either adds
            raise UsageError(f"--on {self._asked.on}: no job was submitted: {shorten(said_by(error))}.") from None

    @property
    def ids(self) -> tuple[str, ...]:
        """Of the jobs, by number."""
        return tuple(str(job.job_id) for job in self._jobs)

    def states(self) -> Mapping[int, str] | None:
        """Of the jobs that have not ended, in the batch system's words; None where it does not say."""
        if self._asked.kind == LOCAL:
            return {number: "RUNNING" for number, job in enumerate(self._jobs) if not job.done()}
        said = ask_slurm("squeue", "--noheader", "--array", f"--jobs={self.array}", "--format=%i|%T (%r)")
        if said is None:
            return None
        found = dict(line.strip().split("|", 1) for line in said.splitlines() if "|" in line)
        return {number: found[name] for number, name in enumerate(self.ids) if name in found}

    @property
    def array(self) -> str:
        """SLURM's id of all of them."""
        return self.ids[0].partition("_")[0]

    def cancel(self) -> None:
        """End those that have not ended. Never raises."""
        if self._asked.kind == LOCAL:
            for job in self._jobs:
                with contextlib.suppress(Exception):  # it has ended meanwhile
                    if not job.done():
                        job.cancel()
        elif self._jobs:
            cancel_jobs(self.array)

    def last_words(self, number: int) -> str:
        """The last line that the job has printed into its log of errors; empty where there is none."""
        with contextlib.suppress(Exception):  # of a log, whose absence is no error
            lines = [line.strip() for line in self._jobs[number].paths.stderr.read_text(errors="replace").splitlines()]
            return shorten(next(line for line in reversed(lines) if line))
        return ""


def sbatch_parameters(passed: Mapping[str, Any]) -> dict[str, Any]:
    """What submitit is told. All CPUs of a job are its one task's, whatever srun would give it."""
    taken = dict(passed)
    more = {"reservation": taken.pop("reservation")} if "reservation" in taken else {}
    if (alone := taken.pop("exclusive", "no" if {"gres", "gpus_per_node"} & taken.keys() else "yes")) != "no":
        taken["exclusive"] = True if alone == "yes" else alone
    srun = ["--cpu-bind=none"]
    if "cpus_per_task" in taken:  # srun does not take it over from the job
        srun.append(f"--cpus-per-task={taken['cpus_per_task']}")
    return {
        "job_name": "lorameter",
        "time": TIME_MINUTES,
        "srun_args": srun,
        "additional_parameters": {"requeue": True, **more},
        **taken,
    }


def cancel_jobs(*ids: str) -> None:
    """Cancel jobs of SLURM, if they are there. Never raises."""
    ask_slurm("scancel", *ids)


def ask_slurm(*command: str) -> str | None:
    """What a command prints; nothing where it knows no such job, None where it does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ASK_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" in done.stderr:
        return ""
    return None if done.returncode else done.stdout


def check_started(states: Mapping[int, str] | None, started: int, asked: Asked) -> None:
    """Raises `InvalidRunError` where none has started in time."""
    if not started:
        said = "; ".join(sorted(set((states or {}).values()))) or "they have ended"
        raise InvalidRunError(
            f"--on {asked.on}: of {asked.sites} jobs none has started within {asked.start_minutes:g} min: {said}. Wait "
            "for longer with start_minutes=…, or ask for less."
        )
