"""What faults are injected into: a real command line, in a process of its own, on a study that takes a second."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.records import store

PRETENDED = Path(__file__).with_name("pretended.py")
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


@pytest.fixture
def runs(tmp_path):
    """Where this test's runs are written."""
    return tmp_path / "runs"


@pytest.fixture
def command(tmp_path, runs):
    """A function that makes the command line of a measurement whose processes pretend."""
    (tmp_path / "small.toml").write_text(STUDY)

    def made(*options, stop="-"):
        words = options or ("run", str(tmp_path / "small.toml"), "--phase", "train", "--interleave", "lockstep")
        return ["env", f"STOP_AT={stop}", sys.executable, str(PRETENDED), *words, "--runs-dir", str(runs)]

    return made


@pytest.fixture
def stopped():
    """A function that starts a command line and gives its process once it has come to where it was to stop."""

    @contextlib.contextmanager
    def started(words, **options):
        read, write = os.pipe()
        environment = os.environ | {"STOPPED": str(write)}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(words, pass_fds=[write], env=environment, **streams | options)
        os.close(write)
        try:
            with os.fdopen(read) as told:
                assert told.readline() == "stopped\n", process.communicate()
            yield process
        finally:
            process.kill()
            process.communicate()

    return started


@pytest.fixture
def only_run(runs):
    """A function that reads the one run that was written."""

    def read():
        (path,) = store.list_runs(runs)
        return store.read_run(path.name, runs)

    return read


@pytest.fixture
def resumed(command, only_run):
    """A function that goes on with the one run, and says what became of it."""

    def go_on():
        done = subprocess.run(
            command("run", "--resume", only_run().manifest.run, "--json"), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return only_run()

    return go_on
