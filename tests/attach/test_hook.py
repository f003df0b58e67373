"""Tests of the hook in a child process: it attaches to a process that trains and to no other."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lorameter.records import store

ROOT = Path(__file__).parents[2]

LOOP = """
    import torch
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    def train(steps):
        for ids in torch.utils.data.DataLoader(torch.randint(0, 32, (2 * steps, 6)), batch_size=2):
            loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()
"""


@pytest.fixture
def script(tmp_path):
    """A function that writes a script and returns its name."""

    def write(text, name="train.py", loop=LOOP):
        (tmp_path / name).write_text(textwrap.dedent(loop) + textwrap.dedent(text))
        return name

    return write


@pytest.mark.faults
def test_data_workers_and_forks_are_not_followed(wrapped, script):
    """Spawned and forked data workers, and a forked child that trains itself, send no events."""
    text = """
        import os
        class Rows(torch.utils.data.Dataset):
            def __len__(self): return 8
            def __getitem__(self, place): return torch.tensor([place])
        if __name__ == "__main__":
            for context in ("spawn", "fork"):
                loader = torch.utils.data.DataLoader(Rows(), num_workers=1, multiprocessing_context=context)
                assert len(list(loader)) == 8
            train(3)
            child = os.fork()
            if not child:
                train(5)
                raise SystemExit(0)
            assert os.waitpid(child, 0)[1] == 0
            train(1)
    """
    done, events = wrapped("python", script(text))
    assert (done.returncode, done.stderr) == (0, "")
    assert [one["what"] for one in events] == ["begin", "step", "step", "step", "end"]
    assert len({one["pid"] for one in events}) == 1


@pytest.mark.faults
def test_children_forked_after_a_watched_step_exit(wrapped, script):
    """After a watched step, forked data workers and a forked child exit and do not wait for a thread of the
    profiler."""
    text = """
        import os
        class Rows(torch.utils.data.Dataset):
            def __len__(self): return 4
            def __getitem__(self, place): return torch.tensor([place])
        train(5)
        loader = torch.utils.data.DataLoader(Rows(), num_workers=1, multiprocessing_context="fork")
        print(sum(int(rows.sum()) for rows in loader))
        child = os.fork()
        if not child:
            raise SystemExit(0)
        assert os.waitpid(child, 0)[1] == 0
        train(2)
    """
    done, events = wrapped("python", script(text), WATCH_AFTER="2", timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "6\n", "")
    steps = [one["checks"] for one in events if one["what"] == "step"]
    assert steps[2] > 10
    assert steps[:2] + steps[3:] == [None] * 5


def test_a_script_that_never_trains_is_unchanged(wrapped, script, tmp_path):
    """A script without a training imports nothing of lorameter, has no hook folder on its path, and imports the user's
    own sitecustomize under its name."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sitecustomize.py").write_text("import builtins; builtins.MINE = True\n")
    text = """
        import sys, sitecustomize, transformers
        assert transformers.__version__
        print(MINE, sitecustomize.__file__, [p for p in sys.path if 'attach' in p])
        print([name for name in sys.modules if 'lorameter' in name])
    """
    done, events = wrapped("python", script(text, loop=""), python_path=str(tmp_path / "mine"))
    expected = ["True", str(tmp_path / "mine" / "sitecustomize.py"), "[]", "[]"]
    assert (done.stdout.split(), events) == (expected, []), done.stderr


def test_an_interpreter_without_the_needed_packages_is_not_measured(script, tmp_path):
    """Its training runs unchanged, and the wrapping command names the missing package and how to install it."""
    without = "import sys\nsys.modules['msgspec'] = None  # as if it were not installed\n" + textwrap.dedent(LOOP)
    words = [sys.executable, "-m", "lorameter.cli", "wrap", "--no-report", "--runs-dir", "runs", "--", sys.executable]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'harness'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, script("print('loss', train(20))", loop=without)], cwd=tmp_path, env=environment, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout[:5]) == (0, "loss "), done.stderr
    assert not store.list_runs(tmp_path / "runs")
    assert f"a training in this process is not measured: {sys.executable} lacks msgspec" in done.stderr
    assert "nothing was measured: " in done.stderr
    assert f"{sys.executable} -m pip install msgspec" in done.stderr
    assert "no optimizer" not in done.stderr
