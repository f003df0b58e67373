"""Tests that a script ends the same way whether it is measured or not: output, files, exit code."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorameter.records import store

ROOT = Path(__file__).parents[2]
SCRIPT = '''
import contextlib, copy, gc, io, os, pickle, sys, weakref
from multiprocessing.reduction import ForkingPickler
import torch

class Net(torch.nn.Module):
    """Writes a line for each forward pass to a file that is flushed when the module is freed."""

    def __init__(self):
        super().__init__()
        self.embedded, self.head = torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32)

    def forward(self, ids: torch.Tensor):
        return self.head(self.embedded(ids))

class Logged(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.metrics = net, open("metrics.txt", "w")

    def forward(self, ids):
        return self.net(ids)

def loss_of(model, ids):
    return torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())

sizes = []

def backend(graph, inputs):
    sizes.append(len(list(graph.graph.nodes)))
    return graph.forward

def attempt(what, call):
    try:
        print(what, call())
    except Exception as error:
        print(what, type(error).__name__, error)

def train(model, loader, compiled):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    if os.environ.get("METER"):
        from lorameter.attach import Meter
        loader = Meter(model, report=False).steps(loader)
    for ids in loader:
        loss = compiled(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        print(loss.item().hex())
        print(loss.item(), file=getattr(model, "metrics", io.StringIO()))
    return weakref.ref(optimizer)

if __name__ == "__main__":
    torch.manual_seed(0)
    net = Net()
    model = Logged(net)
    loader = torch.utils.data.DataLoader(torch.randint(0, 32, (4 * 30 + 3, 6)), batch_size=4)
    compiled = torch.compile(loss_of, backend=backend, fullgraph=True)
    optimizer = train(model, loader, loss_of if os.environ.get("EAGER") else compiled)
    print("graphs", sizes or [10, 11])
    print("optimizer", optimizer())
    print("hooks", [one._backward_hooks for one in model.parameters()])
    attempt("save", lambda: torch.save(net, "model.pt"))
    attempt("pickle", lambda: len(pickle.dumps(net)) > 1000)
    attempt("copy", lambda: len(copy.deepcopy(net).state_dict()))
    attempt("script", lambda: torch.jit.script(net)(torch.zeros(1, 2, dtype=torch.long)).shape)
    attempt("send", lambda: len(ForkingPickler.dumps(net)) > 500)
    freed = weakref.ref(model), weakref.ref(net)
    del model, net
    torch._dynamo.reset()
    gc.collect()
    print("freed", [one() for one in freed], len(open("metrics.txt").readlines()))
    sys.exit(3)
'''


def run(folder, *words, **variables):
    """Run a command in a folder, without the environment that measures this process."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'harness'}:{ROOT}", "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


def wrap(folder, *words, **variables):
    """Run a command under `lorameter wrap`."""
    ours = [sys.executable, "-m", "lorameter.cli", "wrap", "--no-report", "--runs-dir", "runs", "--"]
    return run(folder, *ours, *words, **variables)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """The finished process and folder of the script alone, wrapped, and with a meter and no compilation."""
    ways = {"alone": (run, {}), "wrapped": (wrap, {}), "metered": (run, {"EAGER": "1", "METER": "1"})}
    folders = {how: tmp_path_factory.mktemp(how) for how in ways}
    with ThreadPoolExecutor() as pool:
        done = {}
        for how, (start, variables) in ways.items():
            (folders[how] / "train.py").write_text(SCRIPT)
            words = sys.executable, "train.py"
            done[how] = pool.submit(start, folders[how], *words, LORAMETER_RUNS="runs", **variables)
    return {how: (done[how].result(), folders[how]) for how in ways}


def record_of(folder):
    (path,) = store.list_runs(folder / "runs")
    (record,) = store.read_run(str(path), path.parent).records
    return record


@pytest.mark.parametrize("how", ["wrapped", "metered"])
def test_a_script_ends_as_it_does_alone(ends, how):
    """Losses are bit-equal, with the same graphs of torch.compile, also for a smaller last batch. The model can be
    saved, copied, scripted and sent to another process, and is freed with its optimizer and its open file. No
    parameter keeps an empty dict of hooks, which autograd would visit in every later step."""
    (alone, there), (done, folder) = ends["alone"], ends[how]
    assert done.stdout == alone.stdout
    assert done.returncode == 3
    assert "freed [None, None] 31" in done.stdout
    assert (folder / "metrics.txt").read_text() == (there / "metrics.txt").read_text()
    assert (folder / "model.pt").stat().st_size > 4000


@pytest.mark.parametrize("how", ["wrapped", "metered"])
def test_unusual_scripts_are_measured(ends, how):
    """The record has the parts of its steps, their tokens and losses, and the checks of a step if the model is called
    uncompiled."""
    done, folder = ends[how]
    samples = record_of(folder).samples
    losses = [float.fromhex(line) for line in done.stdout.splitlines() if line.startswith("0x")]
    assert samples["timed_loss"] == pytest.approx(losses[-len(samples["timed_loss"]) :])
    assert samples["step_tokens"][-2:] == (24, 18)
    for part in ("data", "forward", "backward", "optimizer"):
        assert len(samples[f"{part}_time_s"]) == len(samples["step_time_s"]) >= 15
    assert all(norm > 0 for norm in samples["gradient_norm"])
    checks = {check["path"]: check["observed"] for check in record_of(folder).checks}
    assert checks.get("mode") == (None if how == "wrapped" else "train")


COMPILED = """
import torch

sizes = []

def backend(graph, inputs):
    sizes.append(len(list(graph.graph.nodes)))
    return graph.forward

def train(whole):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(rows):
        model(rows).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    if whole:
        step = torch.compile(step, backend=backend)
    else:
        optimizer.step = torch.compile(optimizer.step, backend=backend)
    for rows in torch.utils.data.DataLoader(torch.randn(30, 4), batch_size=4):
        step(rows)
    print(sizes, [one.item().hex() for one in model.weight.flatten()])

train(False)
train(True)
"""


@pytest.mark.faults
def test_a_compiled_update_is_unchanged_and_not_measured(tmp_path):
    """The update is compiled alone or with the whole step; the script prints why nothing was measured."""
    (tmp_path / "train.py").write_text(COMPILED)
    alone, done = run(tmp_path, sys.executable, "train.py"), wrap(tmp_path, sys.executable, "train.py")
    assert done.stdout == alone.stdout
    assert (done.returncode, alone.returncode) == (0, 0)
    assert "an update that torch.compile compiles is not seen" in done.stderr
    assert not store.list_runs(tmp_path / "runs")


TRAINER = '''
import gc, sys, weakref
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

class Failing(Trainer):
    """Fails in its 20th step."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 19:
            raise ValueError("mine")
        return super().training_step(*args, **kwargs)

def train(kind):
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(50)]
    arguments = TrainingArguments(output_dir="out", use_cpu=True, max_steps=25, report_to=[], save_strategy="no",
                                  disable_tqdm=True, per_device_train_batch_size=2)
    trainer = kind(LlamaForCausalLM(LlamaConfig(**sizes)), arguments, train_dataset=rows)
    try:
        trainer.train()
    except ValueError as error:
        print(error)
    torch.save(trainer.model, "model.pt")
    return weakref.ref(trainer), weakref.ref(trainer.model)

for kind in (Failing, Trainer):
    freed = train(kind)
    gc.collect()
    print([one() for one in freed])
print("finders", [one for one in sys.meta_path if type(one).__module__ == "sitecustomize"])
'''


@pytest.mark.faults
def test_a_trainer_is_freed_after_an_error_of_its_training(tmp_path):
    """An error that the script catches keeps no object alive, and its training is crashed. No finder of the hook stays,
    which each import that a Trainer attempts in a step would call."""
    (tmp_path / "train.py").write_text(TRAINER)
    done = wrap(tmp_path, sys.executable, "train.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["[None, None]", "finders []"], done.stderr
    assert done.stdout.count("[None, None]") == 2
    record = record_of(tmp_path)
    assert (record.status, record.failure.kind) == ("crashed", "UnendedError")
    assert "another training of this script (seen by its trainer) is not measured" in done.stderr


KILLED = """
import json, os, signal, sys, time
import torch
from lorameter.attach import Meter

model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader, ends = torch.utils.data.DataLoader(torch.randn(4000, 4), batch_size=2), []
for rows in Meter(model).steps(loader) if sys.argv[1:] else loader:
    model(rows).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    time.sleep(0.01)
    ends.append(time.monotonic())
    if len(ends) > 20 and ends[-1] - ends[20] > 2.5:
        json.dump(ends, open("ends.json", "w"))
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("metered", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_a_killed_training_loses_at_most_its_last_second(tmp_path, metered):
    """The run, wrapped or with a meter, has the steps before the last second."""
    (tmp_path / "train.py").write_text(KILLED)
    start, words = (run, ["metered"]) if metered else (wrap, [])
    done = start(tmp_path, sys.executable, "train.py", *words, LORAMETER_RUNS="runs")
    assert done.returncode == (-signal.SIGKILL if metered else 128 + signal.SIGKILL)
    ends = json.loads((tmp_path / "ends.json").read_text())
    due = [end for end in ends[1:] if end < ends[-1] - 1.2]
    record = record_of(tmp_path)
    assert record.status == ("interrupted" if metered else "crashed")
    assert len(due) > 50
    assert record.values["training_steps"] >= len(due)
    assert len(record.samples["step_time_s"]) >= len(due) - 20
    assert len(record.samples["timed_loss"]) == len(record.turn_lengths) == len(record.samples["step_time_s"])


FULL = """
import os, resource, sys
import torch

model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for rows in torch.utils.data.DataLoader(torch.randn(60, 4), batch_size=2):
    model(rows).square().mean().backward()
    optimizer.step()
for process in (os.getpid(), os.getppid()):
    resource.prlimit(process, resource.RLIMIT_FSIZE, (200, 200))
sys.exit(7)
"""


@pytest.mark.faults
def test_a_full_disk_at_the_end_does_not_change_the_exit_code(tmp_path):
    """The write error is printed."""
    (tmp_path / "train.py").write_text(FULL)
    done = wrap(tmp_path, sys.executable, "train.py")
    assert done.returncode == 7, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr


ERRORS = """
import logging, os, traceback
import torch

logging.basicConfig(level=logging.DEBUG)

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.full((4,), float(index)) if index < 19 else fail()

def fail(*args):
    raise ValueError("mine")

def attempt(call):
    try:
        call()
    except ValueError:
        traceback.print_exc()

def train():
    for rows in torch.utils.data.DataLoader(Rows()):
        loss = model(rows).square().mean()
        loss.backward()
        optimizer.step()

model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
attempt(train)
attempt(lambda: optimizer.step(fail))
loss = model(torch.ones(4)).mean()
loss.register_hook(fail)
attempt(loss.backward)
os.close(1)
os.close(2)
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Standard error of a script that logs everything and catches errors of its training: alone, and wrapped."""
    folder = tmp_path_factory.mktemp("errors")
    (folder / "train.py").write_text(ERRORS)
    words = sys.executable, "train.py"
    return [done.stderr.splitlines() for done in (run(folder, *words), wrap(folder, *words))]


def test_tracebacks_and_the_log_of_a_script_are_its_own(errors):
    """Errors of loading, of an update and of a backward pass have no frame of the meter, and the meter logs nothing."""
    alone, wrapped = errors
    assert sum(line == "ValueError: mine" for line in alone) == 3
    assert [line for line in wrapped if not line.startswith("lorameter: ")] == alone


def test_a_script_that_closes_its_standard_error_is_reported(errors):
    """The program that wraps the command names the run, on its own standard error."""
    assert [line for line in errors[1] if line.startswith("lorameter: run ") and line.endswith(" is written")]
