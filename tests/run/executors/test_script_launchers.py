"""Scripts that somebody else starts: variants whose command is a launcher, in lockstep."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from harness.machine.provenance import probe_machine
from harness.run.measure import measure, plan_study
from harness.studies.protocol import Protocol
from harness.studies.script import script_workload
from harness.studies.study import Study
from harness.studies.variant import Variant

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
    """One replicate of these commands and of the first of them once more."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{BIN}:/usr/bin:/bin")
    variants = tuple(Variant(name=name, command=command) for name, command in commands.items())
    protocol = Protocol(phases=("train",), replicates=1, warmup_steps_max=4, turns=2, retries=0, allow_disturbed=True)
    study = Study(
        name="launched", title="launched", workload=script_workload(), protocol=protocol, variants=variants,
        reference=variants[0].name,
    )  # fmt: skip
    plan, notices = plan_study(study, probe_machine(), free_bytes=2**40, phases=("train",), interleaving="lockstep")
    return measure(plan, runs=folder / "runs", display=Mock(), notices=notices)


@pytest.mark.faults
def test_a_launcher_is_no_training_and_what_it_starts_takes_turns(tmp_path, monkeypatch):
    """`accelerate launch`, and two ranks under torchrun of which the first speaks and the other keeps step; none of
    them is left when the run has ended."""
    import psutil

    (tmp_path / "train.py").write_text(EXAMPLE.read_text(encoding="utf-8"))
    (tmp_path / "ranks.py").write_text("\n".join(line[4:] for line in RANKS.splitlines()))
    commands = {
        "plain": "python train.py --steps 400",
        "accelerate": "accelerate launch --cpu --num_processes 1 train.py --steps 400",
        "torchrun": "torchrun --nproc-per-node=2 ranks.py",
    }
    run = take_turns(tmp_path, commands, monkeypatch)
    assert {record.trial: record.failure for record in run.records} == dict.fromkeys(
        ("r0-plain", "r0-plain-control", "r0-accelerate", "r0-torchrun")
    )
    by_name = {record.name: record for record in run.records}
    assert by_name["torchrun"].values["ranks"] == 2
    assert by_name["accelerate"].samples["train_loss"] == by_name["plain"].samples["train_loss"]
    assert all(record.turn_lengths == (2, 2) for record in run.records)
    left = [one.info["cmdline"] for one in psutil.process_iter(["cmdline", "cwd"]) if one.info["cwd"] == str(tmp_path)]
    assert len(left) <= 1, left  # this process


@pytest.mark.faults
def test_a_console_script_is_a_command(tmp_path, monkeypatch):
    """`trl sft` on a small model and records of one's own: the Trainer that it builds takes turns."""
    if importlib.util.find_spec("trl") is None or not (BIN / "trl").is_file():
        pytest.skip("needs trl")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate(["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(words))).save_pretrained(tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": " ".join("abcdefgh"[place % 8 :] * 3)}) for place in range(400)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    command = (
        "trl sft --model_name_or_path model --dataset_name data --output_dir out --use_peft --lora_target_modules "
        "all-linear --max_steps 300 --use_cpu --bf16 false --report_to none --lora_r "
    )
    run = take_turns(tmp_path, {"r4": command + "4", "r8": command + "8"}, monkeypatch)
    assert {record.trial: record.failure for record in run.records} == dict.fromkeys(
        ("r0-r4", "r0-r4-control", "r0-r8")
    )
    parameters = {record.name: record.values["trainable_parameters"] for record in run.records}
    assert parameters["r8"] == 2 * parameters["r4"]
    assert {record.tokens["source"] for record in run.records} == {"trainer"}
