"""The hook in a child: attached where there is a training, and nowhere else."""

import importlib.metadata
import os
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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


def test_a_script_that_never_trains_is_left_alone(wrapped, script):
    """Nothing of lorameter is imported in it."""
    text = "import transformers; print(len(transformers.__version__) > 0)"
    done, told = wrapped(
        "python", script(f"{text}\nimport sys; print([name for name in sys.modules if 'lorameter' in name])")
    )
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"
    assert told == []


@pytest.mark.faults
def test_data_workers_and_forks_are_not_followed(wrapped, script):
    """Spawned workers import the script, forks inherit a training, one that trains itself does it unseen."""
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
    done, told = wrapped("python", script(text))
    assert (done.returncode, done.stderr) == (0, "")
    assert [one["what"] for one in told] == ["begin", "step", "step", "step", "end"]
    assert len({one["pid"] for one in told}) == 1


@pytest.mark.faults
def test_what_forks_after_a_watched_step_comes_to_its_end(wrapped, script):
    """Data workers, and a child that ends by itself, which would wait for a thread that the profiler has left."""
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
    done, told = wrapped("python", script(text), WATCH_AFTER="2", timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "6\n", "")
    steps = [one["checks"] for one in told if one["what"] == "step"]
    assert steps[2] > 10
    assert steps[:2] + steps[3:] == [None] * 5


def test_the_users_own_sitecustomize_is_imported(wrapped, script, tmp_path):
    """And stands under its name; the folder of the hook is not on the path."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sitecustomize.py").write_text("import builtins; builtins.MINE = True\n")
    text = "import sys, sitecustomize; print(MINE, sitecustomize.__file__, [p for p in sys.path if 'attach' in p])"
    done, _ = wrapped("python", script(text, loop=""), python_path=str(tmp_path / "mine"))
    assert done.stdout.split() == ["True", str(tmp_path / "mine" / "sitecustomize.py"), "[]"], done.stderr


def make_interpreter(folder, *packages):
    """A virtual environment with torch, these packages, and what they need."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    wanted, known = ["torch", *packages], set()
    while wanted:
        found = importlib.metadata.distribution(wanted.pop())
        if found.name in known:
            continue
        known.add(found.name)
        required = map(Requirement, found.requires or ())
        wanted += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
        for name in {path.parts[0] for path in found.files} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(Path(found.locate_file(name)))
    return str(folder / "bin" / "python")


@pytest.mark.parametrize(
    "packages", [(), pytest.param(("filelock", "msgspec"), marks=pytest.mark.faults)], ids=["none", "all"]
)
def test_an_interpreter_needs_few_packages_to_be_measured(script, tmp_path, packages):
    """One that lacks them says so before the training, which is as ever, and so does the command that wraps it."""
    python = make_interpreter(tmp_path / "bare", *packages)
    words = [sys.executable, "-m", "lorameter.cli", "wrap", "--no-report", "--runs-dir", "runs", "--", python]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'harness'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, script("print('loss', train(20))")], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout[:5]) == (0, "loss "), done.stderr
    runs = store.list_runs(tmp_path / "runs")
    if packages:
        (record,) = store.read_run(str(runs[0]), runs[0].parent).records
        assert (record.status, len(runs)) == ("ok", 1)
    else:
        assert not runs
        assert f"a training in this process is not measured: {python} lacks msgspec" in done.stderr
        assert "nothing was measured: " in done.stderr
        assert f"{python} -m pip install msgspec" in done.stderr
        assert "no optimizer" not in done.stderr
