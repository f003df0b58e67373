"""Tests of `lorameter wrap`: the command is unchanged, and its training is recorded however it ends."""

import os
import shlex
import signal
import sys
import textwrap

import pytest

from lorameter.attach import launch
from lorameter.cli import main
from lorameter.commands.wrap import read_requirements
from lorameter.errors import UsageError
from lorameter.records import store

LOOP = """
import os, signal, sys, time
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def train(steps):
    for ids in torch.utils.data.DataLoader(torch.randint(0, 32, (2 * steps, 6)), batch_size=2):
        torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
train(30)
print("trained")
"""


@pytest.fixture
def wrap(tmp_path, monkeypatch):
    """A function that wraps a script with the given text and returns the exit code and the run, or None without a
    run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(text, *options, python=(sys.executable,)):
        (tmp_path / "train.py").write_text(textwrap.dedent(text))
        code = main(["wrap", "--runs-dir", "runs", *options, "--", *python, "train.py"])
        (path, *_) = [*store.list_runs(tmp_path / "runs"), None]
        assert not [one for one in (tmp_path / "runs").iterdir() if one.name.startswith(".")]
        return code, None if path is None else store.read_run(str(path), path.parent)

    return run


def test_a_wrapped_command_keeps_its_output_and_leaves_a_run(wrap, capfd, tmp_path):
    """The output is the command's own, the report goes to stderr, and only the run is written."""
    code, run = wrap(LOOP, "--require", "base.frozen=false", "mode=train")
    (record,) = run.records
    assert (code, run.state, record.status, record.name) == (0, "complete", "ok", "train")
    assert len(record.samples["step_time_s"]) >= 5
    assert {check["path"]: check["status"] for check in record.checks}["mode"] == "active"
    assert not record.notices
    printed = capfd.readouterr()
    assert printed.out == "trained\n"
    assert "tokens/s" in printed.err
    assert "steps lie between two updates" in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "train.py"]
    assert (tmp_path / "train.py").read_text() == LOOP


CLOSURE = """
import peft, torch, transformers
torch.manual_seed(0)
config = transformers.LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
)
model = peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(r=4, task_type="CAUSAL_LM"))
optimizer = torch.optim.LBFGS([one for one in model.parameters() if one.requires_grad], lr=0.1, max_iter=2)
for _ in range(30):
    ids = torch.randint(0, 64, (2, 16))
    def closure():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss
    optimizer.step(closure)
"""


def test_a_training_by_closures_is_checked(wrap):
    """LBFGS calls the model inside its update, so that the watched step begins before the update."""
    code, run = wrap(CLOSURE, "--require", "peft.learning=true", "base.frozen=true")
    assert code == 0
    assert [record.status for record in run.records] == ["ok"]


def test_a_signal_reaches_the_command_and_the_measured_steps_are_kept(wrap):
    """The signal ends the command, and the run records it."""
    text = LOOP + "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n"
    code, run = wrap(text, "--no-report")
    (record,) = run.records
    assert code == 128 + signal.SIGTERM
    assert (run.state, record.status) == ("interrupted", "interrupted")
    assert "SIGTERM" in record.failure.message


@pytest.mark.faults
@pytest.mark.parametrize(
    ("end", "code", "status", "expected"),
    [
        ("raise ValueError('mine')", 1, "crashed", "mine"),
        ("os._exit(7)", 7, "crashed", "exit code 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "crashed", "SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "crashed", "SIGSEGV"),
        ("signal.raise_signal(signal.SIGINT)", 130, "interrupted", "stopped"),
        ("raise torch.OutOfMemoryError('CUDA out of memory')", 1, "oom", "out of memory"),
        ("ids = model[1].weight.data.fill_(float('nan')); train(3)", 0, "invalid", "the loss is nan"),
    ],
    ids=["crash", "exit", "kill", "segfault", "ctrl-c", "memory", "nan"],
)
def test_a_training_that_ends_early_has_a_record_with_the_reason(wrap, end, code, status, expected):
    """The record has the reason, the command's own exit code, and the steps before the end."""
    found, run = wrap(LOOP + end + "\n", "--no-report")
    (record,) = run.records
    assert (found, record.status, run.state != "running") == (code, status, True)
    assert expected in record.failure.message


def test_a_crash_before_training_leaves_no_run(wrap, capfd):
    """A command without a training leaves no run; the exit code is the command's, or 4 with required paths."""
    assert wrap("raise SystemExit(5)") == (5, None)
    assert (
        "ended with exit code 5, and no Trainer and no optimizer of torch had begun to train" in capfd.readouterr().err
    )
    assert wrap("print('nothing')", "--require", "base.bits=4") == (4, None)
    printed = capfd.readouterr()
    assert printed.out == "nothing\n"
    assert "nothing was measured: the command has ended, and no Trainer" in printed.err


def test_an_isolated_interpreter_is_reported(wrap, capfd):
    """An isolated interpreter (-I) does not load the hook, and a message says so."""
    assert wrap("print('alone')", python=(sys.executable, "-I")) == (0, None)
    assert "no Python of the command has loaded the hook" in capfd.readouterr().err


RANKS = """
import atexit, os, time
atexit.register(os._exit, 0)  # torch's gloo aborts some processes at their end, measured or not
import torch.distributed as dist
dist.init_process_group("gloo")
"""


@pytest.mark.faults
def test_step_times_under_torchrun_are_those_of_the_slowest_rank(wrap):
    """Rank 1 needs 50 ms more for each step and rank 0 waits only at the end; step times are rank 1's, and tokens are
    those of both."""
    text = RANKS + LOOP.replace("batch_size=2):\n", "batch_size=2):\n        time.sleep(PAUSE_S)\n")
    text = text.replace("def train", "PAUSE_S = 0.05 * dist.get_rank()\ndef train") + "dist.barrier()\n"
    code, run = wrap(
        text, "--no-report",
        python=(
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0",
        ),
    )  # fmt: skip
    (record,) = run.records
    assert (code, record.status, record.values["ranks"]) == (0, "ok", 2), record.failure
    assert not record.notices
    assert min(record.samples["step_time_s"]) >= 0.05
    assert set(record.samples["turn_tokens"]) == {24.0}


@pytest.mark.faults
def test_a_console_script_of_trl_is_followed(tmp_path, monkeypatch, sft_command, capfd):
    """`lorameter wrap -- trl sft …` records the Trainer of the training process only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [*shlex.split(sft_command), "--max_steps", "30", "--lora_r", "4"]
    code = main(["wrap", "--runs-dir", "runs", "--", *words])
    (path,) = store.list_runs(tmp_path / "runs")
    (record,) = store.read_run(str(path), path.parent).records
    assert (code, record.status, record.values["training_steps"]) == (0, "ok", 30), record.failure
    assert len(record.samples["step_time_s"]) >= 5
    assert record.values["trainable_parameters"] < record.values["total_parameters"]
    assert "steps are the Trainer's" in capfd.readouterr().err
    assert not record.notices


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("base.bits", "PATH=VALUE is expected"),
        ("no.such=1", "not known"),
        ("base.bits=seven", "must be one of"),
        ("base.bits=" + "9" * 5000, "must be one of"),
        ("base.bits=" + "[" * 100_000, "must be one of"),
        ("base.bits=NaN", "must be one of"),
    ],
)
def test_an_invalid_requirement_is_refused(given, expected):
    """An invalid requirement is refused before anything is started."""
    with pytest.raises(UsageError, match=expected):
        read_requirements([given])
    assert read_requirements(["base.bits=4", "peft.learning=True", "attention.backend=flash"]) == {
        "base.bits": 4, "peft.learning": True, "attention.backend": "flash",
    }  # fmt: skip


def test_unknown_and_missing_commands_are_refused(tmp_path, capsys):
    """An unknown command and a missing command are refused."""
    assert main(["wrap", "--runs-dir", str(tmp_path), "--", "no-such-program"]) == 2
    assert main(["wrap", "--runs-dir", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert "no-such-program: No such file or directory" in printed
    assert "no command. Write it behind --" in printed


def test_signals_of_a_terminal_are_not_sent_twice(monkeypatch):
    """Signals that the terminal sends to the whole group are not forwarded; all others are."""
    sent = []

    class Process:
        def send_signal(self, number):
            sent.append(number)

    for in_terminal in (True, False):
        monkeypatch.setattr(launch, "_in_terminal", lambda there=in_terminal: there)
        with launch.forward_signals(Process()):
            for number in (signal.SIGINT, signal.SIGUSR1):
                os.kill(os.getpid(), number)
    assert sent == [signal.SIGUSR1, signal.SIGINT, signal.SIGUSR1]
