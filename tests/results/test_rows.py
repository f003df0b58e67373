"""Tests that rows contain exactly the values of the records and the reports.

Tests of DataFrames: typed, complete, and imported only on use.

Tests of exported foreign formats: the fields that their readers require, and no invalid runs.
"""

import dataclasses
import json
import math

import pandas as pd
import pytest

import lorameter
from lorameter.errors import InvalidRunError, UsageError
from lorameter.records import store
from lorameter.records.record import DISTURBED, Failure
from lorameter.report.run_view import make_run_view
from lorameter.results.export import encode_action, encode_bencher
from lorameter.results.rows import TABLES, table_columns, table_rows
from lorameter.studies.script import script_workload
from lorameter.studies.variant import ScriptVariant
from tests.constructed import RUNS

STATES = "sound ab ab-failed failed killed cold one-replicate without-reference swept-in-part diverged".split()


def tables(run):
    return {name: [dict.fromkeys(table_columns(name)) | row for row in table_rows(run, name)] for name in TABLES}


@pytest.mark.parametrize("name", STATES)
def test_every_run_has_rows_of_the_column_types(name, read):
    """This includes runs with failures, missing metrics, one replicate and no reference."""
    kinds = {"text": str, "count": int, "number": float, "flag": bool}
    for table, rows in tables(read(name)).items():
        for row in rows:
            for column in TABLES[table]:
                value = row[column.name]
                assert value is None or type(value) is kinds[column.kind], (table, column.name, value)


def test_every_sample_of_every_trial_is_a_row(read):
    """Rows and samples of the records agree in number, value and order."""
    run = read("sound")
    rows = tables(run)["samples"]
    record = next(record for record in run.records if len(record.samples.get("step_time_s", ())) > 1)
    mine = [row for row in rows if row["trial"] == record.trial and row["metric"] == "step_time_s"]
    assert [row["value"] for row in mine] == list(record.samples["step_time_s"])
    assert [row["sample"] for row in mine] == list(range(len(mine)))
    turns = [row["turn"] for row in mine]
    assert [turns.count(turn) for turn in range(len(record.turn_lengths))] == list(record.turn_lengths)
    expected = sum(
        sum(map(len, record.samples.values())) + len(record.values | record.memory) for record in run.records
    )
    assert len(rows) == expected


def test_estimates_and_ratios_are_those_of_the_report(read):
    """The report's cells and the rows hold the same numbers."""
    run = read("sound")
    found, view = tables(run), make_run_view(run)
    estimates = {(row["variant"], row["metric"]): row for row in found["estimates"] if row["role"] == "variant"}
    ratios = {(row["variant"], row["metric"], row["role"]): row for row in found["comparisons"]}
    primary = {"train": "step_time_s", "generate": "request_time_s"}
    for table in view.tables:
        metric = primary[table.phase]
        place = next(place for place, head in enumerate(table.table.heads) if head.key == metric)
        for row in table.table.rows:
            cell, estimate = row.cells[place], estimates[row.cells[0].text, metric]
            assert (cell.value, cell.low, cell.high) == (estimate["value"], estimate["low"], estimate["high"])
        for name, ratio in table.ratios.items():
            mine = ratios[name, metric, "variant"]
            assert (mine["ratio"], mine["verdict"]) == (ratio.ratio, ratio.verdict)
        control = ratios["lora-r16", metric, "control"]
        assert control["verdict"] == table.control.verdict


def test_an_earlier_attempt_is_a_trial_that_does_not_count(write_run):
    """It precedes the attempt that counts and has no samples."""
    from lorameter.records.trials import encode_record

    path = write_run("again", {"plain": [1.0, 1.1], "nf4": [1.0, 1.2]})
    lines = (path / store.TRIALS).read_text().splitlines(keepends=True)
    first = store.read_run(str(path), path.parent).records[0]
    failure = Failure(phase="train", kind=DISTURBED, message="stolen")
    before = first.replaced(status="invalid", failure=failure, started_unix_s=1.0, checks=())
    after = first.replaced(attempt=1, checks=())
    (path / store.TRIALS).write_text("".join([encode_record(before, ()), encode_record(after, ()), *lines[1:]]))
    rows = tables(store.read_run(str(path), path.parent))
    mine = [(row["attempt"], row["counts"], row["failure"]) for row in rows["trials"] if row["trial"] == first.trial]
    assert mine == [(0, False, "stolen"), (1, True, None)]
    assert len([r for r in rows["samples"] if r["trial"] == first.trial and r["metric"] == "step_time_s"]) == 3


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


def test_a_missing_folder_is_refused(tmp_path, monkeypatch):
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


@pytest.fixture
def run(sound):
    return store.read_run(str(sound), sound.parent)


def test_entries_for_github_action_benchmark(run):
    """Entries have name, unit and value of metrics where smaller is better, by default those of a comparison."""
    entries = encode_action(run)
    assert [entry["name"] for entry in entries] == [
        "small: plain, step_time_s", "small: plain, host_peak_train_bytes",
        "small: nf4, step_time_s", "small: nf4, host_peak_train_bytes",
    ]  # fmt: skip
    step = entries[0]
    assert step["unit"] == "s"
    assert step["value"] == pytest.approx(math.exp(sum(map(math.log, (1.0, 1.1, 1.2, 1.3, 1.4))) / 5))
    low, high = json.loads(step["range"])
    assert low < step["value"] < high
    assert all(set(entry) <= {"name", "unit", "value", "range", "extra"} for entry in entries)
    assert not [entry for entry in encode_action(run, ["tokens_per_s", "step_time_s"]) if "tokens" in entry["name"]]


def test_bencher_metric_format(run):
    """Metrics have benchmark, measure and value with interval; the range of peaks is not an interval."""
    metrics = encode_bencher(run, ["*"])
    assert set(metrics) == {"small: plain", "small: nf4"}
    step = metrics["small: nf4"]["step_time_s"]
    assert step["lower_value"] < step["value"] < step["upper_value"]
    assert set(metrics["small: nf4"]["host_peak_train_bytes"]) == {"value"}
    assert "tokens_per_s" in metrics["small: plain"]


@pytest.mark.parametrize("name", ["failed", "control-failed"])
def test_invalid_runs_are_not_exported_to_trend_pages(name, read):
    """An invalid run would appear as a valid value in a trend."""
    for encode in (encode_action, encode_bencher):
        with pytest.raises(InvalidRunError, match=name):
            encode(read(name))
