"""Fixtures for injected faults: a real command line in its own process, on a study that takes a second."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorameter.records import store

FAKE_WORKERS = Path(__file__).with_name("fake_workers.py")
STUDY = """
[workload]
sequence_length = 32
batch_size = 2
train_sequences = 16
[protocol]
replicates = 3
turns = 2
[[variant]]
name = "a"
r = 4
[[variant]]
name = "b"
r = 8
"""


CONFTEST = """
import importlib.util, os
import pytest
spec = importlib.util.spec_from_file_location("fake_workers", os.environ["FAKE_WORKERS"])
fake_workers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_workers)
from lorameter.pytest_plugin import attach

def pytest_configure(config):
    fake_workers.local.LocalExecutor = fake_workers.InstantExecutor
    attach(config)
"""
BENCHMARK = """
import pytest

@pytest.mark.lorameter("train")
def test_train(variant_name, replay):
    replay()
"""


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path_factory, monkeypatch):
    """A temporary folder for this test, which must be empty afterwards."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture(autouse=True)
def no_bytecode(monkeypatch):
    """Write no bytecode: a process with a file-size limit would leave a truncated .pyc that later processes cannot
    load."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")


@pytest.fixture
def runs(tmp_path):
    """The folder of this test's runs."""
    return tmp_path / "runs"


@pytest.fixture
def tiny_disk():
    """A function that mounts a small disk with the given free KiB and returns the file that fills the rest; the test is
    skipped where no disk can be mounted."""
    mounted = []

    def mount(folder, free_kib, of_kib=256):
        folder.mkdir(parents=True, exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", f"size={of_kib}k", "none", str(folder)]
        if os.geteuid() or subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("a small disk takes the right to mount one")
        mounted.append(folder)
        (folder / "ballast").write_bytes(b"x" * (of_kib - free_kib) * 1024)
        return folder / "ballast"

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def command(tmp_path, runs):
    """A function that returns the command line of a measurement with fake processes."""
    (tmp_path / "small.toml").write_text(STUDY)

    def made(*options, stop="-"):
        words = options or ("run", str(tmp_path / "small.toml"), "--phase", "train", "--interleave", "lockstep")
        return [
            "env",
            f"STOP_AT={stop}",
            sys.executable,
            str(FAKE_WORKERS),
            *words,
            "--runs-dir",
            str(runs),
        ]

    return made


@pytest.fixture
def start_until_stop():
    """A context manager that starts a command line, waits until it has reached the point in STOP_AT, and yields its
    process."""

    @contextlib.contextmanager
    def start(words, **options):
        read, write = os.pipe()
        environment = os.environ | {"STOPPED": str(write)}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(words, pass_fds=[write], env=environment, **streams | options)
        os.close(write)
        try:
            with os.fdopen(read) as stream:
                assert stream.readline() == "stopped\n", process.communicate()
            yield process
        finally:
            process.kill()
            process.communicate()

    return start


@pytest.fixture
def read_run(runs):
    """A function that reads the only run."""

    def read():
        (path,) = store.list_runs(runs)
        return store.read_run(path.name, runs)

    return read


@pytest.fixture
def resume(command, read_run):
    """A function that resumes the only run and returns it."""

    def resume_run():
        done = subprocess.run(
            command("run", "--resume", read_run().manifest.run, "--json"), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return read_run()

    return resume_run


@pytest.fixture
def session(tmp_path, runs, command, monkeypatch):
    """A function that returns the command line of a pytest session on the same study, to be run in `tmp_path`."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_small.py").write_text(BENCHMARK)
    monkeypatch.setenv("FAKE_WORKERS", str(FAKE_WORKERS))

    def made(*options, stop="-"):
        words = [sys.executable, "-m", "pytest", str(tmp_path), f"--lorameter-study={tmp_path / 'small.toml'}"]
        ours = ["--lorameter-interleave=lockstep", f"--lorameter-runs-dir={runs}", "-p", "no:cacheprovider"]
        return ["env", f"STOP_AT={stop}", *words, *ours, *options]

    return made


@pytest.fixture
def git():
    """A function that runs git in a folder and returns the printed lines."""

    def run(folder, *arguments):
        who = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
        done = subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.splitlines()

    return run


@pytest.fixture
def repository(tmp_path, monkeypatch, git):
    """A repository in the current folder with two commits of a package other than lorameter."""
    folder = tmp_path / "repository"
    (folder / "gadget").mkdir(parents=True)
    git(folder, "init", "--quiet", "--initial-branch=main")
    for value in (1, 2):
        (folder / "gadget" / "__init__.py").write_text(f"VALUE = {value}\n")
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "--message", str(value))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def ab(tmp_path, command):
    """A function that returns the command line of an A/B of the two commits."""

    def made(stop="-"):
        sides = ("--base", "HEAD~1", "--candidate", "HEAD", "--phase", "train", "--replicates", "2", "--variant", "a")
        return command("ab", str(tmp_path / "small.toml"), *sides, stop=stop)

    return made
