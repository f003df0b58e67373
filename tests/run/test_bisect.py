"""Tests of the bisection for the slower commit, on constructed ratios without measurements.

Tests of the candidates between two ends: commits of a real repository, and releases as pip lists them.
"""

import dataclasses
import math
import subprocess

import pytest

from lorameter import cli
from lorameter.errors import UsageError
from lorameter.machine.provenance import probe_machine
from lorameter.records import codec, store
from lorameter.records.fileio import write_document
from lorameter.run import bisect as bisect_candidates
from lorameter.run.bisect import MAX_FACTOR, Candidate, bisect, find_earlier_run, list_steps
from lorameter.run.build_plan import PlanOptions, build_plan
from lorameter.run.workers.sides import command_sides
from lorameter.stats import Comparison, compare_trials


def candidates(count):
    return [Candidate(spec=f"c{place}", label=f"commit {place}") for place in range(count + 1)]


class Constructed:
    """A fake lockstep A/B with known true ratios and trials of known scatter around them."""

    def __init__(self, truth, *, spread=0.01, broken=(), seed=1):
        import numpy as np

        self.truth, self.spread, self.broken, self.asked = truth, spread, set(broken), []
        self.rng = np.random.default_rng(seed)

    def __call__(self, spec, replicates):
        place = int(spec.removeprefix("c"))
        self.asked.append((place, replicates))
        if place in self.broken:
            return Comparison(verdict="invalid", reason="it does not import")
        ratios = [math.exp(self.rng.normal(math.log(self.truth[place]), self.spread)) for _ in range(replicates)]
        return compare_trials([[1.0]] * replicates, [[ratio] for ratio in ratios], pairing="replicate")


@pytest.mark.parametrize("culprit", [1, 9, 16])
def test_one_commit_of_ten_percent_among_sixteen_takes_five_comparisons(culprit):
    """At every position, the bad end and four halvings find the commit."""
    truth = [1.0 if place < culprit else 1.10 for place in range(17)]
    asked = Constructed(truth, seed=culprit)
    found = bisect(candidates(16), asked, replicates=8)
    assert found.found
    assert found.culprit.label == f"commit {culprit}"
    assert found.before.label == f"commit {culprit - 1}"
    assert len(asked.asked) == len(found.looks) <= 5
    assert found.low < 1.10 < found.high
    assert found.share == pytest.approx(1.0, abs=0.3)


def test_an_inconclusive_commit_is_named_and_the_search_continues():
    """A commit with half the effect is on neither side, whatever the number of replicates."""
    truth = [1.0, 1.0, 1.0, 1.0, math.sqrt(1.1), 1.1, 1.1, 1.1, 1.1]
    asked = Constructed(truth, spread=0.02)
    found = bisect(candidates(8), asked, replicates=4)
    assert not found.found
    assert (found.before.label, found.culprit.label) == ("commit 3", "commit 5")
    assert [one.label for one in found.between] == ["commit 4"]
    assert "inconclusive: commit 4" in found.conclusion
    assert asked.asked == [(8, 4), (4, 4), (4, 8), (4, 4 * MAX_FACTOR), *asked.asked[4:]]
    assert {replicates for _, replicates in asked.asked[4:]} == {4}, "only the open one is repeated"


def test_a_commit_that_cannot_be_measured_is_skipped():
    """It is tried twice and then skipped; the neighbouring culprit is still found, or both are named."""
    truth = [1.0 if place < 6 else 1.1 for place in range(9)]
    found = bisect(candidates(8), Constructed(truth, broken=[4]), replicates=8)
    assert found.culprit.label == "commit 6"
    assert [look.side for look in found.looks if look.place == 4] == ["not measured"] * 2
    found = bisect(candidates(8), Constructed(truth, broken=[6]), replicates=8)
    assert not found.found
    assert [one.label for one in found.between] == ["commit 6"]


def test_a_bad_end_that_is_not_slower_ends_the_search_at_once():
    """One comparison is made, and the conclusion gives the reason."""
    found = bisect(candidates(16), Constructed([1.0] * 17, spread=0.005), replicates=8)
    assert (found.culprit, found.found, len(found.looks)) == (None, False, 1)
    assert "not slower" in found.conclusion
    faster = bisect(candidates(16), Constructed([1.0] * 16 + [0.8]), replicates=8)
    assert "improved" in faster.conclusion


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
    with pytest.raises(UsageError, match="not an ancestor"):
        list_steps("HEAD", "HEAD~2", folder)
    with pytest.raises(UsageError, match="'no-such' is neither"):
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
def test_requirements_that_are_not_a_range_are_refused(good, bad, message, pip, tmp_path):
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
    plan, _ = build_plan(small_study, machine, PlanOptions(select=["plain"], phases=("train",)), free_bytes=None)
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
    assert find_earlier_run(plan, runs).manifest.run == "1-whole"
    written("8-newer")
    assert find_earlier_run(plan, runs).manifest.run == "8-newer"
    assert find_earlier_run(dataclasses.replace(plan, sides=command_sides("a", "d")), runs) is None
