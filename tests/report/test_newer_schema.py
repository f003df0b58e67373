"""A run that a newer version wrote: shown as far as it is known, everywhere with that said, and judged by nobody."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from harness.cli import main

RUNS = Path(__file__).parents[1] / "golden" / "runs"
UNREAD = (
    "manifest.json, colour",
    "study, workload, rope",
    "study, variants, mixture",
    "trials.jsonl, heat",
    "'paused'",
)


@pytest.fixture(autouse=True)
def own_index(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAMETER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture
def said(capsys):
    """What a command says of the golden runs, and how it ends."""

    def called(line, runs=RUNS):
        code = main([*line.split(), "--runs-dir", str(runs)])
        out, err = capsys.readouterr()
        return code, " ".join(f"{out} {err}".split())

    return called


def renewed(name, folder, schema=6):
    """A golden run as a newer version would have written it, had that version changed nothing."""
    path = folder / name
    shutil.copytree(RUNS / name, path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"schema": schema}))
    lines = [json.loads(line) for line in (path / "trials.jsonl").read_text().splitlines()]
    lines = [json.dumps(record | {"schema": schema, "checks": []}) for record in lines]
    (path / "trials.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_its_report_names_what_was_not_read(said):
    """All of it by its name, the numbers beside it, and a run that is not valid."""
    code, text = said("report newer")
    assert code == 4
    assert "schema 6, and this version knows schemas up to 5" in text
    assert [name for name in (*UNREAD, "'bends'") if name not in text] == []
    assert "qlora-nf4-r16" in text
    assert "r1-qlora-nf4-r16: no record" in text


def test_where_all_is_known_that_is_said_too(said, tmp_path):
    """A number alone does not say what a version means by the names."""
    code, text = said(f"report {renewed('sound', tmp_path)}")
    assert code == 4
    assert "schema 6, and this version knows schemas up to 5" in text
    assert "All of its names are known." in text


@pytest.mark.parametrize("options", ["--markdown", "--json", "--format github", "--html"])
def test_every_rendering_says_so(options, said, tmp_path):
    """Also the one that is sent to somebody else."""
    page = tmp_path / "page.html"
    code, text = said(f"report newer {options}{f' {page}' if options == '--html' else ''}")
    text = page.read_text(encoding="utf-8") if options == "--html" else text
    assert code == 4
    assert "newer-schema" in text
    assert "mixture" in text


def test_an_ab_of_a_newer_version_has_no_verdict(said, tmp_path):
    """Its rows stand there, each invalid and with the reason."""
    code, text = said(f"report {renewed('ab', tmp_path)}")
    assert code == 4
    assert "written by schema 6" in text
    assert "invalid" in text
    assert "regressed" not in text


@pytest.mark.parametrize("sides", ["sound newer", "newer sound", "newer newer"])
def test_it_is_compared_only_by_force(sides, said, tmp_path):
    """Facts that must agree may be among those that are not known; a forced ratio is called equal by nobody."""
    renewed("sound", tmp_path).rename(tmp_path / "newer")
    shutil.copytree(RUNS / "sound", tmp_path / "sound")
    code, text = said(f"compare {sides}", tmp_path)
    assert code == 5
    assert "newer than this version knows" in text
    assert "All of its names are known." in text
    code, text = said(f"compare {sides} --force --metric step_time_s --json", tmp_path)
    rows = json.loads(text)["comparisons"]
    assert [row["ratio"] for row in rows] == pytest.approx([1.0] * len(rows))
    assert {row["verdict"] for row in rows} == {"inconclusive"}


@pytest.mark.parametrize("sides", ["sound newer", "newer sound"])
def test_a_gate_fails_closed(sides, said, tmp_path):
    """Also of a run in which every name is known and every number is that of the base."""
    for runs in (RUNS, tmp_path):
        if runs is tmp_path:
            renewed("sound", tmp_path).rename(tmp_path / "newer")
            shutil.copytree(RUNS / "sound", tmp_path / "sound")
        code, text = said(f"gate {sides}", runs)
        assert code in (4, 5)
        assert "Gate failed" in text


def test_its_claims_are_not_judged(said):
    """One that is known has no verdict, one that is not is named by the report, and where all are new that is said."""
    code, text = said("claims newer")
    assert code == 4
    assert "not judged" in text
    assert "newer schema 6" in text
    assert "supported" not in text


def test_new_claims_alone_are_no_lack_of_claims(said, tmp_path):
    """Somebody who is told that there are none would add them."""
    path = tmp_path / "newer"
    shutil.copytree(RUNS / "newer", path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["study"]["claims"] = manifest["study"]["claims"][1:]
    (path / "manifest.json").write_text(json.dumps(manifest))
    code, text = said(f"claims {path}")
    assert code == 2
    assert "its claims are of the newer schema 6" in text
    assert said(f"report {path}")[0] == 4


def test_a_history_and_a_list_show_it_and_leave_it_out(said, tmp_path):
    """Its number stands in the table, with why it is in no line."""
    shutil.copytree(RUNS / "newer", tmp_path / "runs" / "newer")
    shutil.copytree(RUNS / "sound", tmp_path / "runs" / "sound")
    code, text = said("history --runs --variant lora-r16", tmp_path / "runs")
    assert code == 0
    assert "1 run left out (run newer: it was written by schema 6" in text
    assert "2026" in text
    code, text = said("list runs", tmp_path / "runs")
    assert "of the newer schema 6" in text
    code, text = said("list runs --json", tmp_path / "runs")
    (row,) = (row for row in json.loads(text)["runs"] if row["run"] == "newer")
    assert (row["newer_schema"], row["verdict"]) == (6, "invalid")


@pytest.mark.parametrize("line", ["accept newer", "export newer", "pack newer", "run --resume newer"])
def test_whoever_writes_it_elsewhere_would_lose_the_rest(line, said):
    """So that is refused, with the remedy."""
    code, text = said(line)
    assert code == 2
    assert "schema 6" in text
    assert "Use the version that wrote it" in text
