"""Tests of the gate: a policy decides, and only a finding of "no worse" passes.

Tests of baselines: an accepted valid run, stored for its fingerprint and study.
"""

from __future__ import annotations

import dataclasses
import json

import pytest

from lorameter.cli import main
from lorameter.report.annotations import annotation
from lorameter.stats import VerdictRule
from lorameter.verdicts.gate import LimitRule, Policy, read_baselines

BASE = {"plain": [0.100, 0.101, 0.099, 0.1005], "nf4": [0.200, 0.201, 0.199, 0.2005]}
SLOW = BASE | {"nf4": [time * 1.2 for time in BASE["nf4"]]}


@pytest.fixture
def gate(tmp_path, capsys, write_run, monkeypatch):
    """A function that runs the gate on base `a` and candidate `b` with a policy as text and returns exit code and
    output."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    def run(candidate, policy=None, *options, **changes):
        write_run("a", BASE)
        write_run("b", candidate, **changes)
        if policy is not None:
            (tmp_path / "policy.toml").write_text(policy)
            options = (*options, "--policy", str(tmp_path / "policy.toml"))
        code = main(["gate", "a", "b", "--runs-dir", str(tmp_path / "runs"), *options])
        captured = capsys.readouterr()
        return code, captured.out if captured.out else captured.err

    return run


@pytest.mark.parametrize(("candidate", "policy", "code"), [
    (SLOW, None, 1),
    (BASE, None, 3),
    (BASE, "inconclusive = 'pass'", 0),
    (SLOW, "inconclusive = 'pass'", 1),
    (SLOW, "inconclusive = 'pass'\ntolerance = 0.3\nmargin = 0.5", 0),
    (SLOW, "inconclusive = 'pass'\n[[limit]]\nvariant = 'nf*'\ntolerance = 0.3", 0),
    (SLOW, "inconclusive = 'pass'\n[[limit]]\nvariant = 'plain'\ntolerance = 0.3", 1),
    (SLOW, "metrics = ['*peak*']", 0),
    (BASE, "metrics = ['*peak*', 'cold_*']", 5),
    (BASE, "inconclusive = 'pass'\nrequired = ['nf4', 'pl*']", 0),
    (BASE, "inconclusive = 'pass'\nrequired = ['int8']", 5),
    ({"plain": BASE["plain"]}, "inconclusive = 'pass'", 5),
])  # fmt: skip
def test_a_policy_decides(gate, candidate, policy, code):
    """The policy sets verdicts, limits for a variant, and gated and required metrics."""
    assert gate(candidate, policy)[0] == code


def test_an_invalid_run_never_passes(gate):
    """A failed control exits with 4, whatever the policy accepts."""
    assert gate(BASE, "inconclusive = 'pass'\ntolerance = 0.5", control=1.3)[0] == 4


@pytest.mark.parametrize(("policy", "said"), [
    ("inconclusiv = 'pass'", "inconclusiv = 'pass': unknown key. Did you mean inconclusive?"),
    ("[[limit]]\ntolerence = 1", "tolerence"),
    ("inconclusive = 'ignore'", "inconclusive = 'ignore'"),
    ("tolerance = -0.1", "tolerance = -0.1"),
    ("margin = 0", "margin = 0"),
    ("[[limit]]\nmargin = nan", "margin = nan"),
    ("tolerance = '1 %'", "tolerance = '1 %'"),
    ("metrics = 'step_time_s'", "metrics = 'step_time_s'"),
    ("metrics = ['step_tme_s']", "Did you mean 'step_time_s'"),
    ("tolerance =", "not a TOML file"),
])  # fmt: skip
def test_an_invalid_policy_is_refused(gate, policy, said):
    """The command exits with 2 and the key, its value and the remedy."""
    code, text = gate(BASE, policy)
    assert code == 2
    assert said in text


def test_an_exception_inside_is_never_a_pass(gate, monkeypatch):
    """The exit code is 70, even if all comparisons would pass."""

    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("lorameter.commands.report.compare", broken)
    assert gate(BASE, "inconclusive = 'pass'")[0] == 70


def test_github_gets_annotations_and_a_summary(gate, monkeypatch, tmp_path):
    """Each failure is an error, the worst first; the summary is appended to that of other steps."""
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    code, text = gate(SLOW, None, "--format", "github")
    assert code == 1
    lines = text.splitlines()
    assert lines[0].startswith("::error title=lorameter gate::Gate failed (exit 1)")
    assert lines[1].startswith("::error title=lorameter%3A nf4%2C step time regressed::1.20")
    assert "::error title=lorameter%3A plain%2C step time inconclusive" in text
    assert summary.read_text().startswith("before\n### Gate failed")


def test_an_annotation_cannot_be_broken_out_of():
    """Line ends and percent signs are escaped, in the title also colons and commas."""
    assert annotation("error", "a:b,c%\n", "x\r\n::error::100%") == (
        "::error title=a%3Ab%2Cc%25%0A::x%0D%0A::error::100%25"
    )


def test_limits_are_taken_key_by_key_from_the_last_that_matches():
    """A later rule with only a margin keeps the tolerance of an earlier one; computed bytes stay exact."""
    policy = Policy(
        tolerance=0.02,
        limit=(LimitRule(variant="nf4*", tolerance=0.2), LimitRule(metric="cold_*", margin=0.5)),
    )
    assert policy.limits_of("nf4-r16", "cold_load_time_s") == VerdictRule(tolerance=0.2, margin=0.5)
    assert policy.limits_of("plain", "step_time_s") == VerdictRule(tolerance=0.02, margin=0.05)
    assert policy.limits_of("plain", "adapter_bytes").tolerance == 0
    assert policy.limits_of("plain", "host_peak_train_bytes").tolerance == 0.02
    assert policy.limits_of("nf4", "adapter_bytes").tolerance == 0.2


def test_a_summary_that_cannot_be_written_is_never_a_pass(gate, monkeypatch, tmp_path):
    """The path of the summary is a folder."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    assert gate(BASE, "inconclusive = 'pass'", "--format", "github")[0] == 2


FAST = {name: [time / 1.2 for time in times] for name, times in BASE.items()}


@pytest.fixture
def lorameter(tmp_path, capsys):
    """A function that runs a command with --json and returns its exit code with its document or message."""

    def run(*arguments):
        code = main([*map(str, arguments), "--json", "--runs-dir", str(tmp_path / "runs")])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out else captured.err

    return run


def test_the_accepted_run_is_the_base(write_run, lorameter):
    """`baseline` is the accepted run and not a newer one; accepting another replaces it and says so."""
    write_run("a", BASE)
    write_run("b", FAST)
    code, document = lorameter("accept", "a")
    assert code == 0
    assert document["accepted"]["run"] == "a"
    assert document["accepted"]["study"] == "small"
    assert document["replaced"] is None
    write_run("c", BASE)
    code, document = lorameter("compare", "baseline", "c")
    assert code == 3
    assert document["base"] == "a"
    assert lorameter("accept", "b")[1]["replaced"]["run"] == "a"
    assert lorameter("compare", "baseline", "a")[1]["base"] == "b"


def test_each_fingerprint_and_study_has_its_own_baseline(write_run, lorameter, small_study, tmp_path):
    """A run of another machine or study neither replaces a baseline nor is compared with it."""
    write_run("a", BASE)
    write_run("b", BASE, facts={"device_name": "Other CPU"})
    write_run("c", BASE, study=dataclasses.replace(small_study, name="other"))
    for run in ("a", "b"):
        assert lorameter("accept", run)[1]["replaced"] is None
    for run in ("a", "b"):
        assert lorameter("compare", "baseline", run)[1]["base"] == run
    assert lorameter("compare", "baseline", "c")[0] == 5
    assert len(read_baselines(tmp_path / "runs").baselines) == 2


def test_no_baseline_is_exit_5(write_run, lorameter):
    """Every comparison has the verdict no_baseline, with the command that accepts one."""
    write_run("a", BASE)
    code, document = lorameter("compare", "baseline", "a")
    assert code == 5
    assert {row["verdict"] for row in document["comparisons"]} == {"no_baseline"}
    assert {row["variant"] for row in document["comparisons"]} == {"plain", "nf4"}
    assert "lorameter accept RUN" in document["comparisons"][0]["reason"]


def oom(record):
    return record.replaced(status="oom") if record.trial == "r1-nf4" else record


@pytest.mark.parametrize(("options", "said"), [
    ({"control": 1.3}, "control regressed"),
    ({"status": "interrupted"}, "interrupted"),
    ({"change": oom}, "r1-nf4: oom"),
])  # fmt: skip
def test_an_invalid_run_is_not_accepted(write_run, lorameter, tmp_path, options, said):
    """The command exits with 4 and the reason, and the earlier baseline stays."""
    write_run("a", BASE)
    write_run("b", BASE, **options)
    lorameter("accept", "a")
    code, text = lorameter("accept", "b")
    assert code == 4
    assert said in text
    assert [baseline.run for baseline in read_baselines(tmp_path / "runs").baselines] == ["a"]


def test_a_run_in_another_folder_is_refused(write_run, lorameter, tmp_path):
    """A run in another folder is refused, since its baseline would not be found there; the remedy names the folder."""
    elsewhere = tmp_path / "elsewhere" / "a"
    elsewhere.parent.mkdir()
    write_run("a", BASE).rename(elsewhere)
    code, text = lorameter("accept", elsewhere)
    assert code == 2
    assert f"--runs-dir {elsewhere.parent}" in text


def test_a_deleted_baseline_is_an_error_not_a_pass(write_run, lorameter):
    """A missing baseline exits with 2 and does not count as a missing comparison."""
    path = write_run("a", BASE)
    write_run("b", BASE)
    lorameter("accept", "a")
    path.rename(path.with_name("moved"))
    code, text = lorameter("compare", "baseline", "b")
    assert code == 2
    assert "accepted baseline cannot be read" in text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}', '{"schema": 1, "baselines": [{"run": "a"}]}'])
def test_a_damaged_file_is_refused_and_left_alone(write_run, lorameter, tmp_path, text):
    """A damaged file is neither read as empty nor overwritten."""
    write_run("a", BASE)
    path = tmp_path / "runs" / "baselines.json"
    path.write_text(text)
    assert lorameter("accept", "a")[0] == 2
    assert lorameter("compare", "baseline", "a")[0] == 2
    assert path.read_text() == text
