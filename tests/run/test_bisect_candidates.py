"""Tests of the candidates between two ends: commits of a real repository, and releases as pip lists them."""

import dataclasses
import subprocess

import pytest

from lorameter import cli
from lorameter.errors import UsageError
from lorameter.machine.provenance import probe_machine
from lorameter.records import codec, store
from lorameter.records.fileio import write_document
from lorameter.run import bisect as bisect_candidates
from lorameter.run.bisect import find_measured, list_steps
from lorameter.run.build_plan import build_plan
from lorameter.run.workers.sides import command_sides


@pytest.fixture
def repository(tmp_path):
    """A repository of five commits in a row, and a branch that was merged between the third and the fourth."""

    def git(*words):
        identity = ("-c", "user.name=t", "-c", "user.email=t@t")
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "--quiet", "--initial-branch=main")
    for number in range(3):
        git("commit", "--quiet", "--allow-empty", "-m", f"main {number}")
    git("checkout", "--quiet", "-b", "side")
    git("commit", "--quiet", "--allow-empty", "-m", "side")
    git("checkout", "--quiet", "main")
    git("merge", "--quiet", "--no-ff", "-m", "main 3, merged", "side")
    git("commit", "--quiet", "--allow-empty", "-m", "main 4 of https://me:secret@host/x")
    return tmp_path, git


def test_commits_are_the_states_that_the_branch_was_in(repository):
    """Commits are in order from the good end; a merge is one step."""
    folder, git = repository
    found = list_steps("HEAD~4", "HEAD", folder)
    assert [one.label.split(" ", 1)[1] for one in found[1:]] == [
        "main 1", "main 2", "main 3, merged", "main 4 of https://***@host/x",
    ]  # fmt: skip
    assert found[0].spec == git("rev-parse", "HEAD~4")
    assert found[-1].spec == git("rev-parse", "HEAD")
    assert found[0].label.startswith("HEAD~4 (")


def test_ends_out_of_order_are_refused(repository):
    """Equal ends, reversed ends and ends on two branches are refused."""
    folder, _ = repository
    with pytest.raises(UsageError, match="same commit"):
        list_steps("HEAD", "main", folder)
    with pytest.raises(UsageError, match="no ancestor"):
        list_steps("HEAD", "HEAD~2", folder)
    with pytest.raises(UsageError, match="'no-such' is no"):
        list_steps("HEAD", "no-such", folder)


@pytest.fixture
def pip(monkeypatch):
    """A fake pip that lists the releases of a package; returns the commands that it received."""
    asked = []

    def run(command, **_):
        asked.append(command)
        out = "peft (0.21.2)\nAvailable versions: 0.21.2, 0.21.1, 0.20.0, 0.19.1, 0.19.0, 0.18.0, not-a-version\n"
        return subprocess.CompletedProcess(command, 0, out, "")

    monkeypatch.setattr(bisect_candidates.subprocess, "run", run)
    monkeypatch.setattr(
        "lorameter.run.workers.sides.run_git", lambda *_: subprocess.CompletedProcess([], 128, "", "no")
    )
    return asked


def test_releases_are_those_that_pip_has(pip, tmp_path):
    """The releases between the ends are in order, each with the other requirements."""
    found = list_steps("peft==0.19.0 torch==2.13.0", "torch==2.13.0 peft==0.21.2", tmp_path)
    assert [one.label for one in found] == ["peft 0.19.0", "peft 0.19.1", "peft 0.20.0", "peft 0.21.1", "peft 0.21.2"]
    assert found[2].spec == "peft==0.20.0 torch==2.13.0"
    assert "--pre" not in pip[0]
    list_steps("peft==0.19.0rc1", "peft==0.20.0", tmp_path)
    assert "--pre" in pip[1]


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("peft==0.21.0", "peft==0.19.0", "good one comes first"),
        ("peft==0.19.0", "torch==2.0", "two releases of one package"),
        ("peft>=0.19.0", "peft==0.21.0", "exact version"),
        ("peft==0.19.*", "peft==0.21.0", "exact version"),
        ("peft==0.19.0 torch==2.0", "peft==0.21.0 torch==2.1", "version of one package"),
        ("peft==0.19.0", "peft==0.21.0 torch==2.1", "version of one package"),
    ],
)
def test_requirements_that_are_no_range_are_refused(good, bad, message, pip, tmp_path):
    """The error has a valid replacement and comes before pip is called."""
    with pytest.raises(UsageError, match=message):
        list_steps(good, bad, tmp_path)
    assert not pip


def test_the_command_lists_without_measuring(repository, monkeypatch, capsys):
    """--dry-run lists the candidates, and invalid options are refused before any measurement."""
    folder, _ = repository
    monkeypatch.chdir(folder)
    words = ["bisect", "training-step", "--good", "HEAD~4", "--bad", "HEAD"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert cli.main([*words, "--metric", "host_peak_train_bytes"]) == 2
    assert cli.main([*words, "--variant", "nothing"]) == 2
    assert cli.main([*words[:-1], "HEAD~4"]) == 2


def test_a_measured_comparison_of_the_same_sides_is_reused(write_run, small_study, machine):
    """The newest complete run of the same study, variant, phase, sides and machine is reused."""
    sides = command_sides("a", "b")
    plan, _ = build_plan(small_study, machine, free_bytes=None, select=["plain"], phases=("train",))
    plan = dataclasses.replace(plan, sides=sides)
    device = probe_machine().device_name

    def written(name, *, base="a", candidate="b", **changes):
        path = write_run(name, {"plain": [1.0, 1.1]}, facts={"device_name": changes.pop("device", device)})
        specs = {"base": base, "candidate": candidate}
        sides = {side: {"spec": spec, "label": spec, "worker": ""} for side, spec in specs.items()}
        fields = {"study": codec.to_json(plan.study), "selection": ["plain"], "sides": sides} | changes
        write_document(path / "manifest.json", codec.to_json(store.read_manifest(path)) | fields)
        return path.parent

    runs = written("1-whole")
    written("2-other-side", candidate="c")
    written("3-broken-off", status="interrupted")
    written("4-elsewhere", device="another")
    written("5-another-study", study=codec.to_json(small_study) | {"title": "another"})
    written("6-another-variant", selection=["nf4"])
    (written("7-damaged") / "7-damaged" / "manifest.json").write_text("{")
    assert find_measured(plan, runs).manifest.run == "1-whole"
    written("8-newer")
    assert find_measured(plan, runs).manifest.run == "8-newer"
    assert find_measured(dataclasses.replace(plan, sides=command_sides("a", "d")), runs) is None
