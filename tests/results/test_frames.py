"""Tests of DataFrames: typed, complete, and imported only on use."""

import dataclasses

import pandas as pd
import pytest

import lorameter
from lorameter.errors import UsageError
from lorameter.studies.script import script_workload
from lorameter.studies.variant import ScriptVariant
from tests.constructed import RUNS


def test_settings_commit_and_versions_are_columns(write_run, small_study, tmp_path):
    """Trials and estimates have these columns; double quantisation has a value only for a 4-bit base."""
    facts = {"git": {"commit": "a" * 40, "dirty": True}}
    write_run("set", {"plain": [1.0, 1.1], "nf4": [2.0, 2.1]}, study=small_study, facts=facts)
    frames = lorameter.load("set", tmp_path / "runs")
    for frame in (frames.trials, frames.estimates):
        by_variant = {name: rows.iloc[0] for name, rows in frame.groupby("variant")}
        plain, nf4 = by_variant["plain"], by_variant["nf4"]
        assert (nf4["r"], nf4["lora_alpha"], nf4["lora_dropout"]) == (4, 16.0, 0.0)
        assert (plain["quantization"], nf4["quantization"]) == ("none", "nf4")
        assert (plain["double_quant"] is pd.NA, nf4["double_quant"]) == (True, True)
        assert nf4["target_modules"] == "all-linear"
        assert (nf4["workload_sequence_length"], nf4["workload_model"]) == (32, "tiny-llama")
        assert (nf4["commit"], nf4["dirty"], nf4["torch"], nf4["peft"]) == ("a" * 40, True, "1.0", "1.0")
        assert nf4["command"] is pd.NA


def test_each_side_of_an_ab_has_its_own_versions():
    """The versions are those of the side's interpreter."""
    estimates = lorameter.load("ab", RUNS).estimates
    assert {tuple(pair) for pair in estimates[["side", "peft"]].to_numpy()} == {
        ("base", "0.20.0"),
        ("candidate", "0.21.2"),
    }


def test_a_script_has_its_command_and_no_setting_that_only_it_knows(write_run, small_study, tmp_path):
    """Settings of a script are unknown and not a variant's defaults; its versions are those that its processes
    report."""
    variants = tuple(ScriptVariant(name=name, command=f"python {name}.py") for name in ("plain", "nf4"))
    protocol = dataclasses.replace(small_study.protocol, phases=("train",))
    study = dataclasses.replace(small_study, workload=script_workload(), protocol=protocol, variants=variants)
    software = {"torch": "9.9", "python": "3.12.0"}
    write_run("scripts", {"plain": [1.0]}, study=study, change=lambda record: record.replaced(software=software))
    trials = lorameter.load("scripts", tmp_path / "runs").trials
    assert set(trials["command"]) == {"python plain.py"}
    assert trials[["r", "quantization", "dtype", "workload_model"]].isna().all(axis=None)
    assert set(trials["torch"]) == {"9.9"}


def test_a_folder_that_is_not_there_is_refused(tmp_path, monkeypatch):
    """An empty table would say that there are no runs; an existing folder without runs gives one."""
    with pytest.raises(UsageError, match="/nope"):
        lorameter.load_all("/nope")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="runs"):
        lorameter.load_all()
    assert len(lorameter.load_all(tmp_path).trials) == 0


def test_validity_is_a_column_of_trials_and_estimates():
    """All trials of a valid run are valid, none of a run with a failed control, and only the control of a run with
    failed trials."""
    frames = {run: lorameter.load(run, RUNS) for run in ("sound", "failed", "control-failed")}
    for frame in (table for one in frames.values() for table in (one.trials, one.estimates)):
        assert (frame["valid"] == frame["invalid_reason"].isna()).all()
        assert (frame["valid"] == frame["invalid_message"].isna()).all()
    trials = {run: one.trials for run, one in frames.items()}
    assert trials["sound"]["valid"].all()
    assert not trials["control-failed"]["valid"].any()
    assert (trials["failed"]["valid"] == (trials["failed"]["role"] == "control")).all()
    assert set(trials["failed"]["invalid_reason"].dropna()) == {"trial-failed"}
    assert set(frames["control-failed"].estimates["invalid_reason"]) == {"control-differs"}
