"""A fake of the driver's library, compiled by the tests and loaded by nvidia-ml-py in place of the real one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("fake_nvml.c")
COMPILER = shutil.which(os.environ.get("CC", "cc"))


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """Folders with the fake library, and with one that cannot be loaded."""
    if COMPILER is None:
        pytest.skip("no C compiler on this machine to build the stand-in for NVML with")
    found = {"none": tmp_path_factory.mktemp("nvml-none")}
    (found["none"] / "libnvidia-ml.so.1").write_text("what the loader finds first, and cannot load\n")
    found["new"] = tmp_path_factory.mktemp("nvml-new")
    library = str(found["new"] / "libnvidia-ml.so.1")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", str(SOURCE), "-o", library], check=True)
    return found


@pytest.fixture
def nvml(libraries, tmp_path):
    """A function that runs Python lines against the fake library, and returns what they `report`.

    `answers` are the lines of the fake's file (`{"0.power": 250000}`), `driver` selects new or none, and `variables` is
    the environment of the process. The dynamic loader searches LD_LIBRARY_PATH first, and nvidia-ml-py opens
    libnvidia-ml.so.1 by that name, so that the code under test is the code for a real GPU.
    """

    def run(lines, answers=None, *, driver="new", **variables):
        script = tmp_path / "answers"
        answered = "".join(f"{key}={value}\n" for key, value in (answers or {}).items())
        script.write_text(answered, errors="surrogateescape")  # a driver may answer with bytes that are not text
        program = "import json\ndef report(value): print(json.dumps(value, default=str))\n" + textwrap.dedent(lines)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_")}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**inherited, "LD_LIBRARY_PATH": str(libraries[driver]), "FAKE_NVML": str(script), **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
