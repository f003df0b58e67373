"""Runs jobs on a cluster, with SLURM or with Ray.

SLURM: sbatch submits each job, and squeue lists the jobs that have not ended. A job reserves its whole node unless it
requests GPUs. All nodes must mount the file system of the runs.

Ray: each job is a task that runs the job's command on a node and returns its files. A task reserves its site (all CPUs
of a node, or a GPU with its share of the CPUs), so that Ray runs no other task during a measurement. It is bound to its
node. Nodes share no folder: the task carries the order, and returns the records when it ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorameter.errors import UsageError, format_error, require, shorten
from lorameter.machine.processes import CPUS, PARENT
from lorameter.records.fileio import scratch_folder
from lorameter.run.sites.folder import LOG, job_command, read_order, write_order
from lorameter.run.sites.gpus import share_cpus
from lorameter.studies.protocol import format_on, format_sites, read_slurm
from lorameter.terminal import print_stderr

QUEUE_POLL_S = 10.0
"""Seconds between two calls of squeue."""
SETTLE_S = 60.0
"""Maximum seconds between the end of a job and the visibility of its last file on NFS (nfs(5), acdirmax)."""
TIMEOUT_S = 30.0
_ID_FILE = "slurm-id"
_ID = re.compile(r"[0-9]+")


class SlurmJobs:
    """Starts jobs with sbatch."""

    def __init__(self, on: str) -> None:
        """Raises `UsageError` if this machine cannot submit jobs."""
        require(
            all(map(shutil.which, ("sbatch", "squeue", "scancel"))),
            f"{format_on(on)}: no sbatch on this machine. Start it where SLURM jobs are submitted.",
        )
        self._on = on
        sites, self._parameters = read_slurm(on)
        self.slots = ("",) * sites
        self._ids: dict[Path, str] = {}
        self._queued_s: dict[Path, float] = {}
        """When squeue last listed each job, by `time.monotonic`."""
        self._polled_s = 0.0

    def start(self, folder: Path, slot: str, digest: str) -> None:
        """Submit a job. Raises `UsageError` with sbatch's message if it refuses."""
        words = [
            "sbatch",
            "--parsable",
            *sbatch_options(self._parameters),
            f"--output={str(folder / LOG).replace('%', '%%')}",
        ]
        script = f"#!/bin/sh\nexec {shlex.join(job_command(folder, digest))}\n"
        done = _run(words, script)
        job = done.stdout.strip().partition(";")[0]
        reason = shorten((done.stderr or done.stdout).strip())
        require(not done.returncode and _ID.fullmatch(job), f"{format_on(self._on)}: no job was submitted: {reason}.")
        (folder / _ID_FILE).write_text(job)
        if not self._ids:
            print_stderr(f"job {job} is submitted to SLURM, and waited for.")
        self._ids[folder], self._queued_s[folder] = job, time.monotonic()

    def describe_end(self, folder: Path) -> str | None:
        """The state in which a job ended, from sacct; None while it is queued or running, as far as squeue knows."""
        now = time.monotonic()
        if now - self._polled_s >= QUEUE_POLL_S and self._ids:
            self._polled_s = now
            done = _run(["squeue", "--noheader", f"--jobs={','.join(self._ids.values())}", "--format=%i"])
            unknown = done.returncode and "Invalid job id" not in done.stderr  # squeue does not answer
            queued = set(self._ids.values()) if unknown else set(done.stdout.split())
            self._queued_s |= {path: now for path, job in self._ids.items() if job in queued}
        if now - self._queued_s[folder] < SETTLE_S:
            return None
        job = self._ids[folder]
        done = _run(["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job}"])
        return f"its job {job} ended{f': {state}' if (state := done.stdout.strip()) else ' without a result'}"

    def cancel(self) -> None:
        """Cancel all jobs."""
        if self._ids:
            _run(["scancel", *self._ids.values()])

    close = cancel


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
    values = {"time": 60, **passed}  # minutes
    exclusive = values.pop("exclusive", "no" if {"gres", "gpus_per_node"} & values.keys() else "yes")
    alone = {"no": [], "yes": ["--exclusive"]}.get(exclusive, [f"--exclusive={exclusive}"])
    options = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
    return ["--job-name=lorameter", "--nodes=1", "--ntasks=1", "--no-requeue", *alone, *options]


def _run(words: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a SLURM command; the return code is 1 if the command cannot be run or hangs."""
    try:
        return subprocess.run(
            words, input=text, capture_output=True, text=True, errors="replace", check=False, timeout=TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeShare:
    """The node of a task, and the CPUs and GPUs that it reserves."""

    site: str
    node: str
    """Ray's id of the node."""
    cpus: float
    gpus: int = 0
    share: int = 0
    shares: int = 1


def divide_nodes(
    nodes: Sequence[dict[str, Any]], wanted: Sequence[str] = (), *, ranks: int = 1
) -> tuple[NodeShare, ...]:
    """The sites of a cluster: its GPUs if it has any, else its nodes with CPUs.

    Args:
        nodes: as `ray.nodes()` lists them.
        wanted: node names; empty for all nodes.
        ranks: ranks of a trial; each has its own GPU if the cluster has GPUs.

    Raises:
        UsageError: no node has such a name, or no node can measure.
    """
    alive = [node for node in nodes if node.get("Alive")]
    names = _names(alive)
    known = ", ".join(sorted(names.values()))
    for name in wanted:
        require(name in names.values(), f"{format_sites(wanted)}: the cluster has no node {name!r}. It has {known}.")
    alive = [node for node in alive if not wanted or names[node["NodeID"]] in wanted]
    resources = {node["NodeID"]: node.get("Resources", {}) for node in alive}
    with_gpus = any(one.get("GPU", 0) >= 1 for one in resources.values())
    sites: list[NodeShare] = []
    for node in sorted(alive, key=lambda one: names[one["NodeID"]]):
        key, has = node["NodeID"], resources[node["NodeID"]]
        cpus, gpus = float(has.get("CPU", 0)), int(has.get("GPU", 0))
        if with_gpus:
            shares = gpus // ranks
            for share in range(shares):
                numbers = "-".join(str(gpu) for gpu in range(share * ranks, (share + 1) * ranks))
                site, part = f"{names[key]}-gpu-{numbers}", cpus // shares
                sites.append(NodeShare(site=site, node=key, cpus=part, gpus=ranks, share=share, shares=shares))
        elif cpus >= 1:
            sites.append(NodeShare(site=names[key], node=key, cpus=cpus))
    require(
        sites or not with_gpus or ranks == 1,
        f"ranks = {ranks}: no node of the Ray cluster has so many GPUs. Use fewer ranks.",
    )
    require(sites, "the Ray cluster has no node with a CPU or a GPU to measure on. See `ray status`.")
    return tuple(sites)


def _names(nodes: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A unique name for each node, by its id: the node's name or its host's, with a part of the id if two are equal."""
    own = {
        node["NodeID"]: name if (name := node.get("NodeName")) and name != node.get("NodeManagerAddress") else host
        for node in nodes
        for host in [node.get("NodeManagerHostname") or node["NodeID"][:8]]
    }
    occurrences = Counter(own.values())
    return {key: name if occurrences[name] == 1 else f"{name}-{key[:6]}" for key, name in own.items()}


class RayJobs:
    """Starts each job as a task; the folder of a job is filled when its task has ended."""

    def __init__(self, address: str, wanted: Sequence[str] = (), *, ranks: int = 1) -> None:
        """Connect to a cluster.

        Args:
            address: "ray" for the cluster of this machine, "ray://HOST:PORT" for a cluster with a client port.
            wanted: names of nodes; empty for all.
            ranks: ranks of a trial; each has its own GPU if the cluster has GPUs.

        Raises:
            UsageError: Ray is not installed, the cluster does not answer or has no such nodes.
        """
        try:
            import ray
        except ImportError as error:
            raise UsageError(
                f"{format_on(address)}: Ray cannot be imported: {error}. "
                "Install lorameter[ray], in the cluster's version."
            ) from None
        self._ray: Any = ray
        try:
            ray.init(
                address=address if address.startswith("ray://") else "auto",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # wrong version, wrong port, missing library: Ray has a class for each
            raise UsageError(
                f"{format_on(address)}: no Ray cluster answers: {format_error(error).rstrip('.')}. Start it, name it "
                "as ray://HOST:PORT, or set RAY_ADDRESS to the HOST:PORT of its head."
            ) from None
        self._shares = {share.site: share for share in divide_nodes(ray.nodes(), wanted, ranks=ranks)}
        self.slots = tuple(self._shares)
        self._tasks: dict[Path, Any] = {}

    def start(self, folder: Path, slot: str, digest: str) -> None:
        """Submit a task."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        share = self._shares[slot]
        there = NodeAffinitySchedulingStrategy(share.node, soft=False)
        options = {"num_cpus": share.cpus, "num_gpus": share.gpus, "scheduling_strategy": there, "max_retries": 0}
        task = self._ray.remote(run_on_node).options(**options)
        self._tasks[folder] = task.remote(read_order(folder, digest), share.share, share.shares)

    def describe_end(self, folder: Path) -> str | None:
        """How the task of a job has ended, whose folder is then filled; None while it is queued or running."""
        task = self._tasks[folder]
        if not self._ray.wait([task], timeout=0)[0]:
            return None
        try:
            files = self._ray.get(task)
        except Exception as error:  # a lost node, a cancelled task: Ray has a class for each
            return format_error(error)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return "its process ended without a result"

    def cancel(self) -> None:
        """Ask all tasks to end."""
        for task in self._tasks.values():
            with contextlib.suppress(Exception):  # the task may have ended
                self._ray.cancel(task)

    def close(self) -> None:
        """End all tasks, and leave the cluster."""
        self.cancel()
        self._ray.shutdown()


def run_on_node(order: Any, share: int, shares: int) -> dict[str, bytes]:
    """Execute an order on this node; returns the files of the job's folder by their relative paths."""
    with scratch_folder() as folder:
        digest = write_order(folder, order)
        variables = {**os.environ, PARENT: str(os.getpid())}
        if shares > 1:
            cpus = share_cpus(os.sched_getaffinity(0), shares, f"site {order.site}")[share]
            variables[CPUS] = ",".join(map(str, cpus))
        with (folder / LOG).open("wb") as log:
            process = subprocess.Popen(
                job_command(folder, digest), env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            try:
                process.wait()
            finally:
                process.terminate()
                process.wait()
        returned = (path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".log"))
        return {str(path.relative_to(folder)): path.read_bytes() for path in returned}
