"""A training that was followed where it took place is a run like any other to every command that reads runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lorameter import cli

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "torch_loop.py"


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A folder with two runs of the same script, which was wrapped twice, and their names."""
    folder = tmp_path_factory.mktemp("followed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        for _ in range(2):
            command = ["wrap", "--no-report", "--runs-dir", "runs", "--", sys.executable, str(EXAMPLE)]
            assert cli.main(command) == 0
    return folder, sorted(path.name for path in (folder / "runs").iterdir())


@pytest.fixture
def lorameter(followed, monkeypatch, capsys):
    """The command line, among these runs; gives exit code, standard output and standard error."""
    folder, _ = followed
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LORAMETER_RUNS", str(folder / "runs"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        code = cli.main(list(words))
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def test_it_is_reported_and_listed(lorameter, followed):
    """As text and as data; nothing is compared with anything."""
    _, (first, second) = followed
    code, text, _ = lorameter("report", first)
    assert (code, "steps lie between two updates" in text, "control" in text) == (0, True, False)
    code, document, _ = lorameter("report", first, "--json")
    assert (code, json.loads(document)["run"]) == (0, first)
    _, listed, _ = lorameter("list", "runs")
    assert all(name in listed for name in (first, second))


def test_one_of_them_is_accepted_and_gates_the_other(lorameter, followed, tmp_path):
    """What is open fails, or passes where a policy lets it; a slower one is found by what is exact."""
    _, (first, second) = followed
    assert lorameter("accept", first)[0] == 0
    code, out, _ = lorameter("gate", "baseline", second)
    assert (code, "inconclusive" in out) == (3, True)
    policy = tmp_path / "policy.toml"
    policy.write_text("inconclusive = 'pass'\n")
    code, out, _ = lorameter("gate", "baseline", second, "--policy", str(policy))
    assert code in (0, 1)  # peak memory of two processes is what it is
    assert "step time" in out


def test_it_cannot_be_gone_on_with(lorameter, followed):
    """Its training has ended."""
    _, (first, _) = followed
    code, out, error = lorameter("run", "--resume", first)
    assert (code, out) == (2, "")
    assert "a training that was followed while it ran, which cannot be resumed. Run it again." in error


def test_its_history_is_a_line_of_points(lorameter, followed):
    """Each run one, with what it found."""
    _, names = followed
    code, out, _ = lorameter("history", "step_time_s", "--json")
    (track,) = json.loads(out)["tracks"]
    (line,) = track["lines"]
    assert (code, track["variant"], track["metric"]) == (0, "torch_loop", "step_time_s")
    assert [moment["run"] for moment in line["moments"]] == names
    assert all(moment["value"] > 0 for moment in line["moments"])
