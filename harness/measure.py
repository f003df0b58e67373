"""From a study to a run on disk: what the command line and the pytest plugin both call.

The order is that of cost: everything that can be refused is refused first, then the worker starts, then tokens are
prepared, and only then is anything measured.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from harness import provenance, store
from harness.errors import InvalidRunError
from harness.executors import Executor
from harness.executors.local import LocalExecutor
from harness.feasibility import check_feasible
from harness.forecast import free_bytes, together_bytes
from harness.levels import choose_level
from harness.plan import Plan, make_plan, members_of
from harness.provenance import Machine
from harness.record import Notice, TrialRecord
from harness.runner import Site, Watcher, run_plan
from harness.stopping import Stopping
from harness.store import Manifest, Run, RunWriter
from harness.study import Study
from harness.units import PHASES


class Display(Watcher, Protocol):
    """Shows a run under way."""

    def starting(self, plan: Plan, run_id: str) -> None:
        """The worker is being started."""


def plan_study(
    study: Study,
    machine: Machine,
    *,
    select: Sequence[str] = (),
    phases: Sequence[str] = PHASES,
    interleaving: str | None = None,
    runs: Path | None = None,
) -> tuple[Plan, tuple[Notice, ...]]:
    """The plan of a study on this machine, at the finest level that its variants and the memory allow.

    Args:
        study: what to measure.
        machine: where.
        select: names of variants; empty for all.
        phases: what to measure of them.
        interleaving: a level to use instead.
        runs: folder of earlier runs, whose measured peaks say what fits together.

    Raises:
        UsageError: anything that cannot work.
    """
    members = members_of(study, select)
    variants = [variant for variant, role in members if role == "variant"]
    notices = check_feasible(study, machine, variants)
    level, why = choose_level(
        variants,
        together_bytes=together_bytes([variant for variant, _ in members], study.workload, machine, runs),
        free_bytes=free_bytes(machine),
        asked=interleaving,
    )
    return make_plan(study, select=select, phases=phases, interleaving=level, why=why), notices


def measure(
    plan: Plan,
    machine: Machine,
    *,
    runs: Path,
    display: Display,
    notices: tuple[Notice, ...] = (),
    executor: Executor | None = None,
) -> Run:
    """Measure a plan into a new run directory and read it back.

    Raises:
        UsageError: data that cannot be read.
        InvalidRunError: no worker could be started, or it sees another device than the plan was made for.
    """
    study = plan.study
    run_id = store.new_run_id(study.name)
    threads = study.workload.threads
    display.starting(plan, run_id)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorameter-")))
        logs = runs / run_id / "logs"
        logs.mkdir(parents=True)
        executor = executor or LocalExecutor(threads=threads, log_dir=logs)
        stack.callback(executor.close)
        executor.start()
        tokens = executor.prepare_tokens(study.workload, str(runs / run_id))  # while the worker imports
        hello = executor.hello()
        if hello["device"] != machine.device:
            raise InvalidRunError(
                f"the worker measures on {hello['device']!r} and the plan was made for {machine.device!r}: torch and "
                "NVML disagree about the device. Check the driver with nvidia-smi and CUDA_VISIBLE_DEVICES."
            )
        facts = provenance.collect(study, machine, threads, hello)
        manifest = Manifest(
            run=run_id,
            study=plan.study_json(),
            phases=plan.phases,
            interleaving=plan.interleaving,
            why=plan.why,
            order=tuple(slot.trial for slot in plan.slots),
            seed=study.protocol.seed,
            created_unix_s=time.time(),
            provenance=facts,
            fingerprint=provenance.fingerprint(facts),
            tokens={key: value for key, value in tokens.items() if key != "path"},
            notices=notices,
        )
        writer = RunWriter(runs, manifest)
        site = Site(
            run_path=writer.path,
            scratch=scratch,
            device=machine.device,
            threads=threads,
            tokens_path=str(Path(tokens["path"]).resolve()),
            tokens={key: tokens[key] for key in ("hash", "real_tokens", "padded_tokens")},
        )
        status: store.RunStatus = "failed"
        stopped: str | None = None
        try:
            measured = run_plan(
                plan, {"": executor}, site, save=writer.append, watcher=display, stop=Stopping(plan)
            )
            status = _status(measured.records)
            stopped = measured.stopped
        finally:
            kept = [record.trial for record in measured.records] if stopped else None
            writer.finish(status, stopped=stopped, measured=kept)
    return store.read_run(str(writer.path), runs)


def _status(records: Sequence[TrialRecord]) -> store.RunStatus:
    stopped = any(record.status in ("interrupted", "not_run") for record in records)
    return "interrupted" if stopped else "complete"
