"""Tests of `lorameter report` on stored runs: selection, order, policy and format."""

from __future__ import annotations

import json
import shutil

import pytest

from lorameter.cli import main
from lorameter.records import codec
from lorameter.records.store import read_manifest
from lorameter.verdicts.gate import Policy
from tests.constructed import RUNS


@pytest.fixture
def run_command(capsys):
    """A function that runs a command and returns its exit code and output, which is a document with --json."""

    def run(*words):
        code = main([*words, "--runs-dir", str(RUNS)])
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in words and out else out + err

    return run


def rows(document, table=0):
    """Return the variants of a table in order."""
    return [row["name"] for row in document["tables"][table]["rows"]]


def test_one_metric_has_its_own_table(run_command):
    """The table has ratios, control and verdicts; bytes use the unit of the largest value, and a loss is higher or
    lower."""
    code, document = run_command(
        "report", "swept", "--metric", "held_out_loss", "--metric", "host_peak_train_bytes", "--json"
    )
    assert code == 0
    assert [table["metric"] for table in document["tables"]] == ["held_out_loss", "host_peak_train_bytes"]
    loss = {row["name"]: row for row in document["tables"][0]["rows"]}
    assert loss["lora_alpha=256"]["ratio"]["verdict"] == "improved"
    assert loss["lora_alpha=256"]["values"]["held_out_loss"]["value"] == pytest.approx(3.2624, abs=1e-4)
    control = document["tables"][0]["control"]
    assert control["verdict"] == "inconclusive"
    assert "the untrained loss was not measured" in control["reason"]
    _, text = run_command("report", "swept", "--metric", "held_out_loss")
    assert "lora_alpha=256 18 % lower" in text
    assert "Training: held-out loss" in text
    assert "tokens/s (without padding)" not in text


def test_variants_are_sorted_as_requested(run_command):
    """Variants are sorted by name, by ratio with the reference as 1, by estimate or by peak."""
    orders = {sort: rows(run_command("report", "swept", "--sort", sort, "--phase", "train", "--json")[1]) for sort in
              ("study", "name", "ratio", "value", "memory")}  # fmt: skip
    assert orders["study"][0] == "r64-a16-d0.1"
    assert orders["name"] == sorted(orders["name"])
    assert orders["ratio"][-1] == orders["value"][-1] == "r=512"
    assert orders["memory"] == orders["study"]
    assert {tuple(sorted(order)) for order in orders.values()} == {tuple(sorted(orders["study"]))}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--metric", "held_out_los"], "Did you mean 'held_out_loss'?"),
        (["--variant", "qlora"], "Did you mean 'lora-r16'?"),
        (["--phase", "cold"], "run sound has train, generate"),
        (["--format", "markdown", "--json"], "both choose the format"),
        (["--markdown", "--format", "github"], "both choose the format"),
    ],
)
def test_unknown_choices_are_refused(run_command, options, words):
    """The error names the available choices."""
    code, text = run_command("report", "sound", *options)
    assert code == 2
    assert words in text


def test_a_policy_gives_the_limits(run_command, tmp_path):
    """The policy sets limits by variant and metric, and the report shows the margin of an equivalence."""
    policy = tmp_path / "policy.toml"
    policy.write_text('margin = 0.2\n[[limit]]\nvariant = "qlora-nf4-r16"\ntolerance = 0.15\n')
    before = run_command("report", "sound", "--json")[1]["tables"][0]["rows"][1]["ratio"]["verdict"]
    code, document = run_command("report", "sound", "--policy", str(policy), "--json")
    assert (before, document["tables"][0]["rows"][1]["ratio"]["verdict"]) == ("regressed", "equivalent")
    assert "equivalent ±20 %" in run_command("report", "sound", "--policy", str(policy))[1]
    assert code == 0


@pytest.fixture
def kept(tmp_path):
    """An A/B with a stored policy that accepts a regression below 50 %."""
    path = tmp_path / "runs" / "ab"
    shutil.copytree(RUNS / "ab", path)
    policy = Policy(tolerance=0.5, inconclusive="pass", metrics=("step_time_s",))
    document = codec.to_json(read_manifest(path)) | {"policy": codec.to_json(policy)}
    (path / "manifest.json").write_text(json.dumps(document))
    return path


def test_an_ab_is_reported_with_its_own_policy(run_command, kept):
    """All commands use the stored policy unless another is given; the default policy reports a regression that the
    stored one accepts."""
    assert run_command("report", "ab", "--json")[1]["exit"] == 1
    strict = kept.parent / "strict.toml"
    strict.write_text("tolerance = 0.01\n")
    for command in ("report", "compare", "gate"):
        code, document = run_command(command, str(kept), "--json")
        assert code == document["exit"] == 0, command
        assert document["policy"]["tolerance"] == 0.5
        assert {row["metric"] for row in document["comparisons"]} == {"step_time_s"}
        assert run_command(command, str(kept), "--policy", str(strict), "--json")[0] == 1, command


@pytest.mark.parametrize("options", [("--variant", "lora-r16"), ("--phase", "train"), ("--sort", "ratio")])
def test_a_selection_of_variants_is_refused_for_an_ab(run_command, options):
    """The verdict of an A/B is over all of its comparisons."""
    code, text = run_command("report", "ab", *options)
    assert code == 2
    assert "is an A/B, whose verdict is over all of its comparisons" in text


def test_the_verdict_of_an_ab_comes_first(run_command):
    """The verdict comes before the differences of the sides and the time breakdown."""
    _, text = run_command("report", "ab-unsure")
    lines = text.splitlines()
    assert lines[0] == "Gate failed (exit 3): 1 inconclusive, 1 equivalent"
    assert "inconclusive: between" in lines[3]
    assert text.index("Gate failed") < text.index("Sides") < text.index("Where the time went")
    assert "tokens/s (without padding), slow-down" in text
    assert "measure 106" not in text
    assert "261" not in text
