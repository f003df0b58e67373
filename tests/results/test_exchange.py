"""Tests of exported foreign formats: the fields that their readers require, and no invalid runs."""

import json
import math

import pytest

from lorameter.errors import InvalidRunError
from lorameter.records import store
from lorameter.results.files import encode_action, encode_bencher


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


@pytest.mark.parametrize("name", ["failed", "killed", "control-failed", "diverged"])
@pytest.mark.parametrize("encode", [encode_action, encode_bencher])
def test_invalid_runs_are_not_exported_to_trend_pages(name, encode, read):
    """An invalid run would appear as a valid value in a trend."""
    with pytest.raises(InvalidRunError, match=name):
        encode(read(name))
