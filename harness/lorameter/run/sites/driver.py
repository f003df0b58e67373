"""Measures a plan in jobs: several at a time, each an ordinary run of some replicates, merged into one run.

Only whole replicates are distributed: their variants take turns in one job, so every ratio is within a site. A job
writes into a folder below the run's (`lorameter.run.sites.folder`), and only this process writes the run. If a job is
lost, another job measures its current replicate from the beginning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lorameter.errors import InvalidRunError, redact, require
from lorameter.machine.provenance import HARDWARE_FIELDS, Machine, fingerprint_fields
from lorameter.records import codec, fileio, store, trials
from lorameter.records.record import Notice, TrialRecord
from lorameter.records.store import Manifest, Run, RunWriter, SiteFacts, is_packed
from lorameter.run.budget import SKIPPED, Budget, skipped_notice
from lorameter.run.display import Display
from lorameter.run.interrupts import InterruptHandler
from lorameter.run.plan import Group, Plan, PlanSpec, list_variants
from lorameter.run.prepare import begin_record
from lorameter.run.resume import SIDE_FIELDS, continue_manifest, read_trusted_manifest
from lorameter.run.runner import find_stop, records_outside
from lorameter.run.sites.folder import JOBS, LOG, ORDER, JobOrder, JobState, read_order, read_state, write_order
from lorameter.run.sites.gpus import LocalJobs
from lorameter.run.sites.slurm import RayJobs, SlurmJobs, cancel_job
from lorameter.run.workers import IfBusy
from lorameter.studies.study_file import read_study
from lorameter.verdicts.compare import Difference, find_differences
from lorameter.verdicts.decision import compare_so_far
from lorameter.verdicts.validity import is_single_script_run

POLL_S = 1.0
"""Seconds between two reads of the jobs' state files, which have a few lines."""
END_TIMEOUT_S = 30.0
"""Seconds for a job that is asked to end, in which it saves its records and kills its processes."""
MAX_LOSSES = 3
"""A site that loses this many jobs in a row gets no further job."""


Launcher = LocalJobs | RayJobs | SlurmJobs
"""Starts the jobs of folders, on this machine, on a Ray cluster or with SLURM. Its `slots` have the name of a site for
each job that can run at a time; a name is empty if the job finds its site itself."""


class MergedRun:
    """The run into which the records of jobs are merged. It begins with the manifest of the first job; every other job
    must agree with that one."""

    def __init__(
        self,
        path: Path,
        begin: Callable[[Run], Manifest],
        *,
        earlier: Manifest | None = None,
        records: Iterable[TrialRecord] = (),
        mixed: bool = False,
        saved: Callable[[TrialRecord], object] = lambda record: None,
    ) -> None:
        """
        Args:
            path: folder of the run.
            begin: makes the run's manifest of the run of the first job.
            earlier: manifest of a run that is resumed, maybe by another version of lorameter.
            records: those that the run has already.
            mixed: whether the kinds of machines may differ.
            saved: receives each record that is merged.
        """
        self.writer: RunWriter | None = None
        self.records = {record.trial: record for record in records}
        self.sites: dict[str, SiteFacts] = {}
        self.notices: list[Notice] = []
        self.stopped = None if earlier is None else earlier.stopped
        self.skipped = set[str]() if earlier is None else set(earlier.skipped)
        self._path, self._begin_manifest, self._first = path, begin, earlier
        self._mixed, self._saved = mixed, saved

    def merge(self, folder: Path, state: JobState, *, everything: bool = False) -> set[int]:
        """Save the logs, notices and records of a job; returns the replicates of its records. The unfinished replicate
        of a lost job is left out unless `everything` is true. Raises `InvalidRunError`, and saves no record, for a job
        that does not agree with the run."""
        copy_logs(folder, self._path)
        if not (runs := store.list_runs(folder)):
            return set()
        run = store.read_run(str(runs[0]), folder)
        notices = tuple(notice for notice in run.manifest.notices if notice.code != SKIPPED)  # of this job only
        self.notices += notices
        self.stopped = self.stopped or run.manifest.stopped
        self.skipped |= set(run.manifest.skipped)
        manifest = msgspec.structs.replace(run.manifest, notices=notices)
        self._check_alike(dataclasses.replace(run, manifest=manifest), state.site)
        assert self.writer is not None  # the manifest came before
        records = [one for one in run.records if one.status != "not_run"]
        if not everything and (state.error or not state.ended):
            last = max((record.replicate for record in records), default=0)
            records = [record for record in records if record.replicate != last]
        for record in records:
            if record.trial not in self.records:
                record = record.replaced(site=state.site, machine=state.machine if self._mixed else "")
                self.writer.append(record)
                self.records[record.trial] = record
                self._saved(record)
        return {record.replicate for record in records}

    def _check_alike(self, run: Run, site: str) -> None:
        """Check that the run of a job agrees with the first one, with which this run begins."""
        first, manifest = self._first, run.manifest
        again = first is not None and self.writer is None
        if first is not None and (unlike := find_unlike(first, manifest, mixed=self._mixed, again=again)):
            fields = "; ".join(f"{one.field} is {one.candidate!r} there and {one.base!r} here" for one in unlike[:3])
            of_kind = all(one.field in HARDWARE_FIELDS for one in unlike)
            raise InvalidRunError(
                f"site {site} is unlike the first: {fields}. Measure it in a run of its own: leave it out by --sites "
                f"on Ray, by nodelist, exclude or constraint on SLURM"
                f"{', or have each site judged by itself by --mixed' if of_kind else ''}."
            )
        machine = {name: manifest.provenance[name] for name in Machine.__dataclass_fields__}
        self.sites[site] = SiteFacts(machine=machine, fingerprint=manifest.fingerprint)
        if self.writer is None:
            self._first, self.writer = manifest, RunWriter(self._path.parent, self._begin_manifest(run))

    def in_order(self, plan: Plan) -> tuple[TrialRecord, ...]:
        """The records so far, in the order of the plan."""
        return tuple(self.records[slot.trial] for slot in plan.slots if slot.trial in self.records)


def find_unlike(first: Manifest, other: Manifest, *, mixed: bool, again: bool) -> list[Difference]:
    """Differences from the first job that make a comparison impossible: machine, libraries, tokens or sides.

    `mixed`: whether the kinds of machines may differ; `again`: whether the version of lorameter may differ.
    """
    declared = [name for side in other.sides.values() for name in side["declared"]]
    without = (*declared, *(HARDWARE_FIELDS if mixed else ()))

    def likeness(manifest: Manifest) -> dict[str, Any]:
        sides = {
            name: {field: (side.get("facts") or {}).get(field) for field in SIDE_FIELDS}
            for name, side in manifest.sides.items()
        }
        return {
            "harness": None if again else manifest.provenance["worker"]["harness"],
            "interleaving": manifest.interleaving,
            "tokens": {"hash": manifest.tokens.get("hash"), "own": manifest.tokens.get("own")},
            **sides,
            **codec.to_json(fingerprint_fields(manifest.provenance, without)),
        }

    return find_differences(likeness(first), likeness(other))


def copy_logs(folder: Path, path: Path) -> None:
    """Copy the logs of a job into those of its run."""
    logs = path / "logs"
    logs.mkdir(exist_ok=True)
    for log in folder.glob("*/logs/*"):
        shutil.copyfile(log, logs / log.name)
    with contextlib.suppress(OSError):  # the job was not started
        if text := (folder / LOG).read_text(errors="replace"):
            (logs / f"job-{folder.name}.log").write_text(redact(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A running job."""

    folder: Path
    slot: str
    replicates: tuple[int, ...]


def measure_in_jobs(
    plan: Plan, groups: Sequence[Group], launcher: Launcher, path: Path, earlier: Run | None, display: Display,
    stops: InterruptHandler, *, local: bool, if_busy: IfBusy, notices: tuple[Notice, ...],
    policy: Mapping[str, Any],
) -> None:  # fmt: skip
    """Measure the rest of a plan into the folder of its run, which this process has locked.

    Args:
        plan: the whole plan.
        groups: the remaining groups.
        launcher: launcher of the jobs.
        path: folder of the run.
        earlier: the interrupted run, if it is resumed.
        display: display of the progress.
        stops: handles signals.
        local: whether the sites are on this machine.
        if_busy: the action of a job if its device is in use; "share" if this process holds the devices.
        notices: notices for the manifest, in addition to those of the jobs.
        policy: policy for the manifest.

    Raises:
        UsageError: the study cannot be measured.
        InvalidRunError: the sites differ, or all of them have lost their jobs.
    """
    minutes, mixed = plan.study.protocol.max_minutes, plan.study.protocol.mixed

    def begin(first: Run) -> Manifest:
        if earlier is not None:
            return continue_manifest(earlier.manifest, first.manifest, minutes)
        return msgspec.structs.replace(
            first.manifest,
            run=path.name,
            status="running",
            study=codec.to_json(plan.study),
            # What --resume executes is of this process, not of a file.
            sides={name: first.manifest.sides[name] | side.to_json() for name, side in plan.sides.items()},
            sites=launcher.slots if mixed and local else (),
            order=tuple(slot.trial for slot in plan.slots),
            created_unix_s=time.time(),
            notices=tuple(dict.fromkeys((*notices, *first.manifest.notices))),
            policy=dict(policy),
        )

    merged = MergedRun(
        path, begin, earlier=None if earlier is None else earlier.manifest, mixed=mixed, saved=display.trial_ended,
        records=records_outside(groups, earlier.records if earlier else ()),
    )  # fmt: skip
    error: BaseException | None = None
    stopped = None
    with contextlib.ExitStack() as stack:
        (path / JOBS).mkdir(mode=0o700, exist_ok=True)
        stack.callback(shutil.rmtree, path / JOBS, ignore_errors=True)
        stack.callback(launcher.close)
        jobs = _Jobs(plan, groups, launcher, path, merged, display, if_busy=if_busy)
        try:
            stopped = jobs.run(stops)
        except BaseException as raised:
            error = raised
        jobs.end(everything=error is not None)
        interrupted = isinstance(error, KeyboardInterrupt)
        if merged.writer is not None:
            with contextlib.suppress(*((InvalidRunError, OSError) if error else ())):  # report `error` instead
                status: store.RunStatus = "interrupted" if interrupted else "failed" if error else "complete"
                _finish(plan, merged, status, stopped)
    if error is not None and not (interrupted and merged.writer is not None):
        raise error


def _finish(plan: Plan, merged: MergedRun, status: store.RunStatus, stopped: str | None) -> None:
    """End a run, with a record for each unmeasured trial."""
    assert merged.writer is not None  # a job that measured nothing ended with an error
    writer, protocol = merged.writer, plan.study.protocol
    records = merged.in_order(plan)
    notices = merged.notices
    if status != "complete":
        for slot in plan.slots:
            if slot.trial not in merged.records:
                writer.append(begin_record(slot, "not_run"))
    elif protocol.max_minutes is not None:
        count = len({record.replicate for record in records if record.status == "ok"})
        notices = [*notices, *skipped_notice(merged.skipped, count, protocol.replicates, 0.0)]
    known = store.read_manifest(writer.path).notices
    writer.finish(
        status,
        stopped=stopped or merged.stopped,
        measured=[record.trial for record in records] if status == "complete" else None,
        notices=tuple(one for one in dict.fromkeys(notices) if one not in known),
        new_sites=merged.sites,
        skipped=tuple(sorted(merged.skipped)),
    )


class _Jobs:
    """The jobs of one run: starts a job when a site is free, and restarts lost jobs."""

    def __init__(
        self, plan: Plan, groups: Sequence[Group], launcher: Launcher, path: Path, merged: MergedRun,
        display: Display, *, if_busy: IfBusy,
    ) -> None:  # fmt: skip
        """A job measures one replicate, so that a queued job delays no other; with a time limit, or if sites differ, it
        measures all replicates of a site."""
        self._plan, self._groups, self._launcher, self._merged = plan, groups, launcher, merged
        self._folder, self._if_busy, self._display = path / JOBS, if_busy, display
        self._free = deque(launcher.slots)
        self._losses: Counter[str] = Counter()
        self._jobs: list[Job] = []
        left = sorted({group.replicate for group in groups})
        self._each = math.ceil(len(left) / len(self._free))
        """Replicates of each site."""
        parts = [[replicate] for replicate in left]
        if plan.study.protocol.mixed or plan.study.protocol.max_minutes is not None:
            parts = [left[first :: len(self._free)] for first in range(len(self._free))]
        self._waiting = deque(tuple(part) for part in parts if part)

    def run(self, stops: InterruptHandler) -> str | None:
        """Measure all replicates; returns the reason if it stopped early."""
        unlimited = Budget()  # each job enforces the time limit itself
        while self._waiting or self._jobs:
            with stops.interruptible():
                while self._waiting and self._free:
                    self._start(self._waiting.popleft(), self._free.popleft())
                if not self._jobs:
                    last = self._merged.notices[-1]
                    raise InvalidRunError(f"{last.message} No site is left. {last.remedy}")
                time.sleep(POLL_S)
                ended = self._pop_ended()
            for job, end in ended:
                state = read_state(job.folder)
                self._judge(job, state, end, self._merged.merge(job.folder, state))
                if reason := self._find_stop(unlimited):
                    return reason
        return None

    def _find_stop(self, unlimited: Budget) -> str | None:
        """The reason to measure no further replicate, by the replicates that are merged."""
        records, writer = self._merged.in_order(self._plan), self._merged.writer
        compared = compare_so_far(store.read_manifest(writer.path), records) if writer else {}
        self._display.judged(compared)
        return find_stop(self._plan, unlimited, records, compared)

    def _pop_ended(self) -> list[tuple[Job, str]]:
        """Remove the jobs that have ended from the running ones, and return them with how they ended, if known."""
        ends = [(job, self._launcher.describe_end(job.folder)) for job in self._jobs]
        ended = [(job, end or "") for job, end in ends if end or read_state(job.folder).ended]
        self._jobs = [job for job in self._jobs if job not in dict(ended)]
        return ended

    def end(self, *, everything: bool) -> None:
        """Cancel the remaining jobs, wait for them, and save the replicates that they have finished, or
        `everything`."""
        folders = set(self._folder.glob("*")) if everything else set[Path]()
        with contextlib.suppress(Exception):  # no error may prevent saving the records
            self._launcher.cancel()
            deadline = time.monotonic() + END_TIMEOUT_S
            while self._jobs and time.monotonic() < deadline:
                folders |= {job.folder for job, _ in self._pop_ended()}
                time.sleep(POLL_S / 10)
        for folder in sorted(folders):
            with contextlib.suppress(InvalidRunError, OSError):  # the job may not agree with the others
                self._merged.merge(folder, read_state(folder), everything=everything)

    def _start(self, replicates: tuple[int, ...], slot: str) -> None:
        folder = self._folder / f"{len(list(self._folder.iterdir())):04}"
        folder.mkdir()
        study = self._plan.study.with_protocol(until_decided=False)  # a job judges nothing: it has a part of the run
        if (minutes := study.protocol.max_minutes) is not None:  # less for the rest of a lost job
            limit = minutes * min(1, len(replicates) / self._each)
            study = study.with_protocol(max_minutes=limit)
        plan = PlanSpec(
            study=codec.to_json(study),
            phases=self._plan.phases,
            selection=tuple(variant.name for variant in list_variants(self._plan.arms)),
            interleaving=self._plan.interleaving,
            why=self._plan.why,
            order=tuple(slot.trial for slot in self._plan.slots),
            trials=tuple(one.trial for group in self._groups if group.replicate in replicates for one in group.slots),
            sides=dict(self._plan.sides),
        )
        digest = write_order(folder, JobOrder(plan=plan, site=slot, cwd=str(Path.cwd()), if_busy=self._if_busy))
        self._launcher.start(folder, slot, digest)
        self._jobs.append(Job(folder=folder, slot=slot, replicates=replicates))

    def _judge(self, job: Job, state: JobState, end: str, measured: set[int]) -> None:
        """Free the site of a job that has ended, and queue its replicates that are not `measured`.

        Raises `UsageError` for an error that the user must fix.
        """
        require(not state.usage, state.error)
        if state.ended and not state.error:  # a missing replicate had no time
            self._losses[job.slot] = 0
            self._free.append(job.slot)
            return
        self._losses[job.slot] += 1
        if self._losses[job.slot] < MAX_LOSSES:
            self._free.append(job.slot)
        left = tuple(replicate for replicate in job.replicates if replicate not in measured)
        if left:
            self._waiting.appendleft(left)
        why = state.error or end
        self._merged.notices.append(
            Notice(
                code="site-lost",
                message=f"site {state.site or job.slot or 'of a job'} was lost: {why.rstrip('.')}. Of its replicates "
                f"{len(left)} are measured again from their start.",
                remedy=f"See logs/job-{job.folder.name}.log; lorameter run --resume resumes what is missing.",
            )
        )


# --- resuming -----------------------------------------------------------------------------------------------------


def read_interrupted_run(name: str, runs: Path, *, study: str | None = None, trust: bool = False) -> Run:
    """The run to resume, by id or directory, after merging the records left by jobs of a killed process; it may also be
    complete (`is_finished`).

    Args:
        name: a run id, or a run directory.
        runs: the folder of runs.
        study: expected name of the study; None for any.
        trust: whether commands are executed that another user may have written.

    Raises:
        UsageError, InvalidRunError: the run does not exist, is of another study, or cannot be resumed.
    """
    for path in (Path(name), runs / name):
        if (path / JOBS).is_dir():
            merge_leftover_jobs(path, trust=trust)
    run = store.read_run(name, runs)
    manifest = run.manifest
    require(
        study is None or manifest.study.get("name") == study,
        f"run {manifest.run} is of study {manifest.study.get('name')!r}, not {study!r}. Leave the study out: the "
        "run holds its own.",
    )
    require(
        not is_single_script_run(run, read_study(run)),
        f"run {manifest.run}: it is of a training that was followed while it ran, which cannot be resumed. "
        "Run it again.",
    )
    require(not run.live, store.refusal_while_live(run.path))
    require(
        not is_packed(run.path),
        f"{run.path}: it is packed, and has no folder to write to. Resume it where it was measured.",
    )
    require(
        run.path.resolve().name == manifest.run,
        f"{run.path}: holds run {manifest.run}. Give the directory that name again.",
    )
    for name in (store.TRIALS, trials.CHECKS):
        fileio.check_appendable(run.path / name)
    return dataclasses.replace(run, manifest=read_trusted_manifest(run, trust=trust))


def merge_leftover_jobs(path: Path, *, trust: bool) -> None:
    """Merge the records left by jobs of a killed process into their run, and remove the jobs. A run without a manifest
    begins with that of the first job. Raises `UsageError` if another user may have written its commands, unless `trust`
    is true.

    Running SLURM jobs are cancelled first; other jobs ended with the process.
    """
    with store.lock_run(path):
        run = store.read_run(str(path), path.parent) if store.is_run(path) else None
        manifest = None if run is None else read_trusted_manifest(run, trust=trust)
        # A job that was killed before its order was written has measured nothing.
        folders = sorted(order.parent for order in (path / JOBS).glob(f"*/{ORDER}"))
        plans = [plan for folder in folders if (plan := read_order(folder, None).plan) is not None]

        def begin(first: Run) -> Manifest:
            return manifest or msgspec.structs.replace(
                read_trusted_manifest(first, trust=trust), run=path.name, order=plans[0].order, status="running"
            )

        mixed = bool(plans and plans[0].study["protocol"].get("mixed"))
        settled = [record for record in (() if run is None else run.records) if record.settled]
        merged = MergedRun(path, begin, earlier=manifest, records=settled, mixed=mixed)
        deadline = time.monotonic() + END_TIMEOUT_S
        for folder in folders:
            while cancel_job(folder) and not read_state(folder).ended and time.monotonic() < deadline:
                time.sleep(POLL_S)
            with contextlib.suppress(InvalidRunError):  # the job does not agree with the run
                merged.merge(folder, read_state(folder), everything=True)
        shutil.rmtree(path / JOBS, ignore_errors=True)
