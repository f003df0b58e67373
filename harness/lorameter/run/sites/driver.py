"""Measures a plan in jobs: several at a time, each an ordinary run of some replicates, merged into one run.

What is spread is the replicate: its variants take turns in one job, so every ratio is within a site. A job leaves its
records in a folder below the run's (`lorameter.run.sites.folder`), and only this process writes the run. A job that is
lost loses the replicate that it was measuring, which another job measures from its start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from lorameter.errors import InvalidRunError, UsageError, redact
from lorameter.machine.provenance import OF_A_KIND, Machine, fingerprint_fields
from lorameter.records import codec, store
from lorameter.records.record import Notice, TrialRecord
from lorameter.records.store import Manifest, Run, RunWriter, SiteFacts
from lorameter.run.budget import SKIPPED, skipped_notice
from lorameter.run.device_lock import IfBusy
from lorameter.run.display import Display
from lorameter.run.interrupts import InterruptHandler
from lorameter.run.plan import Group, Plan
from lorameter.run.prepare import begin_record
from lorameter.run.resume import continue_manifest, read_broken_off, write_plan
from lorameter.run.runner import Stopping, records_outside
from lorameter.run.sites.folder import (
    JOBS,
    LOG,
    JobOrder,
    JobState,
    read_order,
    read_state,
    write_order,
)
from lorameter.run.sites.slurm import cancel_job
from lorameter.verdicts.comparison_input import Difference, differences

LOOK_S = 1.0
"""How often jobs are looked at; a look reads a file of a few lines."""
END_TIMEOUT_S = 30.0
"""A job that is asked to end saves its records and kills its processes."""
MOST_LOSSES = 3
"""A site that loses so many jobs in a row is given no further one."""
_SIDE_FIELDS = ("python", "libraries", "cuda", "packages")


class Launcher(Protocol):
    """Starts jobs: on this machine, on a Ray cluster or by SLURM."""

    @property
    def slots(self) -> tuple[str, ...]:
        """One for each job that can run at a time: the name of its site, empty where the job finds it."""

    def start(self, folder: Path, slot: str) -> None:
        """Start the job of a folder. Raises `UsageError` if it cannot be started."""

    def running(self) -> set[Path]:
        """Folders of the jobs that wait or run."""

    def why(self, folder: Path) -> str:
        """How a job ended that left no result."""

    def cancel(self) -> None:
        """Ask all jobs to end; they save their records."""

    def close(self) -> None:
        """End all jobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job under way."""

    folder: Path
    slot: str
    replicates: tuple[int, ...]


def measure_in_jobs(
    plan: Plan, groups: Sequence[Group], launcher: Launcher, path: Path, earlier: Run | None, shown: Display,
    stops: InterruptHandler, *, local: bool, if_busy: IfBusy | None, about: Mapping[str, Any],
) -> None:  # fmt: skip
    """Measure what is left of a plan into the folder of its run, which this process has locked.

    Args:
        plan: the whole plan.
        groups: what is left of it.
        launcher: of the jobs.
        path: folder of the run.
        earlier: the run as it was, if it is resumed.
        shown: shows what is under way.
        stops: handles signals.
        local: whether the sites are of this machine: each measures its part of the replicates in one job, as it does
            under a time limit. Elsewhere a job measures one replicate, so that one that waits in a queue holds up no
            other.
        if_busy: what a job does if its device is in use; None: this process holds the devices.
        about: what this process adds to the manifest that a job wrote.

    Raises:
        UsageError: what the study asks for cannot be done.
        InvalidRunError: sites are unlike each other, or all of them have lost their jobs.
    """
    with contextlib.ExitStack() as stack:
        (path / JOBS).mkdir(mode=0o700, exist_ok=True)
        stack.callback(shutil.rmtree, path / JOBS, ignore_errors=True)
        stack.callback(launcher.close)
        driver = _Driver(plan, launcher, path, shown, about, earlier, groups, local=local, if_busy=if_busy)
        driver.measure(stops)


class _Driver:
    """The jobs of one run."""

    def __init__(
        self,
        plan: Plan,
        launcher: Launcher,
        path: Path,
        shown: Display,
        about: Mapping[str, Any],
        earlier: Run | None,
        groups: Sequence[Group],
        *,
        local: bool,
        if_busy: IfBusy | None,
    ) -> None:
        self._plan, self._launcher, self._path, self._shown, self._about = plan, launcher, path, shown, about
        self._earlier, self._groups, self._local, self._if_busy = earlier, groups, local, if_busy
        known = records_outside(groups, earlier.records if earlier else ())
        self._ended = {record.trial: record for record in known}
        self._free = deque(launcher.slots)
        self._losses: Counter[str] = Counter()
        self._jobs: list[Job] = []
        self._begun: set[Path] = set()
        """Folders of jobs whose manifest was compared with that of the run."""
        self._merged: set[int] = set()
        self._writer: RunWriter | None = None
        self._manifest: Manifest | None = None if earlier is None else earlier.manifest
        self._sites: dict[str, SiteFacts] = {}
        self._notices: list[Notice] = []
        self._stopped = None if earlier is None else earlier.manifest.stopped
        self._mixed = plan.study.protocol.mixed
        self._minutes = plan.study.protocol.max_minutes
        self._skipped = set[str]() if earlier is None else set(earlier.manifest.skipped)
        protocol = dataclasses.replace(plan.study.protocol, max_minutes=None)  # which each job keeps for itself
        self._stop = Stopping(dataclasses.replace(plan, study=dataclasses.replace(plan.study, protocol=protocol)))

    def measure(self, stops: InterruptHandler) -> None:
        """Measure all groups that are left, and finish the run."""
        try:
            self._stopped = self._run_jobs(stops) or self._stopped
        except BaseException as error:
            self._end_jobs()
            if self._writer is not None:
                with contextlib.suppress(InvalidRunError, OSError):  # the first error is the one to report
                    self._give_up()
                    self._finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            if self._writer is None or not isinstance(error, KeyboardInterrupt):
                raise
        else:
            self._end_jobs()
            self._finish("complete")

    def _run_jobs(self, stops: InterruptHandler) -> str | None:
        """Have all replicates measured; returns why it stopped early."""
        left = sorted({group.replicate for group in self._groups})
        each = math.ceil(len(left) / len(self._free))
        lists = [[replicate] for replicate in left]
        if self._local or self._minutes is not None:
            lists = [left[first :: len(self._free)] for first in range(len(self._free))]
        waiting = deque(tuple(replicates) for replicates in lists if replicates)
        while waiting or self._jobs:
            with stops.interruptible():
                while waiting and self._free:
                    self._start(waiting.popleft(), each)
                if not self._jobs:
                    raise InvalidRunError(f"{self._notices[-1].message} No site is left. {self._notices[-1].remedy}")
                time.sleep(LOOK_S)
                running = self._launcher.running()
            for job in list(self._jobs):
                state = read_state(job.folder)
                merged = self._merge(job, state)
                if state.ended or job.folder not in running:
                    waiting.extendleft(filter(None, [self._end(job, state)]))
                if merged and (reason := self._stop(self._records())):
                    return reason
        return None

    def _start(self, replicates: tuple[int, ...], each: int) -> None:
        """Start a job on the site that has been free for longest; `each` is how many replicates a site takes."""
        slot = self._free.popleft()
        folder = self._path / JOBS / f"{len(list((self._path / JOBS).iterdir())):04}"
        folder.mkdir()
        write_order(folder, self._order(slot, replicates, each))
        self._launcher.start(folder, slot)
        self._jobs.append(Job(folder=folder, slot=slot, replicates=replicates))

    def _order(self, slot: str, replicates: tuple[int, ...], each: int) -> JobOrder:
        protocol = self._plan.study.protocol
        if self._minutes is not None:  # less for what a lost job has left
            protocol = dataclasses.replace(protocol, max_minutes=self._minutes * min(1, len(replicates) / each))
        whole = dataclasses.replace(self._plan, study=dataclasses.replace(self._plan.study, protocol=protocol))
        part = dataclasses.replace(whole, groups=tuple(one for one in self._groups if one.replicate in replicates))
        return JobOrder(plan=write_plan(part, whole), site=slot, cwd=str(Path.cwd()), if_busy=self._if_busy)

    def _merge(self, job: Job, state: JobState) -> bool:
        """Keep the records of replicates that a job has finished; says whether there were any."""
        if not (found := store.list_runs(job.folder)):
            return False
        if job.folder not in self._begun:
            self._begin(store.read_manifest(found[0]), state.site)
            self._begun.add(job.folder)
        new = set(state.finished) - self._merged
        if new:
            self._merged |= new
            for record in store.read_run(str(found[0]), job.folder).records:
                if record.replicate in new:
                    self._keep(record, state)
        return bool(new)

    def _begin(self, manifest: Manifest, site: str) -> None:
        """Begin the run by the manifest of its first job; that of each later one must be like it."""
        if self._manifest is not None:
            check_alike(self._manifest, manifest, site, mixed=self._mixed, again=self._writer is None)
        machine = {name: manifest.provenance[name] for name in Machine.__dataclass_fields__}
        self._sites[site] = SiteFacts(machine=machine, fingerprint=manifest.fingerprint)
        if self._writer is not None:
            return
        if self._earlier is not None:
            begun = continue_manifest(self._earlier.manifest, manifest.provenance, manifest.tokens, self._minutes)
        else:
            begun = msgspec.structs.replace(
                manifest,
                run=self._path.name,
                study=codec.to_json(self._plan.study),
                sites=self._launcher.slots if self._mixed and self._local else (),
                order=tuple(slot.trial for slot in self._plan.slots),
                created_unix_s=time.time(),
                notices=tuple(dict.fromkeys((*self._about["notices"], *manifest.notices))),
                policy=self._about["policy"],
            )
        self._manifest, self._writer = manifest, RunWriter(self._path.parent, begun)

    def _keep(self, record: TrialRecord, state: JobState) -> None:
        assert self._writer is not None  # the job's manifest came before its records
        record = record.replaced(site=state.site, machine=state.machine if self._mixed else "")
        self._writer.append(record)
        self._ended[record.trial] = record
        self._shown.trial_ended(record)

    def _end(self, job: Job, state: JobState) -> tuple[int, ...]:
        """Take a job that has ended off the list; returns its replicates that are to be measured again.

        Raises `UsageError` for an error that the user must fix.
        """
        self._jobs.remove(job)
        self._collect(job)
        if state.usage:
            raise UsageError(state.error)
        if state.ended and not state.error:
            self._losses[job.slot] = 0
            self._free.append(job.slot)
            return ()  # a replicate that is missing had no time
        self._losses[job.slot] += 1
        if self._losses[job.slot] < MOST_LOSSES:
            self._free.append(job.slot)
        left = tuple(replicate for replicate in job.replicates if replicate not in self._merged)
        why = state.error or self._launcher.why(job.folder)
        self._notices.append(
            Notice(
                code="site-lost",
                message=f"site {state.site or job.slot or 'of a job'} was lost: {why.rstrip('.')}. Of its replicates "
                f"{len(left)} are measured again from their start.",
                remedy=f"See logs/job-{job.folder.name}.log; lorameter run --resume resumes what is missing.",
            )
        )
        return left

    def _collect(self, job: Job) -> None:
        """Keep the logs and notices of a job that has ended."""
        for path in store.list_runs(job.folder):
            manifest = store.read_manifest(path)
            self._notices += [notice for notice in manifest.notices if notice.code != SKIPPED]  # of its part alone
            self._stopped = self._stopped or manifest.stopped
            self._skipped |= set(manifest.skipped)
        copy_logs(job.folder, self._path)

    def _end_jobs(self) -> None:
        """Ask the jobs that are left to end, wait for them, and keep what they finished."""
        with contextlib.suppress(Exception):  # nothing may keep the records from being saved
            self._launcher.cancel()
            deadline = time.monotonic() + END_TIMEOUT_S
            while self._jobs and time.monotonic() < deadline:
                running = self._launcher.running()
                for job in list(self._jobs):
                    state = read_state(job.folder)
                    if state.ended or job.folder not in running:
                        self._jobs.remove(job)
                        with contextlib.suppress(InvalidRunError):  # unlike the others, so that nothing of it is kept
                            self._merge(job, state)
                        self._collect(job)
                time.sleep(LOOK_S / 10)

    def _give_up(self) -> None:
        """A record for each trial that has none: what a job has of it, else `not_run`."""
        assert self._writer is not None
        assert self._manifest is not None
        for record, state in read_left(self._path, self._manifest):
            if record.trial not in self._ended:
                self._keep(record, state)
        for slot in self._plan.slots:
            if slot.trial not in self._ended:
                self._writer.append(begin_record(slot, "not_run"))

    def _records(self) -> tuple[TrialRecord, ...]:
        return tuple(self._ended[slot.trial] for slot in self._plan.slots if slot.trial in self._ended)

    def _finish(self, status: store.RunStatus) -> None:
        assert self._writer is not None  # a job that measured nothing ended in an error
        trials = [record.trial for record in self._records()] if status == "complete" else None
        if self._minutes is not None and status == "complete":
            count = len({record.replicate for record in self._records() if record.status == "ok"})
            self._notices += skipped_notice(self._skipped, count, self._plan.study.protocol.replicates, 0.0)
        known = store.read_manifest(self._path).notices
        self._writer.finish(
            status,
            stopped=self._stopped,
            measured=trials,
            notices=tuple(one for one in dict.fromkeys(self._notices) if one not in known),
            came=self._sites,
            skipped=tuple(sorted(self._skipped)),
        )


def check_alike(first: Manifest, other: Manifest, site: str, *, mixed: bool, again: bool) -> None:
    """Raises `InvalidRunError` for a job whose machine, libraries, tokens or sides are others than those of the run.

    Args:
        first: manifest of the run, or of its first job.
        other: manifest of the job.
        site: where it runs.
        mixed: whether the kinds of machines may differ.
        again: whether the run is resumed, maybe by another version of lorameter.
    """
    if unlike := find_unlike(first, other, mixed=mixed, again=again):
        said = "; ".join(f"{one.field} is {one.candidate!r} there and {one.base!r} here" for one in unlike[:3])
        of_kind = all(one.field in OF_A_KIND for one in unlike)
        raise InvalidRunError(
            f"site {site} is unlike the first: {said}. Measure it in a run of its own: leave it out by --sites on "
            f"Ray, by nodelist, exclude or constraint on SLURM"
            f"{', or have each site judged by itself by --mixed' if of_kind else ''}."
        )


def find_unlike(first: Manifest, other: Manifest, *, mixed: bool, again: bool) -> list[Difference]:
    """In what a job differs from the run, with the arguments of `check_alike`; empty where they can be compared."""
    declared = [name for side in other.sides.values() for name in side["declared"]]
    without = (*declared, *(OF_A_KIND if mixed else ()))
    fields = (_likeness(one, without) for one in (first, other))
    known, found = ({key: value for key, value in one.items() if not (again and key == "harness")} for one in fields)
    return differences(known, found)


def _likeness(manifest: Manifest, without: Sequence[str]) -> dict[str, Any]:
    sides = {
        name: {field: (side.get("facts") or {}).get(field) for field in _SIDE_FIELDS}
        for name, side in manifest.sides.items()
    }
    tokens = {"hash": manifest.tokens.get("hash"), "own": manifest.tokens.get("own")}
    fields: dict[str, Any] = codec.to_json(fingerprint_fields(manifest.provenance, without))
    return {
        "harness": manifest.provenance["worker"]["harness"],
        "interleaving": manifest.interleaving,
        "tokens": tokens,
        **sides,
        **fields,
    }


def read_left(path: Path, manifest: Manifest) -> Iterator[tuple[TrialRecord, JobState]]:
    """All records that the jobs of a run have left in its folder, oldest job first; none of a job that is unlike the
    run of this manifest."""
    mixed = bool(manifest.study["protocol"].get("mixed"))
    for folder in sorted((path / JOBS).glob("*")):
        state = read_state(folder)
        for found in store.list_runs(folder):
            run = store.read_run(str(found), folder)
            if find_unlike(manifest, run.manifest, mixed=mixed, again=bool(manifest.resumed)):
                continue
            for record in run.records:
                if record.status != "not_run":
                    yield record, state


def merge_left(path: Path) -> None:
    """Merge into a run what the jobs of a process that was killed have measured, and remove the jobs.

    Jobs of SLURM that still run are cancelled first; others ended with the process.
    """
    with store.writing(path):
        deadline = time.monotonic() + END_TIMEOUT_S
        for folder in sorted((path / JOBS).glob("*")):
            while cancel_job(folder) and not read_state(folder).ended and time.monotonic() < deadline:
                time.sleep(LOOK_S)
            copy_logs(folder, path)
        run = store.read_run(str(path), path.parent)
        settled = {record.trial for record in run.records if record.settled}
        writer, mixed = RunWriter(path.parent, run.manifest), bool(run.manifest.study["protocol"].get("mixed"))
        for record, state in read_left(path, run.manifest):
            if record.trial not in settled:
                writer.append(record.replaced(site=state.site, machine=state.machine if mixed else ""))
        shutil.rmtree(path / JOBS, ignore_errors=True)


def read_broken_off_with_jobs(name: str, runs: Path, *, study: str | None = None) -> Run:
    """As `lorameter.run.resume.read_broken_off`, with what the jobs of a process that was killed have measured."""
    for path in (Path(name), runs / name):
        if (path / JOBS).is_dir() and not store.is_run(path):
            _begin_again(path)
    run = read_broken_off(name, runs, study=study)
    if (run.path / JOBS).is_dir():
        merge_left(run.path)
        run = read_broken_off(name, runs, study=study)
    return run


def _begin_again(path: Path) -> None:
    """Begin a run whose process was killed before the first job had a manifest, if a job has one now."""
    for folder in sorted((path / JOBS).iterdir()):
        spec = read_order(folder).plan
        for found in store.list_runs(folder)[:1]:
            if spec is not None:
                manifest = msgspec.structs.replace(store.read_manifest(found), run=path.name, order=spec.order)
                RunWriter(path.parent, msgspec.structs.replace(manifest, status="running"))
                return


def copy_logs(folder: Path, path: Path) -> None:
    """Copy the logs of a job into those of its run."""
    logs = path / "logs"
    logs.mkdir(exist_ok=True)
    for found in folder.glob("*/logs/*"):
        shutil.copyfile(found, logs / found.name)
    with contextlib.suppress(OSError):  # of a job that was not started
        if text := (folder / LOG).read_text(errors="replace"):
            (logs / f"job-{folder.name}.log").write_text(redact(text))
