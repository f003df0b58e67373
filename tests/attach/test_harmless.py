"""A script comes to the same end whether it is measured or not: what it prints, what it writes, its exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.records import store

ROOT = Path(__file__).parents[2]
SCRIPT = '''
import contextlib, copy, gc, io, os, pickle, sys, weakref
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

def in_a_child(rank, model):
    print("child", len(list(model.parameters())), flush=True)

def attempt(what, call):
    try:
        print(what, call())
    except Exception as error:
        print(what, type(error).__name__, error)

def train(model, loader, compiled):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    if os.environ.get("METER"):
        from harness.attach import Meter
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
    attempt("save", lambda: torch.save(net, "model.pt"))
    attempt("pickle", lambda: len(pickle.dumps(net)) > 1000)
    attempt("copy", lambda: len(copy.deepcopy(net).state_dict()))
    attempt("script", lambda: torch.jit.script(net)(torch.zeros(1, 2, dtype=torch.long)).shape)
    attempt("spawn", lambda: torch.multiprocessing.spawn(in_a_child, (net,)))
    freed = weakref.ref(model), weakref.ref(net)
    del model, net
    torch._dynamo.reset()
    gc.collect()
    print("freed", [one() for one in freed], len(open("metrics.txt").readlines()))
    sys.exit(3)
'''


def run(folder, *words, **variables):
    """A command in a folder, without what this process was started with to measure it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


def wrap(folder, *words, **variables):
    """The same under `lorameter wrap`."""
    ours = [sys.executable, "-m", "harness.cli", "wrap", "--no-report", "--runs-dir", "runs", "--"]
    return run(folder, *ours, *words, **variables)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """How the script ends alone, wrapped, wrapped without compiling anything, and with a meter in it: the process and
    its folder."""
    found = {}
    for how, start, variables in (
        ("alone", run, {}),
        ("wrapped", wrap, {}),
        ("eager", wrap, {"EAGER": "1"}),
        ("metered", run, {"EAGER": "1", "METER": "1"}),
    ):
        folder = tmp_path_factory.mktemp(how)
        (folder / "train.py").write_text(SCRIPT)
        found[how] = start(folder, sys.executable, "train.py", LORAMETER_RUNS="runs", **variables), folder
    return found


def record_of(folder):
    (path,) = store.list_runs(folder / "runs")
    (record,) = store.read_run(str(path), path.parent).records
    return record


@pytest.mark.parametrize("how", ["wrapped", "eager", "metered"])
def test_a_script_ends_as_it_does_alone(ends, how):
    """Its losses are the same to the bit, with the same graphs of torch.compile for a smaller last batch too. Its model
    can be saved, copied, scripted and sent to another process, and is freed with its optimizer and its open file."""
    (alone, there), (done, folder) = ends["alone"], ends[how]
    assert done.stdout == alone.stdout
    assert done.returncode == 3
    assert "freed [None, None] 31" in done.stdout
    assert (folder / "metrics.txt").read_text() == (there / "metrics.txt").read_text()
    assert (folder / "model.pt").stat().st_size > 4000


@pytest.mark.parametrize("how", ["wrapped", "eager", "metered"])
def test_such_a_script_is_measured_all_the_same(ends, how):
    """The parts of its steps, their tokens and losses; and what a step ran, where the model is called uncompiled."""
    done, folder = ends[how]
    samples = record_of(folder).samples
    losses = [float.fromhex(line) for line in done.stdout.splitlines() if line.startswith("0x")]
    assert samples["train_loss"] == pytest.approx(losses[-len(samples["train_loss"]) :])
    assert samples["step_real_tokens"][-2:] == (24, 18)
    for part in ("data", "forward", "backward", "optimizer"):
        assert len(samples[f"{part}_time_s"]) == len(samples["step_time_s"]) >= 15
    assert all(norm > 0 for norm in samples["gradient_norm"])
    checks = {check["path"]: check["observed"] for check in record_of(folder).checks}
    assert checks.get("mode") == (None if how == "wrapped" else "train")


SWEEP = """
import sys
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedded, self.head = torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32)
        self.metrics = open("metrics.txt", "a")

    def forward(self, ids):
        return self.head(self.embedded(ids))

def train(rate):
    global model
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for ids in torch.utils.data.DataLoader(torch.randint(0, 32, (60, 6)), batch_size=2):
        loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.metrics.write(f"{loss.item()}\\n")
    print(rate, loss.item().hex())

for rate in (0.1, 0.2, 0.3):
    train(rate)
"""


def test_of_a_sweep_the_first_training_is_measured(tmp_path):
    """The others are named in a notice. What each writes is there, also what is flushed when the process ends."""
    (tmp_path / "train.py").write_text(SWEEP)
    done = wrap(tmp_path, sys.executable, "train.py")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 3), done.stderr
    assert len((tmp_path / "metrics.txt").read_text().splitlines()) == 3 * 30
    record = record_of(tmp_path)
    assert (record.status, record.values["training_steps"]) == ("ok", 29)
    assert [notice.code for notice in record.notices] == ["second-training"]
    assert {"forward_time_s", "step_real_tokens"} <= set(record.samples)
    alone = run(tmp_path, sys.executable, "train.py")
    assert alone.stdout == done.stdout


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


def test_a_compiled_update_is_compiled_as_alone_and_not_measured(tmp_path):
    """By itself or with the whole step; why nothing was measured is said."""
    (tmp_path / "train.py").write_text(COMPILED)
    alone, done = run(tmp_path, sys.executable, "train.py"), wrap(tmp_path, sys.executable, "train.py")
    assert done.stdout == alone.stdout
    assert (done.returncode, alone.returncode) == (0, 0)
    assert "an update that torch.compile compiles is not seen" in done.stderr
    assert not store.list_runs(tmp_path / "runs")
