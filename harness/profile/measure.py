"""One variant's profile: a solo trial in its own process, watched from its first step to its last token.

It is the trial of any run, by the same worker and the same commands, up to the end of its training. Then its steps are
taken apart, it answers requests, the device shows what it does at best, and at last the profiler records some steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

from harness.errors import InvalidRunError, UsageError
from harness.models import catalogue, shapes
from harness.models.costs.ceiling import product_rate
from harness.models.costs.memory import birth_bytes, estimate_memory, stored_dtype
from harness.models.costs.peaks import Peak, Rate, stated_peak
from harness.profile.facts import Profile
from harness.records import codec, inputs
from harness.records.activity import ACCOUNTS, ACTIVITY, PEAKS, TRACE, Activity
from harness.records.document import write_document
from harness.records.memory_account import MEMORY_PHASES, MemoryAccount
from harness.records.metrics import BIRTH
from harness.records.record import Fragment, TrialRecord
from harness.records.refusals import say_refused
from harness.records.scratch import leaving_nothing, scratch_folder
from harness.records.store import new_run_id
from harness.run.contenders import Contender
from harness.run.executors import Executor, Place, Worker, WorkerLostError
from harness.run.feasibility import check_feasible
from harness.run.measure import greet
from harness.run.plan import Plan, Slot, make_plan
from harness.run.site import Site, begin_record, request_of, site_of
from harness.studies.command import COMMANDS
from harness.studies.study import Study
from harness.studies.variant import Variant
from harness.studies.workload import Workload

DOCUMENT = "profile.json"
"""What a profile's folder holds beside the logs and the profiler's own recording: all facts."""
LEAST_REQUESTS = 8
"""The median of fewer than 6 has no interval."""


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
        InvalidRunError: the trial did not come to its end; the message says where its log is.
    """
    if study.workload.ranks > 1:
        raise UsageError(
            f"study {study.name}: ranks = {study.workload.ranks}: the profile takes apart the steps of one process. "
            "Profile the variant with one rank; a run of the study says how its ranks spend a step."
        )
    study = dataclasses.replace(study, allow_fallback=True)
    contender = Contender(variant=variant, workload=study.workload)
    machine = executor.machine()
    notices = check_feasible(study, machine, [contender], free_bytes=executor.free_bytes())
    plan = make_plan(study, contenders=[contender], phases=("train", "generate"))
    slot = plan.slots[0]
    folder = runs / new_run_id(f"profile-{variant.name}", runs)
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(leaving_nothing(folder, unless=DOCUMENT))
        stack.callback(executor.close)
        executor.start(folder, study.workload.threads)
        say("preparing tokens")
        tokens = executor.prepare_tokens(study.workload, keep=False)
        if not tokens.synthetic:
            say(f"data {tokens.data}")
        site = site_of(study.workload, tokens, greet(executor, [variant]).device)
        try:
            worker = executor.launch()
        except WorkerLostError as lost:
            raise InvalidRunError(f"{variant.name}: {lost}") from None
        stack.callback(worker.close)
        place = executor.make_place(slot.trial, slot.trial)
        trial = _Trial(plan, slot, site, place, worker, say)
        has = executor.free_bytes() or machine.device_memory_bytes or machine.memory_bytes
        rates: dict[str, Rate] = {"product": product_rate(variant), "memory": "memory"}
        trial.conduct(list(rates.values()))
        found = stack.enter_context(scratch_folder())

        def read(kind: Any, name: str) -> Any:
            """What the trial left in its folder."""
            try:
                data = inputs.read_json(executor.fetch(slot.trial, name, found), inputs.MANIFEST_BYTES)
            except inputs.NotReadableError as error:
                raise InvalidRunError(f"{variant.name}: {name}: cannot be read: {error}. Profile again.") from None
            return codec.from_json(kind, data, name)

        by_rate = read(dict[str, Peak], PEAKS)
        measured = {name: by_rate[rate] for name, rate in rates.items() if rate in by_rate}
        stated = {name: peak for name, rate in rates.items() if (peak := stated_peak(machine.device_name, rate))}
        birth = trial.record.memory.get(BIRTH, birth_bytes(machine.cuda))
        profile = Profile(
            study=study.name,
            variant=variant,
            workload=study.workload,
            device=cast(Literal["cpu", "cuda"], machine.device),
            device_name=machine.device_name,
            threads=study.workload.threads,
            cpus=machine.cpus,
            wide_registers=machine.avx512_bf16,
            memory_bytes=has,
            record=trial.record.replaced(notices=(*notices, *trial.record.notices)),
            activity=read(Activity, ACTIVITY),
            memory={phase: read(MemoryAccount, name) for phase, name in ACCOUNTS.items()},
            peaks=measured | stated,
            measured_peaks=measured,
            estimates=_estimates(variant, study.workload, machine.device, birth),
        )
        with say_refused(lambda: (f"profile {folder.name} could not be written", "profile anew")):
            executor.fetch(slot.trial, TRACE, folder)
            write_document(folder / DOCUMENT, profile)
    return profile, folder


def _estimates(variant: Variant, workload: Workload, device: str, process_bytes: int) -> dict[str, dict[str, int]]:
    """Bytes by kind as expected from the shape, and from what the process began with, by phase."""
    try:
        source = catalogue.resolve(workload.model)
        shape, stored = shapes.shape(source), stored_dtype(source)
        return {
            phase: estimate_memory(
                variant, workload, shape, phase=phase, device=device, stored=stored, process_bytes=process_bytes
            ).kinds
            for phase in MEMORY_PHASES
        }
    except UsageError:  # a model type whose layers are not known
        return {}


class _Trial:
    """One solo trial, command by command."""

    def __init__(
        self, plan: Plan, slot: Slot, site: Site, place: Place, worker: Worker, say: Callable[[str], None]
    ) -> None:
        self._request = request_of(plan, slot, site, place)
        self._requests = max(LEAST_REQUESTS, plan.study.protocol.generate_requests)
        self._worker = worker
        self._say = say
        self._asked = ""
        self._begin = time.monotonic()
        self.record: TrialRecord = begin_record(slot, "ok").replaced(started_unix_s=time.time(), tokens=site.tokens)

    def conduct(self, rates: list[Rate]) -> None:
        """All of it, in the order in which no measurement is in the way of another."""
        self._ask("prepare", request=codec.to_json(self._request), profiled=True)
        self._ask("build")
        self._ask("verify")
        self._ask("warm_up")
        self._ask("finish_training", steps=0)  # peaks and bytes of plain steps, before anything watches them
        self._ask("account", phase="train")
        self._ask("profile")
        self._ask("begin_generate")
        for _ in range(self._requests):
            self._ask("request")
        self._ask("end_generate")
        self._ask("account", phase="generate")
        self._ask("peak", rates=rates)
        self._ask("activity")
        self.record = self.record.replaced(wall_time_s=time.monotonic() - self._begin)

    def _ask(self, command: str, **arguments: Any) -> Fragment:
        if command != self._asked:
            self._say(COMMANDS[command].says)
        self._asked = command
        request = self._request
        try:
            fragment = self._worker.ask(command, request.trial, request.protocol.step_timeout_s, **arguments)
        except WorkerLostError as lost:
            fragment = Fragment().failed(lost.status, lost.failure)
        self.record = self.record.merged(fragment)
        if fragment.status != "ok":
            failure = fragment.failure
            said = f"{failure.kind}: {failure.message.removesuffix('.')}" if failure else "it says nothing"
            raise InvalidRunError(
                f"{request.variant.name}: {fragment.status} in {command}: {said}. The log is {request.log_path}."
            )
        return fragment
