"""Tests of scripts behind a launcher: variants whose command is a launcher take turns in lockstep.

Tests of unmodified user scripts in lockstep: transformers' Trainer with LoRA, and a plain torch loop.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import textwrap
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest

from lorameter.machine.provenance import probe_machine
from lorameter.run.build_plan import PlanOptions, build_plan
from lorameter.run.measure import measure
from lorameter.studies.protocol import Protocol
from lorameter.studies.script import script_workload
from lorameter.studies.study import Study
from lorameter.studies.variant import ScriptVariant

LOCKSTEP = PlanOptions(phases=("train",), interleaving="lockstep")
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
    plan, notices = build_plan(study, probe_machine(), LOCKSTEP, free_bytes=2**40)
    return measure(plan, runs=folder / "runs", display=Mock(), notices=notices)


def remaining_processes(folder):
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
    assert remaining_processes(tmp_path) == []


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
    assert remaining_processes(tmp_path) == []


TRAINER = """
    import sys, torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    ))
    model = get_peft_model(model, LoraConfig(r=int(sys.argv[1]), target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = torch.randint(0, 64, (600, 16), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        "out", per_device_train_batch_size=2, max_steps=300, save_strategy="steps", save_steps=2, push_to_hub=True,
        report_to=["tensorboard"], logging_steps=1, use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model("OUT")
    open("MARK", "w").write("saved")
"""
LOOP = """
    import torch
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(64, 32), torch.nn.Linear(32, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for number in range(300):
        ids = torch.randint(0, 64, (2, 16))
        loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    open("MARK", "w").write("after")
"""


@pytest.mark.selftest
def test_unmodified_scripts_are_measured_step_by_step(tmp_path, monkeypatch):
    """The scripts take turns of two steps and report losses and tokens; the control's losses are bit-equal to the
    reference's, and the scripts write no checkpoint, tracker log or later output."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name, text in (("trainer.py", TRAINER), ("loop.py", LOOP)):
        out = {"OUT": str(folder / "model"), "MARK": str(folder / "mark")}
        text = textwrap.dedent(text)
        for word, path in out.items():
            text = text.replace(word, path)
        (folder / name).write_text(text)
    commands = {"r4": "python trainer.py 4", "loop": "python loop.py"}
    variants = tuple(ScriptVariant(name=name, command=command) for name, command in commands.items())
    protocol = Protocol(phases=("train",), replicates=1, warmup_steps_max=4, turns=3, retries=0, allow_disturbed=True)
    study = Study(
        name="real", title="real", workload=script_workload(), protocol=protocol, variants=variants, reference="r4"
    )
    monkeypatch.chdir(folder)
    plan, notices = build_plan(study, probe_machine(), LOCKSTEP, free_bytes=2**40)
    run = measure(plan, runs=folder / "runs", display=Mock(), notices=notices)
    assert {record.trial: record.failure for record in run.records} == {
        "r0-r4": None, "r0-r4-control": None, "r0-loop": None,
    }  # fmt: skip
    by_name = {record.trial: record for record in run.records}
    for record in run.records:
        assert record.turn_lengths == (2, 2, 2)
        assert record.values["training_steps"] == 2 + 4 + 6
        assert all(math.isfinite(loss) for loss in record.samples["timed_loss"])
    reference, control, loop = (by_name[name] for name in ("r0-r4", "r0-r4-control", "r0-loop"))
    assert (reference.tokens["source"], loop.tokens["source"]) == ("trainer", "optimizer")
    assert reference.samples["turn_tokens"] == (2 * 2 * 16.0,) * 3
    assert reference.samples["warmup_loss"] == control.samples["warmup_loss"]
    assert reference.samples["timed_loss"] == control.samples["timed_loss"]
    assert sorted(path.name for path in folder.iterdir()) == ["loop.py", "runs", "trainer.py"]
