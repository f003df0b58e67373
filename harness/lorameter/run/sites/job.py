"""A job: `python -m lorameter.run.sites.job FOLDER DIGEST` measures the replicates of an order into its folder.

The same command runs on a share of this machine, as a Ray task and in a SLURM job. A job is an ordinary run of some
replicates in its own folder; the process that started it merges the records into the run.
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
from lorameter.records.fileio import write_document
from lorameter.run.display import Display
from lorameter.run.measure import measure
from lorameter.run.plan import read_plan
from lorameter.run.sites.folder import STATE, JobState, read_order
from lorameter.run.sites.gpus import executors_of_ranks
from lorameter.run.workers import hold_devices, open_executor
from lorameter.run.workers.environment import Host


def run_job(folder: Path, digest: str) -> None:
    """Execute the order in a folder, if it has this digest, and write the outcome into its state."""
    state = JobState(site=_name_site())
    try:
        order = read_order(folder, digest)
        state = dataclasses.replace(state, site=order.site or state.site)
        with contextlib.suppress(OSError):  # nodes of a Ray cluster may not have the folder
            os.chdir(order.cwd)
        executor = open_executor()
        state = dataclasses.replace(state, machine=executor.machine().hardware)
        write_document(folder / STATE, state)
        if order.plan is None:
            state = dataclasses.replace(state, facts=executor.facts(), free_bytes=executor.free_bytes())
        else:
            plan = read_plan(order.plan)
            with hold_devices(executors_of_ranks(Host(), plan.study.workload.ranks), order.if_busy):
                run = measure(plan, runs=folder, display=Display())
            if run.manifest.status != "complete":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        state = dataclasses.replace(state, error="its job was cancelled")
    except (UsageError, InvalidRunError) as error:
        state = dataclasses.replace(state, error=str(error), usage=isinstance(error, UsageError))
    except Exception as error:
        print(redact(traceback.format_exc()), file=sys.stderr)
        state = dataclasses.replace(state, error=redact(f"{type(error).__name__}: {error}"))
    write_document(folder / STATE, dataclasses.replace(state, ended=True))


def _name_site() -> str:
    """The node's name, with the GPUs of its SLURM job if it has any."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    gpus = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS") or ""
    return f"{node}-gpu-{gpus.replace(',', '-')}" if gpus else node


if __name__ == "__main__":
    if parent := os.environ.pop(PARENT, ""):
        end_with_parent(int(parent))
    run_job(Path(sys.argv[1]), sys.argv[2])
