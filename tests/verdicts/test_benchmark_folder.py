"""Tests of a folder of pytest-benchmark files: each file is a replicate of one side."""

from __future__ import annotations

import json
import random

import pytest

from lorameter.cli import main

FOREIGN = {
    "machine_info": {"cpu": {"brand_raw": "A CPU"}, "machine": "x86_64", "system": "Linux", "python_version": "3.11.7"},
    "benchmarks": [{"fullname": "tests/test_it.py::test_fast"}, {"fullname": "tests/test_it.py::test_slow"}],
    "version": "5.1.0",
}
BENCHMARKS = {"tests/test_it.py::test_fast", "tests/test_it.py::test_slow"}


@pytest.fixture
def saved(tmp_path):
    """A function that saves sessions of another project, one file each, and returns their folder."""

    def save(name, scale=1.0, count=6, **machine):
        rng = random.Random(name)
        for number in range(count):
            data = json.loads(json.dumps(FOREIGN))
            data["machine_info"] |= machine
            process = scale * rng.uniform(0.995, 1.005)
            for row in data["benchmarks"]:
                row["stats"] = {"data": [process * rng.uniform(0.999, 1.001) for _ in range(5)]}
            path = tmp_path / name / "Linux-CPython-3.11-64bit" / f"{number:04d}_x.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(data))
        return tmp_path / name

    return save


@pytest.fixture
def called(tmp_path, capsys):
    """A function that runs a command with --json and returns its exit code with its document or message."""

    def run(*words):
        code = main([*map(str, words), "--json", "--runs-dir", str(tmp_path / "runs")])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else said.err

    return run


@pytest.mark.parametrize("command", ["compare", "gate"])
@pytest.mark.parametrize(
    ("scale", "code", "verdict"), [(1.5, 1, "regressed"), (0.5, 0, "improved"), (1.0, 3, "inconclusive")]
)
def test_folders_give_a_verdict_with_an_interval(saved, called, command, scale, code, verdict):
    """Each file is a replicate, and the exit code is that of the verdict. Times of two sessions are never
    equivalent."""
    found, document = called(command, saved("before"), saved("after", scale))
    rows = [row["comparison"] | row if "comparison" in row else row for row in document["comparisons"]]
    assert {row["variant"]: row["verdict"] for row in rows} == dict.fromkeys(BENCHMARKS, verdict)
    assert all(row["low"] < row["ratio"] < row["high"] and row["replicates"] == 6 for row in rows)
    assert found == code


def test_files_are_named_by_a_pattern(saved, called):
    """pytest-benchmark stores one file for each session."""
    base, candidate = (saved(name, scale, count=3) for name, scale in (("before", 1.0), ("after", 3.0)))
    code, document = called("compare", base / "*" / "*_x.json", candidate / "*" / "*_x.json")
    assert code == 1
    assert {(row["verdict"], row["replicates"]) for row in document["comparisons"]} == {("regressed", 3)}


@pytest.mark.parametrize("harm", ["another machine", "of lorameter", "no JSON", "no file"])
def test_a_folder_that_is_not_one_side_is_refused(saved, called, harm):
    """The command exits with 2, and the message names the file."""
    base, folder = saved("before"), saved("after")
    last = sorted(folder.rglob("*.json"))[-1]
    if harm == "another machine":
        saved("after", count=1, python_version="2.7")
        said = "python_version"
    elif harm == "of lorameter":
        last.write_text('{"machine_info": {"lorameter": {"device": "cpu"}}, "benchmarks": []}')
        said = f"{last}: it was written by lorameter"
    elif harm == "no JSON":
        last.write_text("{")
        said = f"{last}: cannot be read as JSON"
    else:
        for path in folder.rglob("*.json"):
            path.unlink()
        said = "a folder without manifest.json"
    code, message = called("compare", base, folder)
    assert code == 2
    assert said in message
