"""One variant's profile: an isolated trial in its own process whose steps are taken apart.

It is the trial of any run, by the same worker and the same commands, up to the end of its training. Then its steps are
taken apart, the peaks of the device are measured, and at last the profiler records some steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorameter.errors import InvalidRunError, UsageError
from lorameter.machine.provenance import Machine
from lorameter.models import catalogue, shapes
from lorameter.models.costs.ceiling import product_rate
from lorameter.models.costs.memory import birth_bytes, estimate_phases, stored_dtype
from lorameter.models.costs.peaks import Peak, Rate, stated_peak
from lorameter.profile.facts import Profile
from lorameter.records import codec, fileio
from lorameter.records.activity import ACCOUNTS, ACTIVITY, PEAKS, TRACE, Activity
from lorameter.records.fileio import write_document
from lorameter.records.memory_account import MemoryAccount
from lorameter.records.metrics import RSS_AT_START
from lorameter.records.os_errors import translate_os_errors
from lorameter.records.record import Notice, PartialRecord, TrialRecord
from lorameter.records.store import new_run_id
from lorameter.records.tempdirs import leaving_nothing, scratch_folder
from lorameter.run.feasibility import check_feasible
from lorameter.run.plan import Arm, Plan, Slot, make_plan
from lorameter.run.prepare import RunContext, begin_record, context_of, greet, request_of
from lorameter.run.workers import Executor, TrialFiles, Worker, WorkerLostError
from lorameter.studies.command import COMMANDS
from lorameter.studies.study import Study
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload

DOCUMENT = "profile.json"
"""What a profile's folder holds beside the logs and the profiler's own recording: all facts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTrial:
    """An isolated trial that is there to be taken apart, in a process of its own, and the folder of what it finds."""

    study: str
    trial: ConductedTrial
    folder: Path
    machine: Machine
    notices: tuple[Notice, ...]
    memory_bytes: int
    """What the device had free before, or has in all where that is not known."""
    executor: Executor
    scratch: Path
    label: str

    def read(self, kind: Any, name: str) -> Any:
        """What the trial left in its folder. Raises `InvalidRunError` where that cannot be read."""
        request = self.trial.request
        try:
            data = fileio.read_json(self.executor.fetch(request.trial, name, self.scratch), fileio.MANIFEST_BYTES)
        except fileio.NotReadableError as error:
            raise InvalidRunError(f"{request.variant.name}: {name}: cannot be read: {error}. Measure again.") from None
        return codec.from_json(kind, data, name)

    @property
    def rates(self) -> dict[str, Rate]:
        """What is asked of the device at its best, by what it is a peak of."""
        return {"product": product_rate(self.trial.request.variant), "memory": "memory"}

    def facts(self, activity: str) -> dict[str, Any]:
        """The fields of `lorameter.profile.facts.Watched`, once all is measured; `activity` is the file of what ran."""
        machine, request, record = self.machine, self.trial.request, self.trial.record
        by_rate = self.read(dict[str, Peak], PEAKS)
        measured = {name: by_rate[rate] for name, rate in self.rates.items() if rate in by_rate}
        stated = {name: peak for name, rate in self.rates.items() if (peak := stated_peak(machine.device_name, rate))}
        return {
            "study": self.study,
            "variant": request.variant,
            "workload": request.workload,
            "device": machine.device,
            "device_name": machine.device_name,
            "threads": request.workload.threads,
            "cpus": machine.cpus,
            "wide_registers": machine.avx512_bf16,
            "memory_bytes": self.memory_bytes,
            "record": record.replaced(notices=(*self.notices, *record.notices)),
            "activity": self.read(Activity, activity),
            "peaks": measured | stated,
            "measured_peaks": measured,
        }

    def keep(self, document: str, found: object, traces: Sequence[str]) -> None:
        """Write what was found, and fetch the profiler's own recordings. Raises `UsageError` where the disk refuses."""
        with translate_os_errors(lambda: (f"{self.label} {self.folder.name} could not be written", "measure anew")):
            for trace in traces:
                self.executor.fetch(self.trial.request.trial, trace, self.folder)
            write_document(self.folder / document, found)


@contextlib.contextmanager
def open_trial(
    study: Study,
    variant: Variant,
    executor: Executor,
    *,
    runs: Path,
    say: Callable[[str], None],
    document: str,
    label: str = "profile",
) -> Iterator[OpenTrial]:
    """Start a variant's trial; the folder is removed where `document` has not been written into it by the end, and
    `label` is what it is called.

    Raises:
        UsageError: what cannot work on this machine.
        InvalidRunError: its process did not start.
    """
    if study.workload.ranks > 1:
        raise UsageError(
            f"study {study.name}: ranks = {study.workload.ranks}: a {label} is taken of the trial of one process. "
            f"Take the {label} with one rank; a run of the study says how its ranks spend a step."
        )
    study = dataclasses.replace(study, allow_fallback=True)
    arm = Arm(variant=variant, workload=study.workload)
    machine = executor.machine()
    notices = check_feasible(study, machine, [arm], free_bytes=executor.free_bytes())
    plan = make_plan(study, arms=[arm], phases=("train", "generate"))
    slot = plan.slots[0]
    folder = runs / new_run_id(f"{label}-{variant.name}", runs)
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(leaving_nothing(folder, unless=document))
        stack.callback(executor.close)
        executor.start(folder, study.workload.threads)
        say("preparing tokens")
        tokens = executor.prepare_tokens(study.workload, keep=False)
        if not tokens.synthetic:
            say(f"data {tokens.data}")
        site = context_of(study.workload, tokens, greet(executor, [variant]).device)
        try:
            worker = executor.launch()
        except WorkerLostError as lost:
            raise InvalidRunError(f"{variant.name}: {lost}") from None
        stack.callback(worker.close)
        place = executor.make_place(slot.trial, slot.trial)
        yield OpenTrial(
            study=study.name,
            trial=ConductedTrial(plan, slot, site, place, worker, say),
            folder=folder,
            machine=machine,
            notices=notices,
            memory_bytes=executor.free_bytes() or machine.device_memory_bytes or machine.memory_bytes,
            executor=executor,
            scratch=stack.enter_context(scratch_folder()),
            label=label,
        )


def profile_variant(
    study: Study, variant: Variant, executor: Executor, *, runs: Path, say: Callable[[str], None] = lambda text: None
) -> tuple[Profile, Path]:
    """Measure one variant's profile; returns it and the folder in which it was written.

    A path that the variant asks for and that is not active is a notice here and never a refusal: a profile is what one
    takes to find out why.

    Args:
        study: the workload and the protocol.
        variant: of the study.
        executor: where; it is started and closed here.
        runs: the folder is made in it, beside runs.
        say: is told what is going on.

    Raises:
        UsageError: what cannot work on this machine.
        InvalidRunError: the trial did not end; the message says where its log is.
    """
    with open_trial(study, variant, executor, runs=runs, say=say, document=DOCUMENT) as opened:
        trial, machine = opened.trial, opened.machine
        _conduct(trial, list(opened.rates.values()))
        birth = trial.record.memory.get(RSS_AT_START, birth_bytes(machine.cuda))
        profile = Profile(
            **opened.facts(ACTIVITY),
            memory={"train": opened.read(MemoryAccount, ACCOUNTS["train"])},
            estimates=_estimates(variant, study.workload, machine.device, birth),
        )
        opened.keep(DOCUMENT, profile, (TRACE,))
    return profile, opened.folder


def _estimates(variant: Variant, workload: Workload, device: str, process_bytes: int) -> dict[str, dict[str, int]]:
    """Bytes of a step by kind as expected from the shape, and from what the process began with."""
    try:
        source = catalogue.resolve(workload.model)
        shape, stored = shapes.shape(source), stored_dtype(source)
        found = estimate_phases(variant, workload, shape, device=device, stored=stored, process_bytes=process_bytes)
        return {one.phase: one.kinds for one in found if one.phase == "train"}
    except UsageError:  # a model type whose layers are not known
        return {}


def _conduct(trial: ConductedTrial, rates: list[Rate]) -> None:
    """All of it, in the order in which no measurement is in the way of another."""
    trial.begin()
    trial.ask("finish_training", steps=0)  # peaks and bytes of plain steps, before anything watches them
    trial.ask("memory_breakdown", phase="train")
    trial.ask("profile")
    trial.ask("peak", rates=rates)
    trial.ask("activity")
    trial.end()


class ConductedTrial:
    """One isolated trial, command by command."""

    def __init__(
        self, plan: Plan, slot: Slot, site: RunContext, place: TrialFiles, worker: Worker, say: Callable[[str], None]
    ) -> None:
        self.request = request_of(plan, slot, site, place)
        self._worker = worker
        self._say = say
        self._asked = ""
        self._begin = time.monotonic()
        self.record: TrialRecord = begin_record(slot, "ok").replaced(started_unix_s=time.time(), tokens=site.tokens)

    def begin(self, *, profiled: bool = True) -> None:
        """Build, check, warm up; `profiled` says whether it will be taken apart."""
        self.ask("prepare", request=codec.to_json(self.request), profiled=profiled)
        for command in ("build", "verify", "warm_up"):
            self.ask(command)

    def end(self) -> None:
        """How long it took goes into the record."""
        self.record = self.record.replaced(wall_time_s=time.monotonic() - self._begin)

    def ask(self, command: str, **arguments: Any) -> PartialRecord:
        """What the trial adds to its record. Raises `InvalidRunError` where it comes to no good."""
        self.tell(command)
        trial, timeout_s = self.request.trial, self.request.protocol.step_timeout_s
        return self.take(command, answer_of(lambda: self._worker.ask(command, trial, timeout_s, **arguments)))

    def close(self) -> None:
        """Its process ends; nothing more is asked of it."""
        self._worker.close()

    def tell(self, command: str) -> None:
        """Say what is going on, where it is something else than before."""
        if command != self._asked:
            self._say(COMMANDS[command].label)
        self._asked = command

    def take(self, command: str, fragment: PartialRecord) -> PartialRecord:
        """Add a fragment to the record. Raises `InvalidRunError` for one that says of a failure."""
        self.record = self.record.merged(fragment)
        if fragment.status != "ok":
            raise InvalidRunError(
                f"{self.request.variant.name}: {fragment.status} in {command}: {trouble_in(fragment)}. The log is "
                f"{self.request.log_path}."
            )
        return fragment


def answer_of(ask: Callable[[], PartialRecord]) -> PartialRecord:
    """What a process answers; where it is lost, that it failed."""
    try:
        return ask()
    except WorkerLostError as lost:
        return PartialRecord().failed(lost.status, lost.failure)


def trouble_in(fragment: PartialRecord) -> str:
    """What a fragment says of its failure, without a full stop."""
    failure = fragment.failure
    return f"{failure.kind}: {failure.message.removesuffix('.')}" if failure else "no message"
