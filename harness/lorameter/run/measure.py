"""Measures a study into a run on disk; used by the command line and the pytest plugin.

Cheap steps come first: all refusals, then the start of the worker, then the preparation of tokens, and only then the
measurement.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lorameter.errors import InvalidRunError, require
from lorameter.machine import provenance
from lorameter.machine.provenance import MachineFacts
from lorameter.models.catalogue import cache_dir
from lorameter.records import codec, store
from lorameter.records.fileio import remove_on_failure
from lorameter.records.os_errors import translate_os_errors
from lorameter.records.record import Notice, TokenSummary
from lorameter.records.store import Manifest, Run, RunWriter
from lorameter.run.budget import Budget, TimeLimitTooShortError, skipped_notice
from lorameter.run.build_plan import probe_memory
from lorameter.run.display import Display, guard_display
from lorameter.run.interrupts import InterruptHandler, handle_interrupts
from lorameter.run.plan import Group, Plan, executor_name, list_variants
from lorameter.run.prepare import RunContext, prepare_run
from lorameter.run.resume import check_same, continue_manifest, is_finished, mark_complete
from lorameter.run.runner import PlanRun, find_unfinished, run_plan
from lorameter.run.sites.driver import measure_in_jobs
from lorameter.run.sites.placement import Placement
from lorameter.run.workers import Executor, open_executor
from lorameter.run.workers.sides import DECLARED, open_side
from lorameter.studies.script import OWN
from lorameter.studies.workload import Workload
from lorameter.verdicts.decision import compare_so_far


def _describe_tokens(plan: Plan, prepared: Mapping[Workload, TokenSummary]) -> dict[str, Any]:
    """The tokens of a run for its manifest: those of the study's workload and, under `own`, those of other workloads of
    variants."""
    described = {
        workload: {key: value for key, value in codec.to_json(tokens).items() if key != "path"}
        for workload, tokens in prepared.items()
    }
    own = {name: described[workload] for name, workload in plan.own_workloads.items()}
    return described.get(plan.study.workload, _OWN_TOKENS) | ({"own": own} if own else {})


_OWN_TOKENS = {
    "hash": OWN, "data": "what the scripts themselves read", "synthetic": False, "tokenizer_substituted": False,
    "train_sequences": 0, "real_tokens": 0, "padded_tokens": 0, "records": 0, "loss_tokens": None, "without_loss": 0,
    "examples": [],
}  # fmt: skip
"""Stands for tokens that only the processes of the variants know."""


def measure(
    plan: Plan,
    *,
    runs: Path,
    display: Display,
    notices: tuple[Notice, ...] = (),
    resume: Run | None = None,
    policy: Mapping[str, Any] | None = None,
    placement: Placement | None = None,
) -> Run:
    """Measure a plan into a run directory and read it back. The first side prepares the tokens of all sides.

    Args:
        plan: the plan to measure; the sides of an A/B are prepared here and removed at the end.
        runs: where the run is written.
        display: shows the progress.
        notices: notices known before the start.
        resume: the run of this plan (`lorameter.run.resume`) to resume; None for a new one.
        policy: policy of the gate that will judge the run, as JSON data for the manifest.
        placement: where to measure; with several sites, the measurement runs in jobs.

    Raises:
        UsageError: the data cannot be read, a side cannot be prepared or differs from that of the run to resume,
            another process writes the run or its tokens differ, or the time limit is too short for one replicate.
        InvalidRunError: no worker could be started, or its device differs from that of the plan.
    """
    placement = placement or Placement()
    run_id = resume.manifest.run if resume else store.new_run_id(plan.study.name, runs)
    folder, display = runs / run_id, guard_display(display)
    with handle_interrupts() as stops, contextlib.ExitStack() as stack:
        stack.enter_context(translate_os_errors(lambda: store.describe_failed_write(folder)))
        stack.enter_context(remove_on_failure(folder, unless=store.MANIFEST))
        stack.enter_context(store.lock_run(folder))
        earlier = store.read_run(str(folder), runs) if resume else None  # read only now: no other process writes it
        if earlier is not None and resume is not None:
            require(
                all(getattr(earlier.manifest, key) == getattr(resume.manifest, key) for key in ("study", "sides")),
                f"run {run_id}: its manifest was replaced while it was resumed. Resume it again.",
            )
        groups = find_unfinished(plan, earlier.records if earlier else (), whole=placement.launcher is not None)
        if earlier is not None and not groups:
            return earlier if is_finished(earlier) else mark_complete(earlier)
        if placement.launcher is None:
            _measure_here(plan, groups, folder, earlier, display, stops, stack, notices, policy or {})
        else:
            display.starting(dataclasses.replace(plan, groups=groups), run_id)
            measure_in_jobs(
                plan, groups, placement.launcher, folder, earlier, display, stops, notices=notices, policy=policy or {},
                local=not placement.is_remote, if_busy=placement.if_busy,
            )  # fmt: skip
    return store.read_run(str(folder), runs)


def _measure_here(
    plan: Plan, groups: Sequence[Group], folder: Path, earlier: Run | None, display: Display, stops: InterruptHandler,
    stack: contextlib.ExitStack, notices: tuple[Notice, ...], policy: Mapping[str, Any],
) -> None:  # fmt: skip
    """Measure the rest of a plan on this machine: prepare everything, then measure replicate by replicate."""
    rest, known = dataclasses.replace(plan, groups=tuple(groups)), earlier.records if earlier else ()
    executors = _open_executors(plan, earlier, stack, stops)
    threads = {executor_name(arm, plan.arms): arm.workload.threads for arm in plan.arms}
    display.starting(rest, folder.name)
    minutes = plan.study.protocol.max_minutes
    budget = Budget(
        None if minutes is None else 60 * minutes,
        replicates=len({group.replicate for group in groups}),
        skipped=earlier.manifest.skipped if earlier else (),
    )
    with stops.interruptible():
        for name, executor in executors.items():
            stack.callback(executor.close)
            executor.start(folder, threads[name])
        context = prepare_run(rest, executors, display)
        facts = _facts(plan, executors)
        budget.import_s, budget.load_s = context.hello.import_time_s, context.bases.load_s
        notices = (*notices, *context.bases.notices)
        if plan.provisional:
            plan, failures = probe_memory(plan, executors, context, display)
            display.rehearsed(plan, failures)
            notices = (*notices, *failures)
    manifest = _new_manifest(plan, folder.name, context, facts, notices, policy)
    if earlier is not None:
        manifest = continue_manifest(earlier.manifest, manifest, minutes)
    writer = RunWriter(folder.parent, manifest)
    stack.enter_context(writer.refusals())
    stack.enter_context(_finishing_after_errors(writer))
    measured = run_plan(
        plan, executors, context, save=writer.append, display=display, budget=budget, earlier=known, stops=stops,
        compare=partial(compare_so_far, manifest),
    )  # fmt: skip
    _finish(writer, plan, budget, measured, stopped=manifest.stopped)


def _open_executors(
    plan: Plan, earlier: Run | None, stack: contextlib.ExitStack, stops: InterruptHandler
) -> dict[str, Executor]:
    """The executors of a plan by name, not yet started. For an A/B they are in the hosts of its sides, which `stack`
    removes. Raises `UsageError` if a side differs from that of the `earlier` run."""
    with stops.interruptible():
        hosts = {
            name: stack.enter_context(open_side(side, repository=Path.cwd(), cache=cache_dir()))
            for name, side in plan.sides.items()
        }
    sides = {executor_name(arm, plan.arms): arm.side for arm in plan.arms}
    executors = {
        name: open_executor(plan.study.form.executor, host=hosts.get(side), label=name) for name, side in sides.items()
    }
    if earlier is not None and plan.sides:
        check_same(earlier, _facts(plan, executors))
    return executors


def _facts(plan: Plan, executors: Mapping[str, Executor]) -> dict[str, MachineFacts]:
    """Facts about the machine; for an A/B, of each side."""
    names: Iterable[str] = plan.sides or list(executors)[:1]
    return {name: executors[name].facts() for name in names}


def _new_manifest(
    plan: Plan, run_id: str, context: RunContext, facts: Mapping[str, MachineFacts], notices: tuple[Notice, ...],
    policy: Mapping[str, Any],
) -> Manifest:  # fmt: skip
    first = next(iter(facts.values()))
    collected = provenance.collect(plan.study, first, plan.study.workload.threads, context.hello, plan.own_workloads)
    declared = sorted({name for side in plan.sides.values() for name in DECLARED[side.kind]})
    return Manifest(
        run=run_id,
        study=codec.to_json(plan.study),
        phases=plan.phases,
        selection=tuple(variant.name for variant in list_variants(plan.arms)),
        own_workloads=codec.to_json(plan.own_workloads),
        interleaving=plan.interleaving,
        why=plan.why,
        order=tuple(slot.trial for slot in plan.slots),
        seed=plan.study.protocol.seed,
        created_unix_s=time.time(),
        provenance=collected,
        fingerprint=provenance.fingerprint(collected, without=declared),
        tokens=_describe_tokens(plan, context.tokens),
        bases=context.bases.summaries,
        notices=notices,
        sides={
            name: side.to_json()
            | {"declared": list(DECLARED[side.kind]), "worker": context.hellos[name].harness, "facts": facts[name].host}
            for name, side in plan.sides.items()
        },
        policy=dict(policy),
    )


@contextlib.contextmanager
def _finishing_after_errors(writer: RunWriter) -> Iterator[None]:
    """If an error ends the run, write its status into the manifest. A run that has measured nothing is removed."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(InvalidRunError, OSError):  # report the first error, not one of the cleanup
            if isinstance(error, TimeLimitTooShortError) and not (writer.path / store.TRIALS).exists():
                (writer.path / store.MANIFEST).unlink()
            else:
                writer.finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise


def _finish(writer: RunWriter, plan: Plan, budget: Budget, measured: PlanRun, *, stopped: str | None) -> None:
    notices: tuple[Notice, ...] = ()
    if budget.limit_s is not None and not measured.interrupted:
        count = len({record.replicate for record in measured.records if record.status == "ok"})
        planned = plan.study.protocol.replicates
        notices = skipped_notice(budget.skipped, count, planned, budget.needed_s, budget.training_s)
    unfinished = any(record.status in ("interrupted", "not_run") for record in measured.records)
    writer.finish(
        "interrupted" if unfinished or measured.interrupted else "complete",
        stopped=measured.stopped or stopped,
        measured=[record.trial for record in measured.records],
        notices=notices,
        spending=budget.breakdown(measured.records),
        skipped=tuple(sorted(budget.skipped)),
    )
