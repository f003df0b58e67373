"""Runs SLURM jobs: sbatch submits each job, and squeue lists the jobs that have not ended.

A job reserves its whole node unless it requests GPUs. All nodes must mount the file system of the runs.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels_check.terminal import print_stderr
from lorameter.errors import UsageError, shorten
from lorameter.run.sites.folder import LOG, command
from lorameter.studies.placement import SlurmRequest, say_on

TIME_MINUTES = 60
"""Default time limit of a job."""
QUEUE_POLL_S = 10.0
"""Seconds between two calls of squeue."""
SETTLE_S = 60.0
"""Maximum seconds between the end of a job and the visibility of its last file on NFS (nfs(5), acdirmax)."""
TIMEOUT_S = 30.0
_ID_FILE = "slurm-id"
_ID = re.compile(r"[0-9]+")


class SlurmJobs:
    """Implements `Launcher` with sbatch."""

    def __init__(self, request: SlurmRequest) -> None:
        """Raises `UsageError` if this machine cannot submit jobs."""
        if not all(map(shutil.which, ("sbatch", "squeue", "scancel"))):
            raise UsageError(
                f"{say_on(request.on)}: this machine has no sbatch. Start it on one that submits jobs to SLURM."
            )
        self._request = request
        self.slots = ("",) * request.sites
        self._ids: dict[Path, str] = {}
        self._queued_s: dict[Path, float] = {}
        """When squeue last listed each job, by `time.monotonic`."""
        self._polled_s = 0.0

    def start(self, folder: Path, slot: str) -> None:
        """Submit a job. Raises `UsageError` with sbatch's message if it refuses."""
        words = [
            "sbatch",
            "--parsable",
            *sbatch_options(self._request.parameters),
            f"--output={str(folder / LOG).replace('%', '%%')}",
        ]
        script = f"#!/bin/sh\nexec {shlex.join(command(sys.executable, folder))}\n"
        done = _run(words, script)
        job = done.stdout.strip().partition(";")[0]
        if done.returncode or not _ID.fullmatch(job):
            reason = shorten((done.stderr or done.stdout).strip())
            raise UsageError(f"{say_on(self._request.on)}: no job was submitted: {reason}.")
        (folder / _ID_FILE).write_text(job)
        if not self._ids:
            print_stderr(f"job {job} is submitted to SLURM, and waited for.")
        self._ids[folder], self._queued_s[folder] = job, time.monotonic()

    def running(self) -> set[Path]:
        """Folders of the jobs that have not ended, as far as squeue knows."""
        now = time.monotonic()
        if now - self._polled_s >= QUEUE_POLL_S and self._ids:
            self._polled_s = now
            done = _run(["squeue", "--noheader", f"--jobs={','.join(self._ids.values())}", "--format=%i"])
            unknown = done.returncode and "Invalid job id" not in done.stderr  # squeue does not answer
            queued = set(self._ids.values()) if unknown else set(done.stdout.split())
            self._queued_s |= {folder: now for folder, job in self._ids.items() if job in queued}
        return {folder for folder, last_s in self._queued_s.items() if now - last_s < SETTLE_S}

    def why(self, folder: Path) -> str:
        """The state in which a job ended, from sacct."""
        job = self._ids[folder]
        done = _run(["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job}"])
        return f"its job {job} ended{f': {state}' if (state := done.stdout.strip()) else ' without a result'}"

    def cancel(self) -> None:
        """Cancel all jobs."""
        if self._ids:
            _run(["scancel", *self._ids.values()])

    def close(self) -> None:
        """Cancel all jobs that have not ended."""
        self.cancel()


def cancel_job(folder: Path) -> bool:
    """Cancel the SLURM job of a folder; returns whether the folder belongs to a SLURM job."""
    if not (folder / _ID_FILE).is_file():
        return False
    job = (folder / _ID_FILE).read_text()
    if _ID.fullmatch(job):  # it becomes a command-line argument
        _run(["scancel", job])
    return True


def sbatch_options(passed: Mapping[str, Any]) -> list[str]:
    """The options of sbatch for one task on one node, and those of the user."""
    given = {"time": TIME_MINUTES, **passed}
    exclusive = given.pop("exclusive", "no" if {"gres", "gpus_per_node"} & given.keys() else "yes")
    alone = {"no": [], "yes": ["--exclusive"]}.get(exclusive, [f"--exclusive={exclusive}"])
    options = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    return ["--job-name=lorameter", "--nodes=1", "--ntasks=1", "--no-requeue", *alone, *options]


def _run(words: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a SLURM command; the return code is 1 if the command cannot be run or hangs."""
    try:
        return subprocess.run(
            words, input=text, capture_output=True, text=True, errors="replace", check=False, timeout=TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))
