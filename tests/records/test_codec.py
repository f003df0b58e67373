"""Tests that the codec is strict in both directions.

Tests of damaged runs: each is refused by name, and commands on other runs work.

Tests of required paths: only an active check meets a requirement.

Tests that a document is written completely or not at all.

Tests that a file is read as plain data, or refused with a reason.
"""

from __future__ import annotations

import json
import math
import os

import pytest

from lorameter.cli import main
from lorameter.errors import UsageError
from lorameter.records import codec, fileio
from lorameter.records.codec import NotReadableError
from lorameter.records.fileio import read_json, read_text, read_toml, write_document
from lorameter.records.record import Notice, PartialRecord, find_unmet, judge_required
from lorameter.records.store import read_run
from lorameter.run.forecast import measured_peaks
from lorameter.studies.form import AnyVariant


def test_nan_is_named_not_written_as_json():
    """NaN is written as a string, and a float field reads it back."""
    text = codec.dumps(PartialRecord(values={"loss": math.nan}))
    assert "NaN" in text
    assert '"NaN"' in text
    assert math.isnan(codec.from_json(PartialRecord, {"values": {"loss": "NaN"}}, "test").values["loss"])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"rr": 8}, ["here", "rr", "unknown key", "Did you mean r?"]),
        ({"r": "8"}, ["here", "r = '8'", "int is expected"]),
        ({"r": True}, ["r = True", "int is expected"]),
        ({"quantization": "nf5"}, ["quantization", "nf5", "nf4"]),
        ({"target_modules": "q_proj"}, ["target_modules", "a list is expected"]),
        ({"lora_dropout": None}, ["lora_dropout", "float is expected"]),
    ],
)
def test_wrong_input_is_refused_by_name(data, words):
    """For unknown keys and wrong types the error has the place, the key, the value and a valid replacement."""
    with pytest.raises(UsageError) as caught:
        codec.from_json(AnyVariant, data, "here", strict=True)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_key_is_named():
    """The error names the missing key, which has no default."""
    with pytest.raises(UsageError, match="here: remedy is missing"):
        codec.from_json(Notice, {"code": "a", "message": "b"}, "here")


DAMAGES = {
    "null": "null",
    "deeper": "[" * 100_000,
    "schema": '{"schema": {"a": 1}}',
}


@pytest.fixture
def path(write_run):
    """A valid run."""
    return write_run("mine", {"plain": [1.0] * 5, "nf4": [1.1] * 5})


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_manifest_stops_nothing_else(content, path, write_run, machine, capsys, small_study):
    """The list of runs and a forecast work; the run itself is refused."""
    write_run("other", {"plain": [1.0] * 5, "nf4": [1.1] * 5}, peak=2**20)
    (path / "manifest.json").write_text(content)
    with pytest.raises(UsageError, match=r"manifest\.json"):
        read_run("mine", path.parent)
    assert main(["list", "runs", "--runs-dir", str(path.parent)]) == 0
    assert any("mine" in line and "damaged" in line for line in capsys.readouterr().out.splitlines())
    assert measured_peaks(small_study.workload, machine, path.parent, "host_peak_train_bytes")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("sides",), {"base": {"label": "x", "worker": "y"}}),
        (("study", "replaced"), {"workload.no": 1}),
        (("study", "workload"), 1),
        (("study", "title"), None),
        (("study", "title"), "mine\n::error::forged"),
        (("run",), "mine\r::error::forged"),
        (("order",), ["r0-plain", "r0\n::error::forged"]),
    ],
    ids=str,
)
def test_a_table_of_another_form_is_refused(place, value, path, capsys):
    """The command exits with 2 and names the key."""
    document = json.loads((path / "manifest.json").read_text())
    table = document
    for key in place[:-1]:
        table = table[key]
    table[place[-1]] = value
    (path / "manifest.json").write_text(json.dumps(document))
    assert main(["report", "mine", "--runs-dir", str(path.parent)]) == 2
    assert place[-1] in capsys.readouterr().err


def test_unknown_facts_of_a_machine_are_reported_as_unknown(path, capsys):
    """A manifest without provenance is read, with its facts unknown."""
    document = json.loads((path / "manifest.json").read_text())
    document["provenance"] = {}
    (path / "manifest.json").write_text(json.dumps(document))
    assert main(["report", "mine", "--runs-dir", str(path.parent)]) == 0
    assert "unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"wall_time_s": "NaN"},
        {"started_unix_s": "Infinity"},
        {"samples": {"step_time_s": [1.0, "Infinity"]}},
        {"samples": {"step_time_s": [1e308] * 3}},
        {"samples": {"step_time_s": [0.0, 1.0, 2.0]}},
        {"tokens": {"x": {"y": 1}}},
    ],
    ids=str,
)
def test_a_record_that_no_trial_could_leave_is_refused(change, path):
    """The error names the trial, or the run is reported as invalid, without a traceback."""
    lines = [json.loads(line) for line in (path / "trials.jsonl").read_text().splitlines()]
    lines[0] |= change
    (path / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", "mine", "--runs-dir", str(path.parent)]) in (2, 4)


def check(path, status="active", reason="as made up"):
    return {"path": path, "status": status, "reason": reason}


@pytest.mark.parametrize(
    ("checks", "kind", "expected"),
    [
        ([], "RequiredPathNotSeen", "mode: required 'train', no step was watched"),
        ([check("base.bits")], "RequiredPathNotSeen", "no row of the watched step is about it"),
        ([check("mode", "fallback")], "RequiredPathNotActive", "mode: required 'train', as made up"),
        ([check("mode", "unknown")], "RequiredPathNotActive", "as made up"),
    ],
)
def test_an_unmet_requirement_has_its_kind_and_reason(checks, kind, expected):
    """A path without a check and a path that is not active are unmet, with different kinds."""
    found = find_unmet(checks, {"mode": "train"})
    assert found.kind == kind
    assert expected in found.message


def test_requirements_are_met_if_all_are_active():
    """Other checks do not matter."""
    assert find_unmet([check("mode"), check("base.bits", "fallback")], {"mode": "train"}) is None
    assert find_unmet([], {}) is None


def test_a_fallback_is_allowed_by_a_notice_or_makes_the_trial_invalid():
    """The notice and the failure have the same message."""
    fragment = PartialRecord(checks=(check("mode", "fallback"),))
    strict = judge_required(fragment, {"mode": "train"}, name="r4", allow_fallback=False)
    lenient = judge_required(fragment, {"mode": "train"}, name="r4", allow_fallback=True)
    assert (strict.status, lenient.status) == ("invalid", "ok")
    assert [notice.code for notice in lenient.notices] == ["fallback-allowed"]
    assert strict.failure.message in lenient.notices[0].message
    assert judge_required(fragment, {}, name="r4", allow_fallback=False) is fragment


def test_a_write_replaces_the_document_and_leaves_no_temporary_file(tmp_path):
    """Only one file remains, with the last document."""
    path = tmp_path / "a.json"
    for value in ({"a": 1}, {"a": 2}):
        write_document(path, value)
    assert json.loads(path.read_text()) == {"a": 2}
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_keeps_the_previous_document(tmp_path):
    """A failed write leaves the previous document unchanged."""
    path = tmp_path / "a.json"
    write_document(path, {"a": 1})
    with pytest.raises(TypeError):
        write_document(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "digits"),
        ('{"a": ', "Expecting value"),
        (b"\xff\xfe{}", "utf-8"),
        (b"", "Expecting value"),
    ],
    ids=["deep", "digits", "cut", "utf-16", "empty"],
)
def test_json_beyond_the_bounds_is_refused(tmp_path, content, words):
    """JSON is limited in depth and digits."""
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(NotReadableError, match=words):
        read_json(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = 1" + "0" * 5000, "not a TOML file: Exceeds"),
        ("a =", "not a TOML file"),
    ],
    ids=lambda value: value[:20],
)
def test_toml_beyond_the_bounds_is_refused(tmp_path, content, words):
    """TOML is limited in depth and digits; other text is refused as no TOML."""
    path = tmp_path / "a.toml"
    path.write_text(content)
    with pytest.raises(NotReadableError, match=words):
        read_toml(path)


@pytest.mark.parametrize("name", ["missing", "folder", "pipe", "x" * 300, "a\0b"])
def test_paths_that_are_not_regular_files_are_refused_at_once(tmp_path, name):
    """A pipe without a writer, a folder and an impossible name are refused at once, with a reason."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotReadableError):
        read_text(tmp_path / name)
    assert not fileio.is_file(tmp_path / name)


def test_a_document_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    """At most one byte more than the limit is read, whatever the size."""
    monkeypatch.setattr(fileio, "MAX_BYTES", 1 << 20)
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(NotReadableError, match="more than 1 MiB, the limit"):
        fileio.read_json(path)
    with pytest.raises(UsageError, match="one line has more than 1 MiB"):
        list(fileio.journal_lines(path))
