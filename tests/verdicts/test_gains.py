"""Tests of verdicts on losses: as a part of the gain that the reference has from the untrained loss."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lorameter.cli import main
from lorameter.records import codec
from lorameter.studies.claim import Claim

TIMES = {"plain": [1.0, 1.02, 0.99, 1.01, 1.0], "nf4": [1.0, 1.01, 1.0, 1.02, 0.99]}
UNTRAINED, REFERENCE, OTHER = 2.4755, 2.4626, 2.4704


@pytest.fixture
def report_losses(write_run, tmp_path, capsys):
    """A function that writes a run with these losses and returns what a command prints about it."""

    def report(*words, untrained=UNTRAINED, losses=(REFERENCE, OTHER), scatter=0.0002, study=None):
        def change(record):
            noise = scatter * ((-1) ** record.replicate * (1 + record.replicate) + (record.name == "nf4"))
            loss = {"held_out_loss": losses[record.name == "nf4"] + noise, "training_steps": 6.0}
            first = {} if untrained is None or record.replicate else {"held_out_loss_initial": untrained}
            return record.replaced(values=record.values | loss | first)

        for name in ("mine", "again"):
            write_run(name, TIMES, change=change, **({} if study is None else {"study": study}))
        main([*words, "--runs-dir", str(tmp_path / "runs")])
        return capsys.readouterr().out

    return report


def test_a_loss_is_a_part_of_the_gain_of_the_reference(report_losses):
    """A variant that learned 40 % of the reference's gain is not equivalent, although its loss is 0.3 % higher; the
    untrained loss stands in the table."""
    text = report_losses("report", "mine")
    assert "nf4 learned 37.4 % of the gain [32.6, 41.5]" in text
    assert "untrained loss: 2.4755, in every row" in text
    assert "loss        equivalent" not in text
    document = json.loads(report_losses("report", "mine", "--json"))
    (loss,) = [table for table in document["outcomes"] if table["metric"] == "held_out_loss"]
    (found,) = [row["ratio"] for row in loss["rows"] if row["ratio"]]
    assert (found["verdict"], found["ratio"]) == ("regressed", None)
    assert found["low"] < found["share"] < found["high"]
    assert "37.4 % of the gain" in report_losses("report", "mine", "--markdown")


def test_an_untrained_model_is_never_equivalent(report_losses):
    """A variant that has learned nothing has 0 % of the gain."""
    text = report_losses("report", "mine", "--metric", "held_out_loss", losses=(REFERENCE, UNTRAINED))
    assert "±5 % of the gain" not in text.split("A/A control")[1].split("nf4")[-1]
    assert "higher" in next(line for line in text.splitlines() if line.startswith("nf4 "))


def test_a_gain_that_is_not_resolved_is_the_verdict(report_losses):
    """If the interval of the reference's gain reaches zero, one sentence says so, and no share is stated."""
    text = " ".join(report_losses("report", "mine", scatter=0.01).split())
    assert "loss the reference's gain of " in text
    assert "is not resolved: its 95 % interval reaches zero (untrained 2.4755, reference 2.4" in text
    assert "of the gain [" not in text


def test_a_gain_without_an_untrained_loss_is_unknown(report_losses):
    """Without the untrained loss, close losses are not called equivalent."""
    text = " ".join(report_losses("report", "mine", untrained=None).split())
    assert "loss the gain is unknown, since the untrained loss was not measured" in text
    assert "untrained loss: not measured, in every row" in text


def test_losses_of_two_runs_are_compared_by_their_gain(report_losses):
    """`compare` states the part of the base's gain, and calls nothing that was measured apart equivalent."""
    text = " ".join(report_losses("compare", "mine", "again", "--metric", "held_out_loss").split())
    assert "100 % [" in text
    assert "learned 100 % of the reference's gain" in text
    assert "equivalent ±5 % of the gain" not in text


def test_a_claim_of_equal_losses_is_about_the_gain(report_losses, small_study, tmp_path):
    """Two losses that differ by 0.3 % but by 60 % of the gain refute a claim of equality."""
    claim = {"id": "1", "says": "s", "parts": [{"rule": "equal", "axis": "quantization", "metric": "held_out_loss"}]}
    study = dataclasses.replace(small_study, claims=(codec.from_json(Claim, claim, "claim"),))
    text = " ".join(report_losses("claims", "mine", study=study).split())
    assert "×2.70 [2.39, 3.04]: they differ by more than 5 %" in text
