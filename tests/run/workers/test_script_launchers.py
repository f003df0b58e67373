"""Tests of scripts behind a launcher: variants whose command is a launcher take turns in lockstep."""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest

from lorameter.machine.provenance import probe_machine
from lorameter.run.build_plan import build_plan
from lorameter.run.measure import measure
from lorameter.studies.protocol import Protocol
from lorameter.studies.script import script_workload
from lorameter.studies.study import Study
from lorameter.studies.variant import ScriptVariant

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "torch_loop.py"
RANKS = """
    import atexit, os
    atexit.register(os._exit, 0)  # torch's gloo aborts some processes at their end, measured or not
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(32, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(400):
        rows = torch.randn(8, 32)
        (model(rows) - rows).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
"""
BIN = Path(sys.executable).parent


def take_turns(folder, commands, monkeypatch):
    """Measure one replicate of these commands, with the first one as the control."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    monkeypatch.setenv("STARTED_BY", str(folder))
    variants = tuple(ScriptVariant(name=name, command=command) for name, command in commands.items())
    protocol = Protocol(phases=("train",), replicates=1, warmup_steps_max=4, turns=2, retries=0, allow_disturbed=True)
    study = Study(
        name="launched", title="launched", workload=script_workload(), protocol=protocol, variants=variants,
        reference=variants[0].name,
    )  # fmt: skip
    plan, notices = build_plan(study, probe_machine(), free_bytes=2**40, phases=("train",), interleaving="lockstep")
    return measure(plan, runs=folder / "runs", display=Mock(), notices=notices)


def left_of(folder):
    """Return the processes of `take_turns` in this folder, and their children, that do not end by themselves."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("STARTED_BY") == str(folder):
                found.append(process)
    return [process.cmdline() for process in psutil.wait_procs(found, timeout=30)[1]]


@pytest.mark.faults
def test_launched_trainings_take_turns_and_the_launcher_does_not(tmp_path, monkeypatch):
    """`accelerate launch` and torchrun with two ranks, of which the first reports, take turns with a plain script and a
    second group; no process is left."""
    (tmp_path / "train.py").write_text(EXAMPLE.read_text(encoding="utf-8"))
    (tmp_path / "ranks.py").write_text(textwrap.dedent(RANKS))
    commands = {
        "torchrun": "torchrun --nproc-per-node=2 ranks.py",
        "plain": "python train.py --steps 400",
        "accelerate": "accelerate launch --cpu --num_processes 1 train.py --steps 400",
    }
    run = take_turns(tmp_path, commands, monkeypatch)
    assert {record.trial: record.failure for record in run.records} == dict.fromkeys(
        ("r0-torchrun", "r0-torchrun-control", "r0-plain", "r0-accelerate")
    )
    by_trial = {record.trial: record for record in run.records}
    for name in ("r0-torchrun", "r0-torchrun-control"):
        assert by_trial[name].values["ranks"] == 2
    assert by_trial["r0-accelerate"].samples["timed_loss"] == by_trial["r0-plain"].samples["timed_loss"]
    assert all(record.turn_lengths == (2, 2) for record in run.records)
    assert left_of(tmp_path) == []


WORKERS = """
    import sys, torch
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8000
        def __getitem__(self, place):
            return torch.full((32,), place / 8000)
    if __name__ == "__main__":
        torch.manual_seed(0)
        model = torch.nn.Linear(32, 32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        loader = torch.utils.data.DataLoader(Rows(), batch_size=8, num_workers=1, multiprocessing_context=sys.argv[1])
        for rows in loader:
            (model(rows) - rows).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
"""


@pytest.mark.faults
def test_data_workers_take_no_turns(tmp_path, monkeypatch):
    """Spawned data workers import the script with its environment, and forked ones inherit its training; only the
    training process is measured, and no worker is left."""
    (tmp_path / "train.py").write_text(textwrap.dedent(WORKERS))
    run = take_turns(tmp_path, {how: f"python train.py {how}" for how in ("spawn", "fork")}, monkeypatch)
    assert {record.trial: record.failure for record in run.records} == dict.fromkeys(
        ("r0-spawn", "r0-spawn-control", "r0-fork")
    )
    losses = {record.samples["timed_loss"] for record in run.records}
    assert len(losses) == 1
    assert all(record.turn_lengths == (2, 2) for record in run.records)
    assert left_of(tmp_path) == []
