"""A folder of pytest-benchmark files: each file is a replicate of one side."""

from __future__ import annotations

import json
import random

import pytest

from lorameter.cli import main
from tests.constructed import FILES

FOREIGN = json.loads((FILES / "foreign.json").read_text())
BENCHMARKS = {"tests/test_it.py::test_fast", "tests/test_it.py::test_slow"}


@pytest.fixture
def saved(tmp_path):
    """A function that saves so many sessions of another project, a file each; its folder."""

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
    """A command with --json: its exit code, and its document or its message."""

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
    """As many replicates as files; the exit code is that of the verdict. Times of two sessions are never equivalent."""
    found, document = called(command, saved("before"), saved("after", scale))
    rows = [row["comparison"] | row if "comparison" in row else row for row in document["comparisons"]]
    assert {row["variant"]: row["verdict"] for row in rows} == dict.fromkeys(BENCHMARKS, verdict)
    assert all(row["low"] < row["ratio"] < row["high"] and row["replicates"] == 6 for row in rows)
    assert found == code


@pytest.fixture
def storage(saved):
    """The storage of pytest-benchmark with three sessions of two names, one of which is slower."""
    for name, scale in (("main", 1.0), ("slow", 3.0)):
        for path in sorted(saved(name, scale, count=3).rglob("*_x.json")):
            target = path.parents[2] / ".benchmarks" / path.parent.name / path.name.replace("_x", f"_{name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    return target.parents[1]


@pytest.mark.parametrize(("candidate", "code", "verdict"), [("slow", 1, "regressed"), ("main", 3, "inconclusive")])
def test_files_of_pytest_benchmark_are_named_by_a_pattern(storage, called, candidate, code, verdict):
    """As its own storage has them, the sessions of all names in one folder."""
    found, document = called("compare", storage / "*" / "*_main.json", storage / "*" / f"*_{candidate}.json")
    assert found == code
    for row in document["comparisons"]:
        assert (row["verdict"], row["replicates"]) == (verdict, 3)
        assert row["low"] <= row["ratio"] <= row["high"]


def test_one_file_says_how_to_give_several(saved, called):
    """By itself and alone in its folder: a ratio, no interval, and the way to one."""
    base, candidate = saved("before", count=1), saved("after", count=1)
    files = [next(folder.rglob("*.json")) for folder in (base, candidate)]
    for sides in ((base, candidate), files):
        code, document = called("compare", *sides)
        assert code == 3
        assert all(row["ratio"] > 0 and row["low"] is None for row in document["comparisons"])
        assert all("compare '.benchmarks/*/*_NAME.json'" in row["reason"] for row in document["comparisons"])


def test_a_benchmark_that_only_one_file_has_gets_no_interval(saved, called):
    """The others do."""
    base, candidate = saved("before"), saved("after")
    for path in sorted(candidate.rglob("*.json"))[1:]:
        data = json.loads(path.read_text())
        data["benchmarks"].pop()
        path.write_text(json.dumps(data))
    _, document = called("compare", base, candidate)
    assert {row["variant"].rpartition("::")[2]: row["low"] is None for row in document["comparisons"]} == {
        "test_fast": False,
        "test_slow": True,
    }


@pytest.mark.parametrize("harm", ["another machine", "of lorameter", "no JSON", "no file"])
def test_a_folder_that_is_not_one_side_is_refused(saved, called, harm):
    """The message names the file; exit code 2."""
    base, folder = saved("before"), saved("after")
    last = sorted(folder.rglob("*.json"))[-1]
    if harm == "another machine":
        saved("after", count=1, python_version="2.7")
        said = "python_version"
    elif harm == "of lorameter":
        last.write_text((FILES / "sound.json").read_text())
        said = f"{last}: it was written by lorameter"
    elif harm == "no JSON":
        last.write_text("{")
        said = f"{last}: cannot be read as JSON"
    else:
        for path in folder.rglob("*.json"):
            path.unlink()
        said = "not found"
    code, message = called("compare", base, folder)
    assert code == 2
    assert said in message


def test_the_folder_of_a_run_is_the_run(write_run, called):
    """Whatever lies in it."""
    paths = [write_run(name, {"plain": [1.0, 1.1, 1.2], "nf4": [1.0, 1.1, 1.2]}) for name in ("a", "b")]
    _, document = called("compare", *paths)
    assert document["base"] == "a"
