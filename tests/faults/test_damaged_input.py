"""Tests of damaged and hostile input: each file is refused with one sentence, or read; none ends in a traceback."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import time

import pytest

from lorameter.cli import main
from lorameter.errors import redact
from lorameter.records import codec
from tests.constructed import RUNS

FOREIGN = {"benchmarks": [{"fullname": "tests/test_it.py::test_fast", "stats": {"data": [1.0, 1.1]}}]}


@pytest.fixture
def called(capsys):
    """A function that runs a command and returns its exit code and all that it printed."""

    def run(*words):
        code = main(list(map(str, words)))
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.fixture
def changed(tmp_path):
    """A function that copies a constructed run with other values in its manifest, records or checks."""

    def change(manifest=None, record=None, check=None, name="sound"):
        path = tmp_path / "runs" / "changed"
        shutil.copytree(RUNS / name, path)
        about = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(about | (manifest or (lambda _: {}))(about)))
        lines = [json.loads(line) for line in (path / "trials.jsonl").read_text().splitlines()]
        hashes = {}
        if check is not None:
            found = [json.loads(line)["check"] for line in (path / "checks.jsonl").read_text().splitlines()]
            new = [check(dict(one)) for one in found]
            hashes = {_hash(one): _hash(other) for one, other in zip(found, new, strict=True)}
            stored = [json.dumps({"hash": _hash(one), "check": one}) for one in new]
            (path / "checks.jsonl").write_text("\n".join(stored))
        for line in lines:
            line["checks"] = [hashes.get(one, one) for one in line["checks"]]
        lines = [line | (record or (lambda _: {}))(line) for line in lines]
        (path / "trials.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return path

    return change


def _hash(check):
    return hashlib.sha256(codec.dumps(check).encode()).hexdigest()[:16]


def _samples(value):
    return lambda one: {"samples": {name: [value] * len(found) for name, found in one["samples"].items()}}


@pytest.mark.parametrize(
    ("table", "value", "words"),
    [
        ("provenance", {"libraries": []}, "provenance.libraries"),
        ("provenance", {"git": []}, "provenance.git"),
        ("provenance", {"settings": [1]}, "provenance.settings"),
        ("tokens", {"examples": 3}, "tokens.examples"),
    ],
)
@pytest.mark.parametrize("command", ["report", "export"])
def test_a_table_of_another_type_in_a_manifest_is_refused(changed, called, command, table, value, words):
    """The error names the key."""
    path = changed(manifest=lambda one: {table: one[table] | value})
    code, text = called(command, path)
    assert code == 2
    assert words in text


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (_samples(1e308), "too large"),
        (lambda one: {"tokens": one["tokens"] | {"real_tokens": [1]}}, "real_tokens"),
        (lambda one: {"tokens": one["tokens"] | {"real_tokens": -1}}, "real_tokens"),
        (lambda one: {"tokens": one["tokens"] | {"answer_0": "text"}}, "answer_0"),
        (lambda one: {"started_unix_s": 1e300}, "started_unix_s"),
    ],
)
def test_an_impossible_value_of_a_record_is_refused(changed, called, tmp_path, record, words):
    """The error names the value, for text, pages and exports alike."""
    path = changed(record=record)
    for options in (("report", path, "--html", tmp_path / "page.html"), ("export", path)):
        code, text = called(*options)
        assert (code, "Traceback" in text) == (2, False)
        assert words in text


def test_an_infinite_value_of_a_failed_trial_is_left_out_of_a_chart(changed, called, tmp_path):
    """Its loss may have diverged; the chart shows the others."""
    path = changed(record=lambda one: _samples(1.7e308)(one) if one["status"] != "ok" else {}, name="diverged")
    assert called("report", path, "--html", tmp_path / "page.html")[0] == 4
    assert (tmp_path / "page.html").is_file()


@pytest.mark.parametrize("missing", ["required", "status", "path"])
def test_evidence_without_a_field_is_lost(changed, called, missing):
    """The trials of damaged evidence do not count."""
    path = changed(check=lambda one: {key: value for key, value in one.items() if key != missing})
    code, text = called("report", path)
    assert (code, "Traceback" in text) == (4, False)


def test_half_a_character_is_refused(changed, called, tmp_path):
    """A lone surrogate is named, in a benchmark file and in the study of a run."""
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(FOREIGN).replace("test_fast", "\\ud800"))
    code, text = called("compare", saved, saved)
    assert code == 2
    assert "surrogates not allowed" in text
    path = changed(manifest=lambda one: {"study": one["study"] | {"title": "\ud800"}})
    code, text = called("report", path)
    assert code == 2
    assert "surrogates not allowed" in text


@pytest.mark.parametrize("unit", ["a", "a:", "a.", "a://", ":%", "a:b,"])
@pytest.mark.parametrize("ending", [" @", " ://"])
def test_the_time_of_redaction_grows_with_the_length_of_a_text(unit, ending):
    """A title of 64,000 characters delays no command."""
    begin = time.process_time()
    redact(unit * (64_000 // len(unit)) + ending)
    assert time.process_time() - begin < 2.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("git clone user:secret@host/x", "git clone ***@host/x"),
        ("host:80/a:b@c", "host:80/***@c"),
        ("see http://u:p/w@h and https://h/p?token=x'.", "see http://***@h and https://h/p?***'."),
        ("https://user@h/x", "https://***@h/x"),
        ("x@sha256:ab", "x@sha256:ab"),
    ],
)
def test_credentials_in_addresses_are_still_redacted(text, expected):
    """A user, a password and a query are replaced; a digest is kept."""
    assert redact(text) == expected


def test_a_csv_cell_is_no_formula(changed, called):
    """A text that a spreadsheet would execute has an apostrophe before it; numbers are unchanged."""

    def rename(one):
        return {"failure": {"phase": "=HYPERLINK(1)", "kind": "k", "message": "+9+cmd"}, "status": "crashed"}

    path = changed(record=rename)
    rows = list(csv.DictReader(io.StringIO(called("export", path, "--format", "csv", "--table", "trials")[1])))
    assert {(row["failed_in"], row["failure"]) for row in rows} == {("'=HYPERLINK(1)", "'+9+cmd")}
    assert all(float(row["started_unix_s"]) > 0 for row in rows)


def test_a_damaged_archive_and_a_folder_without_a_manifest_are_named(called, tmp_path):
    """The error says what the path is, not that it is missing."""
    (tmp_path / "run.lorameter.zip").write_bytes(b"PK\3\4 cut")
    (tmp_path / "empty").mkdir()
    for path, words in ((tmp_path / "run.lorameter.zip", "damaged"), (tmp_path / "empty", "without manifest.json")):
        code, text = called("report", path)
        assert code == 2
        assert words in text
        assert "not found" not in text


def test_the_latest_run_is_reported_by_default(called, tmp_path):
    """`report` without a run takes the newest; without any it says so."""
    folder = tmp_path / "runs"
    for name in ("20260101-000000-a", "20270101-000000-b"):
        shutil.copytree(RUNS / "sound", folder / name)
    assert called("report", "--runs-dir", folder, "--markdown")[0] == 0
    (folder / "20270101-000000-b" / "manifest.json").write_text("{")
    code, text = called("report", "--runs-dir", folder)
    assert (code, "20270101" in text) == (2, True)
    assert "no run in" in called("report", "--runs-dir", tmp_path / "none")[1]


STUDY = '[[variant]]\nname = "a"\n{}\n[workload]\nmodel = "tiny-llama"\n'


def test_a_study_file_may_begin_with_a_byte_order_mark(called, tmp_path):
    """Editors on Windows write one."""
    path = tmp_path / "own.toml"
    path.write_text(STUDY.format(""), encoding="utf-8-sig")
    code, text = called("list", "variants", path)
    assert (code, "a  " in text) == (0, True)


def test_an_unknown_field_of_a_method_gets_the_nearest(called, tmp_path):
    """PEFT's own name of the field is suggested."""
    path = tmp_path / "own.toml"
    path.write_text(STUDY.format('peft = { peft_type = "LORA", rank = 9 }'))
    code, text = called("run", path, "--dry-run", "--runs-dir", tmp_path / "runs")
    assert code == 2
    assert "peft.rank = 9: LoraConfig has no such field. Did you mean 'r'?" in text


def test_a_method_that_cannot_be_tried_in_time_is_refused(called, tmp_path, monkeypatch):
    """A study whose values are far too large ends with one sentence."""
    monkeypatch.setattr("lorameter.models.methods.PROBE_LIMIT_S", 0.01)
    path = tmp_path / "own.toml"
    path.write_text(
        STUDY.format(f'peft = {{ peft_type = "LORA", r = {time.time_ns() % 1000 + 7} }}\nlearning_rate = 3.3e-7')
    )
    code, text = called("run", path, "--dry-run", "--runs-dir", tmp_path / "runs")
    assert code == 4
    assert "within 0.01 s" in text


def test_a_profile_that_needs_a_gpu_is_refused_without_one(called, tmp_path):
    """No model of 7 billion parameters starts on a CPU; a plan is still shown."""
    words = ("run", "lora-or-qlora", "--profile", "gpu", "--runs-dir", tmp_path / "runs")
    code, text = called(*words)
    assert code == 2
    assert "profile 'gpu' runs on a GPU only and this machine measures on the CPU" in text


def test_sizes_of_full_fine_tuning_are_listed(called, tmp_path):
    """All weights of the model train, and there is no adapter."""
    code, text = called("list", "sizes", "lora-or-full", "--json")
    full = next(one for one in json.loads(text)["sizes"] if one["variant"] == "full")
    assert (code, full["share"]) == (0, 1.0)
