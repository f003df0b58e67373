"""Contract tests: the behaviour that users and other programs rely on, tested through public interfaces only.

They call the command line, pytest with the plugin, `python -m kernels_check`, the meter and the functions that load
runs, so that all other code may be rewritten. Expected outputs are files under expected/: `LORAMETER_CONTRACT=write
pytest tests/contract` updates them all. make_runs.py measured the two runs under runs/.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kernels_check.__main__ import main
from tests.contract import doors
from tests.contract.doors import Outcome

ENVIRONMENT = {
    "TZ": "UTC", "COLUMNS": "160", "LINES": "50", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1", "TERM": "dumb",
    "LORAMETER_RUNS": "runs",
}  # fmt: skip
REMOVED = (
    "FORCE_COLOR CLICOLOR_FORCE PY_COLORS TTY_COMPATIBLE TTY_INTERACTIVE JUPYTER_COLUMNS CI GITHUB_ACTIONS "
    "BUILD_NUMBER GITHUB_STEP_SUMMARY PYTEST_ADDOPTS PYTEST_XDIST_WORKER PYTHONWARNINGS"
).split()
STEP_S = 0.05
Change = Callable[[dict[str, Any]], dict[str, Any] | None]


def derive(folder: Path, name: str, record: Change = lambda one: one, manifest: Change = lambda one: one) -> None:
    """Copy the stored run "base" under another name with changed records and manifest; None drops a record."""
    path = folder / name
    shutil.copytree(doors.HERE / "runs" / "base", path)
    lines = (path / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    changed = filter(None, (record(json.loads(line)) for line in lines))
    (path / "trials.jsonl").write_text("".join(json.dumps(one) + "\n" for one in changed), encoding="utf-8")
    about = manifest(json.loads((path / "manifest.json").read_text(encoding="utf-8")) | {"run": name})
    (path / "manifest.json").write_text(json.dumps(about), encoding="utf-8")


def steady(**factors: float) -> Change:
    """Set times that differ by 0.4 % between replicates and by 0.1 % within one, times a factor for a variant or the
    control."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        arm = "control" if record["role"] == "control" else record["name"]
        level = STEP_S * factors.get(arm, 1.0) * (1 + 0.004 * record["replicate"])
        for metric, values in record["samples"].items():
            if metric.endswith("_s"):
                record["samples"][metric] = [level * (1 + 0.001 * (place % 2)) for place in range(len(values))]
        return record

    return change


def crashed(record: dict[str, Any]) -> dict[str, Any]:
    """Make one trial crash."""
    if record["trial"] != "r1-qlora":
        return record
    why = {"phase": "timed", "kind": "SIGKILL", "message": "the process ended with signal 9", "traceback": ""}
    return record | {"status": "crashed", "failure": why, "samples": {}, "values": {}, "turn_lengths": []}


def elsewhere(manifest: dict[str, Any]) -> dict[str, Any]:
    """Move the run to another machine."""
    about = manifest["provenance"] | {"cpu_model": "Another CPU", "device_name": "Another CPU"}
    return manifest | {"fingerprint": "0123456789ab", "provenance": about}


def write_folder(folder: Path) -> Path:
    """Create a folder with the stored runs in runs/, runs derived from them in derived/, and small files."""
    shutil.copytree(doors.HERE / "runs", folder / "runs")
    shutil.copytree(doors.HERE / "files", folder, dirs_exist_ok=True)
    shutil.copy(doors.STUDY, folder)
    shutil.copy(doors.SCRIPT, folder)
    derived = folder / "derived"
    derive(derived, "steady", steady())
    derive(derived, "slower", steady(qlora=1.5))
    derive(derived, "faster", steady(qlora=0.5))
    derive(derived, "failed", crashed)
    derive(derived, "elsewhere", steady(), elsewhere)
    derive(derived, "interrupted", steady(), lambda manifest: manifest | {"status": "interrupted"})
    derive(derived, "control-failed", steady(control=1.5))
    derive(derived, "no-claims", manifest=lambda one: one | {"study": one["study"] | {"claims": []}})
    (folder / "damaged" / "run").mkdir(parents=True)
    (folder / "damaged" / "run" / "manifest.json").write_text('{"run": ', encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared folder of commands that write nothing."""
    return write_folder(tmp_path_factory.mktemp("contract"))


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a single test, for commands that write."""
    monkeypatch.chdir(write_folder(tmp_path / "own"))
    return Path.cwd()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """A cache for the session, so that the user's cache is not read and prepared files are shared by the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAMETER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def fixed_environment(shared_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Use relative paths and UTC, without a terminal and without CI variables."""
    for name in REMOVED:
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(shared_folder)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def lorameter(capsys: pytest.CaptureFixture[str]) -> Callable[[str], Outcome]:
    """A function that runs the command line in this process."""

    def called(line: str) -> Outcome:
        capsys.readouterr()
        code = doors.call(line)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return called


@pytest.fixture
def kernels_check(capsys: pytest.CaptureFixture[str]) -> Callable[[str], Outcome]:
    """A function that runs the command of `kernels_check` in this process."""

    def called(line: str) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            sys.exit(main(shlex.split(line)))  # argparse exits by itself
        out, err = capsys.readouterr()
        return Outcome(int(left.value.code or 0), out, err)

    return called
