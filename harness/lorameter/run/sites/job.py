"""A job: `python -m lorameter.run.sites.job FOLDER` measures the replicates of an order into its folder.

The same command runs on a share of this machine, as a task of Ray and in a job of SLURM. A job is an ordinary run of
some replicates, in a folder of its own; the process that started it merges the records into the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
import traceback
from pathlib import Path

from lorameter.errors import InvalidRunError, UsageError, redact
from lorameter.machine.processes import PARENT, end_with_parent
from lorameter.run.device_lock import hold_devices
from lorameter.run.display import Display
from lorameter.run.measure import measure
from lorameter.run.plan import Slot
from lorameter.run.resume import read_plan
from lorameter.run.sites.folder import JobState, read_order, write_state
from lorameter.run.sites.gpus import executors_of_ranks
from lorameter.run.workers import open_executor
from lorameter.run.workers.environment import Host


class _Progress(Display):
    """Writes into the job's state which replicates have ended."""

    def __init__(self, folder: Path, state: JobState) -> None:
        self._folder, self.state = folder, state
        self._replicate: int | None = None

    def trial_phase(self, slot: Slot, phase: str) -> None:
        """A trial of the next replicate begins when the one before has ended."""
        if phase == "base":  # before anything is measured
            return
        if self._replicate not in (None, slot.replicate):
            self.write(finished=(*self.state.finished, self._replicate))
        self._replicate = slot.replicate

    def write(self, **changes: object) -> None:
        """Change the state."""
        self.state = dataclasses.replace(self.state, **changes)  # type: ignore[arg-type]
        write_state(self._folder, self.state)


def run_job(folder: Path) -> None:
    """Carry out the order in a folder; whatever comes of it is written into the state."""
    order = read_order(folder)
    progress = _Progress(folder, JobState(site=order.site or _name_site()))
    try:
        with contextlib.suppress(OSError):  # the nodes of a Ray cluster may not have it
            os.chdir(order.cwd)
        executor = open_executor()
        progress.write(machine=executor.machine().hardware)
        if order.plan is None:
            progress.write(facts=executor.facts(), free_bytes=executor.free_bytes(), ended=True)
            return
        plan = read_plan(order.plan)
        with contextlib.ExitStack() as stack:
            if order.if_busy is not None:
                devices = executors_of_ranks(Host(), plan.study.workload.ranks)
                stack.enter_context(hold_devices(devices, order.if_busy))
            run = measure(plan, runs=folder, display=progress)
        if run.manifest.status != "complete":
            raise KeyboardInterrupt
        progress.write(finished=tuple(dict.fromkeys(record.replicate for record in run.records)), ended=True)
    except KeyboardInterrupt:
        progress.write(ended=True, error="its job was cancelled")
    except (UsageError, InvalidRunError) as error:
        progress.write(ended=True, error=str(error), usage=isinstance(error, UsageError))
    except Exception as error:
        print(redact(traceback.format_exc()), file=sys.stderr)
        progress.write(ended=True, error=redact(f"{type(error).__name__}: {error}"))


def _name_site() -> str:
    """The node's name, with the GPUs of a SLURM job if it has any."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    gpus = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS") or ""
    return f"{node}-gpu-{gpus.replace(',', '-')}" if gpus else node


if __name__ == "__main__":
    if parent := os.environ.pop(PARENT, ""):
        end_with_parent(int(parent))
    run_job(Path(sys.argv[1]))
