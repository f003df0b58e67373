"""Jobs of SLURM, or processes of this machine that stand for them, by submitit: what is asked, and what comes of it.

A site is a job: an array of them is submitted, one task each. Without GPUs a job takes its node alone; with GPUs it
takes what it is given, and how many CPUs go with a GPU is the user's to say. submitit's own part is how a function
gets to the node and how a job is requeued when its time is over or it is preempted.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorameter.errors import InvalidRunError, UsageError, said_by, shorten
from lorameter.run.sites.job import SiteJob
from lorameter.studies.placement import LOCAL, SLURM, BatchRequest, say_on

TIME_MINUTES = 60
"""Of a job, where `time` is not given; one whose time is over is requeued."""
ASK_TIMEOUT_S = 30.0
FOR_EVER_MINUTES = 60 * 24 * 365


def check_here(asked: BatchRequest) -> None:
    """Raises `UsageError` where there is no submitit, or no SLURM, on this machine."""
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{say_on(asked.on)}: submitit cannot be imported: {error}. Install lorameter[slurm] on all nodes."
        ) from None
    if asked.kind == SLURM and not all(map(shutil.which, ("sbatch", "srun", "squeue", "scancel"))):
        raise UsageError(
            f"{say_on(asked.on)}: this machine has no sbatch. Start it on one that submits jobs to SLURM, or use "
            f"{LOCAL} for processes of this one."
        )


class Batch:
    """The jobs of one driver."""

    def __init__(self, asked: BatchRequest, folder: Path) -> None:
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
            raise UsageError(f"{say_on(self._asked.on)}: no job was submitted: {shorten(said_by(error))}.") from None

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
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=ASK_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" in done.stderr:
        return ""
    return None if done.returncode else done.stdout


def check_started(states: Mapping[int, str] | None, started: int, asked: BatchRequest) -> None:
    """Raises `InvalidRunError` where none has started in time."""
    if not started:
        said = "; ".join(sorted(set((states or {}).values()))) or "they have ended"
        raise InvalidRunError(
            f"{say_on(asked.on)}: of {asked.sites} jobs none has started within {asked.start_minutes:g} min: {said}. "
            "Wait for longer with start_minutes=…, or ask for less."
        )
