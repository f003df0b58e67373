"""Formats of others: what their readers require, and nothing that is invalid."""

import dataclasses
import json
import math

import pytest

from lorameter.errors import InvalidRunError, UsageError
from lorameter.records import store
from lorameter.results.exchange import encode_action, encode_bencher, mllog_lines


@pytest.fixture
def run(sound):
    return store.read_run(str(sound), sound.parent)


def test_entries_for_github_action_benchmark(run):
    """Name, unit and value of what is better when smaller, by default what two runs are compared by."""
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
    """Benchmark, measure, value with both ends; a range of peaks is no interval."""
    metrics = encode_bencher(run, ["*"])
    assert set(metrics) == {"small: plain", "small: nf4"}
    step = metrics["small: nf4"]["step_time_s"]
    assert step["lower_value"] < step["value"] < step["upper_value"]
    assert set(metrics["small: nf4"]["host_peak_train_bytes"]) == {"value"}
    assert "tokens_per_s" in metrics["small: plain"]


def test_a_metric_that_is_not_there_is_named(run):
    """With those that are."""
    with pytest.raises(UsageError, match=r"stepp.*step_time_s"):
        encode_bencher(run, ["stepp"])


@pytest.mark.parametrize("name", ["failed", "killed", "control-failed", "diverged"])
@pytest.mark.parametrize("encode", [encode_action, encode_bencher])
def test_what_is_invalid_goes_to_no_page_of_trends(name, encode, read):
    """It would stand there as a good number for good."""
    with pytest.raises(InvalidRunError, match=name):
        encode(read(name))


def test_lines_of_mllog(run):
    """Every line is one, every trial begins and ends once, in time, with its parameters and losses between."""
    lines = list(mllog_lines(run))
    assert all(line.startswith(":::MLLOG ") and line.endswith("\n") for line in lines)
    events = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    assert all(
        set(event) == {"namespace", "time_ms", "event_type", "key", "value", "metadata"}
        and event["event_type"] in ("POINT_IN_TIME", "INTERVAL_START", "INTERVAL_END")
        and type(event["time_ms"]) is int
        for event in events
    )
    of_one = [event for event in events if event["metadata"].get("trial") == "r0-nf4"]
    keys = [event["key"] for event in of_one]
    assert (keys[0], keys[-1], keys.count("timed_loss")) == ("run_start", "run_stop", 3)
    assert {"seed", "global_batch_size", "lora_rank", "lora_alpha", "tracked_stats"} <= set(keys)
    assert of_one[-1]["metadata"]["status"] == "success"
    assert of_one[-1]["time_ms"] == 1000


def test_a_trial_is_logged_with_the_workload_that_it_was_measured_on(write_run, small_study):
    """The study's is that of others."""
    size = small_study.workload.batch_size
    study = dataclasses.replace(small_study, workloads={"nf4": {"batch_size": 2 * size}})
    path = write_run("own", {"plain": [1.0], "nf4": [1.0]}, study=study, own_workloads=study.own_workloads)
    lines = mllog_lines(store.read_run(str(path), path.parent))
    events = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    found = {one["metadata"]["variant"]: one["value"] for one in events if one["key"] == "global_batch_size"}
    assert found == {"plain": size, "nf4": 2 * size}


def test_a_trial_that_failed_is_aborted_in_the_log_and_a_diverged_loss_is_still_json(read):
    """The log tells of what failed, too; JSON has no NaN."""
    for name in ("failed", "diverged"):
        events = [json.loads(line.removeprefix(":::MLLOG ")) for line in mllog_lines(read(name))]
        ends = [event["metadata"] for event in events if event["key"] == "run_stop"]
        assert {end["status"] for end in ends} == {"success", "aborted"}
