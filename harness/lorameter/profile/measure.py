"""Measures a profile: one isolated trial in its own process, whose steps or requests are divided into phases.

Up to the end of its training, the trial is the same as in any run, with the same worker and commands. Then pairs of
plain and divided steps are timed, the peak rates of the device are measured, and finally the profiler records some
steps. Requests are profiled with the adapter unmerged and, in the same process, merged, so that what merging gains is
measured; a cold start in a new interpreter comes last.

A time limit acts in two ways. Timed pairs take at most half of the time that is left (but never less than
`MIN_STEP_PAIRS` pairs), and an optional part that cannot begin before the limit is left out, with a notice. The
required parts are measured however long they take.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorameter.errors import InvalidRunError, UsageError
from lorameter.machine.provenance import Machine
from lorameter.measurements.peaks import RSS_AT_START
from lorameter.models import catalogue, shapes
from lorameter.models.costs.memory import baseline_bytes, estimate_phases, stored_dtype
from lorameter.models.costs.peaks import Peak, Rate, product_rate, stated_peak
from lorameter.profile.facts import Profile, RequestProfile, find_shape
from lorameter.records import codec, fileio
from lorameter.records.activity import (
    ACCOUNTS,
    ACTIVITY,
    MERGED_ACTIVITY,
    MERGED_TRACE,
    PEAKS,
    REQUEST_ACTIVITY,
    REQUEST_FACTS,
    REQUEST_TRACE,
    TRACE,
    Activity,
    RequestFacts,
)
from lorameter.records.fileio import remove_on_failure, scratch_folder, write_document
from lorameter.records.os_errors import translate_os_errors
from lorameter.records.record import Failure, MemoryAccount, Notice, PartialRecord, TrialRecord
from lorameter.records.store import new_run_id
from lorameter.run.budget import SKIPPED
from lorameter.run.feasibility import check_feasible
from lorameter.run.plan import Arm, make_plan
from lorameter.run.prepare import RunContext, begin_record, make_request, validate_worker
from lorameter.run.workers import Executor, Worker, WorkerLostError
from lorameter.studies.request import COMMANDS, TrialRequest
from lorameter.studies.study import Study
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload

DOCUMENT, REQUESTS_DOCUMENT = "profile.json", "profile-requests.json"
"""Files in a profile's folder with all facts; the other files are logs and the profiler's recordings."""
STEPS_S, REQUESTS_S = 30.0, 20.0
"""Seconds for pairs of steps, and for pairs of requests in each state (unmerged, merged); a limit shortens them."""


@dataclass(slots=True, kw_only=True)
class TrialSession:
    """An isolated trial for a profile, in its own process; runs command by command within a time limit."""

    request: TrialRequest
    record: TrialRecord
    executor: Executor
    worker: Worker
    machine: Machine
    memory_bytes: int
    """Free memory of the device before the trial, or its total memory if that is unknown."""
    folder: Path
    """Folder of the results."""
    scratch: Path
    progress: Callable[[str], None]
    begin_s: float
    """When it began, on the monotonic clock; `ends_s` is when it should end."""
    ends_s: float
    skipped: list[str] = field(default_factory=list)
    """Commands that the time limit left out."""
    last_command: str = ""

    @property
    def elapsed_s(self) -> float:
        """Seconds since the trial began."""
        return time.monotonic() - self.begin_s

    def begin(self, *, profiled: bool = True) -> None:
        """Build, check and warm up the trial; `profiled` says whether its steps or requests will be profiled."""
        self.ask("prepare", request=codec.to_json(self.request), profiled=profiled)
        for command in ("build", "verify", "warm_up"):
            self.ask(command)

    def ask(self, command: str, **arguments: Any) -> PartialRecord:
        """Send a command and return the addition to the trial's record. Raises `InvalidRunError` if it fails."""
        self.announce(command)
        trial, timeout_s = self.request.trial, self.request.protocol.step_timeout_s
        return self.add_fragment(command, ask_or_fail(lambda: self.worker.ask(command, trial, timeout_s, **arguments)))

    def announce(self, command: str) -> None:
        """Print the command, unless it repeats the last one."""
        if command != self.last_command:
            self.progress(COMMANDS[command].label)
        self.last_command = command

    def add_fragment(self, command: str, fragment: PartialRecord) -> PartialRecord:
        """Add a fragment to the record. Raises `InvalidRunError` if the fragment reports a failure."""
        self.record = self.record.merged(fragment)
        if fragment.status != "ok":
            raise InvalidRunError(
                f"{self.request.variant.name}: {fragment.status} in {command}: {format_failure(fragment.failure)}. The "
                f"log is {self.request.log_path}."
            )
        return fragment

    def pairs_budget_s(self, usual_s: float) -> float:
        """Seconds for timed pairs: half of the time left, and `usual_s` at most."""
        return max(0.0, min(usual_s, (self.ends_s - time.monotonic()) / 2))

    def has_time(self, command: str, needed_s: float = 0.0) -> bool:
        """Whether an optional part of about `needed_s` fits into the limit; if not, it is recorded as skipped."""
        begins = time.monotonic() + needed_s <= self.ends_s
        self.skipped += [] if begins else [command]
        return begins

    def measure_peaks(self) -> None:
        """Measure the peak rates of the device, if there is time."""
        if self.has_time("peak"):
            self.ask("peak", rates=list(self.rates.values()))

    def read(self, kind: Any, name: str) -> Any:
        """Read a result from the trial's folder."""
        path = self.executor.fetch(self.request.trial, name, self.scratch)
        return codec.from_json(kind, fileio.read_json(path), name)

    @property
    def rates(self) -> dict[str, Rate]:
        """The rates whose peak is measured, by resource."""
        return {"product": product_rate(self.request.variant), "memory": "memory"}

    def facts(self, activity: str) -> dict[str, Any]:
        """The fields of `lorameter.profile.facts.TrialProfile` except the study, after all measurements; `activity` is
        the file of the recorded operators."""
        machine, request = self.machine, self.request
        by_rate = {} if "peak" in self.skipped else self.read(dict[str, Peak], PEAKS)
        measured = {name: by_rate[rate] for name, rate in self.rates.items() if rate in by_rate}
        stated = {name: peak for name, rate in self.rates.items() if (peak := stated_peak(machine.device_name, rate))}
        parts = ", ".join(COMMANDS[command].label for command in self.skipped)
        limit = Notice(code=SKIPPED, message=f"left out within --max-minutes: {parts}.", remedy="Raise --max-minutes.")
        notices = (*self.record.notices, *((limit,) if parts else ()))
        return {
            "variant": request.variant,
            "workload": request.workload,
            "device": machine.device,
            "device_name": machine.device_name,
            "threads": request.workload.threads,
            "cpus": machine.cpus,
            "wide_registers": machine.avx512_bf16,
            "memory_bytes": self.memory_bytes,
            "record": self.record.replaced(notices=notices, wall_time_s=self.elapsed_s),
            "activity": self.read(Activity, activity),
            "peaks": measured | stated,
            "measured_peaks": measured,
        }

    def store(self, document: str, found: object, traces: Sequence[str] = ()) -> None:
        """Write the facts, and copy the profiler's recordings. Raises `UsageError` if they cannot be written."""
        with translate_os_errors(lambda: (f"{self.folder.name} could not be written", "measure again")):
            for trace in traces:
                self.executor.fetch(self.request.trial, trace, self.folder)
            write_document(self.folder / document, found)


@contextlib.contextmanager
def open_trial(
    study: Study,
    variant: Variant,
    executor: Executor,
    *,
    runs: Path,
    progress: Callable[[str], None],
    document: str,
    label: str = "profile",
) -> Iterator[TrialSession]:
    """Start a variant's trial in a new folder. At the end, the folder is removed if `document` has not been written
    into it; `label` is part of its name.

    Raises:
        UsageError: the profile cannot be taken on this machine.
        InvalidRunError: its process did not start.
    """
    if study.workload.ranks > 1:
        raise UsageError(
            f"study {study.name}: ranks = {study.workload.ranks}: a {label} needs a trial of one process. "
            f"Use one rank for the {label}; a run of the study reports how its ranks spend a step."
        )
    ends_s = time.monotonic() + 60 * (study.protocol.max_minutes or math.inf)
    study = dataclasses.replace(study, allow_fallback=True)
    arm = Arm(variant=variant, workload=study.workload)
    machine = executor.machine()
    notices = check_feasible(study, machine, [arm], free_bytes=executor.free_bytes())
    plan = make_plan(study, arms=[arm], phases=("train", "generate"))
    slot = plan.slots[0]
    folder = runs / new_run_id(f"{label}-{variant.name}", runs)
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(remove_on_failure(folder, unless=document))
        stack.callback(executor.close)
        executor.start(folder, study.workload.threads)
        progress("preparing tokens")
        tokens = executor.prepare_tokens(study.workload, keep=False)
        if not tokens.synthetic:
            progress(f"data {tokens.data}")
        context = RunContext(device=validate_worker(executor, [variant]).device, tokens={study.workload: tokens})
        try:
            worker = executor.launch()
        except WorkerLostError as lost:
            raise InvalidRunError(f"{variant.name}: {lost}") from None
        stack.callback(worker.close)
        record = begin_record(slot, "ok")
        request = make_request(plan, slot, context, executor.make_place(slot.trial, slot.trial))
        yield TrialSession(
            request=codec.from_json(TrialRequest, codec.to_json(request), "trial request"),
            record=record.replaced(
                started_unix_s=time.time(), tokens=context.token_facts(study.workload), notices=notices
            ),
            executor=executor,
            worker=worker,
            machine=machine,
            memory_bytes=executor.free_bytes() or machine.device_memory_bytes or machine.memory_bytes,
            folder=folder,
            scratch=stack.enter_context(scratch_folder()),
            progress=progress,
            begin_s=time.monotonic(),
            ends_s=ends_s,
        )


def profile_variant(
    study: Study,
    variant: Variant,
    executor: Executor,
    *,
    runs: Path,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[Profile, Path]:
    """Measure the profile of one variant; returns it and its folder.

    A required path that is not active gives a notice here, not an error: a profile helps to find the cause.

    Args:
        study: the workload, and the protocol with the time limit.
        variant: variant of the study.
        executor: where the trial runs; it is started and closed here.
        runs: the folder of runs, in which the profile's folder is made.
        progress: receives a line for each part that begins.

    Raises:
        UsageError: the profile cannot be taken on this machine.
        InvalidRunError: the trial did not end; the message says where its log is.
    """
    with open_trial(study, variant, executor, runs=runs, progress=progress, document=DOCUMENT) as trial:
        trial.begin()
        trial.ask("finish_training", steps=0)  # peaks and bytes of plain steps, before steps are divided or recorded
        trial.ask("memory_breakdown", phase="train")
        trial.ask("profile", budget_s=trial.pairs_budget_s(STEPS_S))
        trial.measure_peaks()
        trial.ask("activity")
        baseline = trial.record.memory.get(RSS_AT_START, baseline_bytes(trial.machine.cuda))
        profile = Profile(
            study=study.name,
            **trial.facts(ACTIVITY),
            memory=trial.read(MemoryAccount, ACCOUNTS["train"]),
            estimates=_estimates(variant, study.workload, trial.machine.device, baseline),
        )
        trial.store(DOCUMENT, profile, (TRACE,))
    return profile, trial.folder


def profile_requests(
    study: Study,
    variant: Variant,
    executor: Executor,
    *,
    runs: Path,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[RequestProfile, Path]:
    """Measure the profile of one variant's requests; arguments, result and errors are those of `profile_variant`."""
    with open_trial(study, variant, executor, runs=runs, progress=progress, document=REQUESTS_DOCUMENT) as trial:
        trial.begin()
        begin_s = trial.elapsed_s
        trial.ask("finish_training", steps=0)
        trial.ask("save_adapter")
        trial.ask("begin_generate")
        trial.ask("profile_requests", merged=False, budget_s=trial.pairs_budget_s(REQUESTS_S))
        trial.ask("end_generate")
        trial.ask("request_facts")
        trial.ask("memory_breakdown", phase="generate")
        trial.ask("request_activity", merged=False)
        merges = not variant.merge_adapter and trial.has_time("merge")
        if merges:  # the profiler comes after the timing of the same state, and the peaks of the device last
            trial.ask("merge")
            trial.ask("profile_requests", merged=True, budget_s=trial.pairs_budget_s(REQUESTS_S))
            trial.ask("request_activity", merged=True)
        trial.measure_peaks()
        trial.worker.close()
        if trial.has_time("cold", begin_s):
            _start_cold(trial, executor)
        profile = RequestProfile(
            study=study.name,
            **trial.facts(REQUEST_ACTIVITY),
            facts=trial.read(RequestFacts, REQUEST_FACTS),
            merged_activity=trial.read(Activity, MERGED_ACTIVITY) if merges else None,
            memory=trial.read(MemoryAccount, ACCOUNTS["generate"]),
            shape=find_shape(study.workload.model),
        )
        trial.store(REQUESTS_DOCUMENT, profile, (REQUEST_TRACE, MERGED_TRACE) if merges else (REQUEST_TRACE,))
    return profile, trial.folder


def _estimates(variant: Variant, workload: Workload, device: str, process_bytes: int) -> dict[str, int]:
    """Expected bytes of a step by kind, from the shapes and the initial memory of the process."""
    try:
        source = catalogue.resolve(workload.model)
        shape, stored = shapes.shape(source), stored_dtype(source)
        found = estimate_phases(variant, workload, shape, device=device, stored=stored, process_bytes=process_bytes)
        return next((one.kinds for one in found if one.phase == "train"), {})
    except UsageError:  # a model type whose layers are not known
        return {}


def _start_cold(trial: TrialSession, executor: Executor) -> None:
    """Measure a new interpreter after the trial's own process has ended. A failure gives a notice, and earlier
    measurements are kept."""
    trial.announce("cold")
    request = trial.request
    fragment = ask_or_fail(
        lambda: executor.start_interpreter(request.log_path, request.protocol.step_timeout_s, request)
    )
    if fragment.status == "ok":
        trial.add_fragment("cold", fragment)
        return
    notice = Notice(
        code="no-cold-start",
        message=f"the cold start is {fragment.status}: {format_failure(fragment.failure)}.",
        remedy=f"The log is {trial.request.log_path}.",
    )
    trial.record = trial.record.replaced(notices=(*trial.record.notices, notice))


def ask_or_fail(ask: Callable[[], PartialRecord]) -> PartialRecord:
    """The answer of a process; a failed record if the process is lost."""
    try:
        return ask()
    except WorkerLostError as lost:
        return PartialRecord().failed(lost.status, lost.failure)


def format_failure(failure: Failure | None) -> str:
    """Kind and message of a failure, without a full stop."""
    return "no message" if failure is None else f"{failure.kind}: {failure.message.removesuffix('.')}"
