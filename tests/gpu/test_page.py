"""Tests that the GPU page shows exactly what the committed reports show."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.gpu import page, report
from benchmarks.gpu.claim import Decision
from benchmarks.gpu.claims import CLAIMS
from benchmarks.gpu.journal import Entry, Journal

ROOT = Path(__file__).parents[2]


@pytest.fixture
def campaign(tmp_path, machine):
    """A function that returns the document of a GPU campaign with the same verdict for every claim."""

    def make(verdict, *, device="NVIDIA H100", gpu_uuids=("u",), rehearsed=False):
        journal = Journal(tmp_path / device / "state")
        for gpu_uuid in gpu_uuids:
            journal.add(Entry(
                step="wrap", outcome="rehearsed" if rehearsed else "done", code=0, took_s=12.0, begun_unix_s=1.8e9,
                device=device, gpu_uuid=gpu_uuid, harness="s",
            ))  # fmt: skip
        described = dataclasses.replace(machine, device="cuda", device_name=device, driver="580")
        decisions = [(claim, Decision(verdict=verdict, evidence="seen")) for claim in CLAIMS]
        return report.build_document(described, "machine: here", journal, decisions)

    return make


def test_the_page_is_generated_from_the_reports():
    """The committed page equals the one that `python -m benchmarks.gpu` would write."""
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.update_page(text, CLAIMS, page.read_campaigns(page.REPORTS)) == text


def test_each_gpu_has_a_column_and_its_report(tmp_path, campaign):
    """A claim that is refuted on any GPU counts as refuted; a claim that a report does not have is shown as a dash."""
    reports = tmp_path / "reports"
    for verdict, device in (("confirmed", "NVIDIA H100"), ("refuted", "NVIDIA L4")):
        report.write(campaign(verdict, device=device), reports, tmp_path / "state")
    found = page.read_campaigns(reports)
    assert [one["folder"] for one in found] == ["2027-01-15_nvidia-h100_gpu", "2027-01-15_nvidia-l4_gpu"]
    text = page.update_page(f"a\n{page.BEGIN}\nearlier text\n{page.END}\nz", CLAIMS, found)
    assert "earlier text" not in text
    assert f"0 are confirmed and nowhere refuted, {len(CLAIMS)} refuted somewhere" in text
    row = next(line for line in text.splitlines() if line.startswith(f"| {CLAIMS[0].says}"))
    assert row.endswith("| confirmed | **refuted** |")
    found[0]["verdicts"] = {}
    assert "| – | **refuted** |" in page.write_table(CLAIMS, found)
    assert "none is confirmed and none refuted" in page.summarise(CLAIMS, [])


def test_a_report_ends_with_the_claims_and_names_its_gpus(tmp_path, campaign):
    """The report names both GPUs of a machine, a rehearsal decides no claim, and the document holds all claims."""
    found = campaign("confirmed", gpu_uuids=("u", "v"))
    text = report.format_text(found, rehearsed=False)
    assert "on 2 GPUs of this name" in text
    assert text.rstrip().splitlines()[-1] == f"{len(CLAIMS)} confirmed; 0 refuted; 0 not decided"
    assert "done           24 s  wrap" in text
    assert "not begun" in text
    folder = report.write(found, tmp_path / "reports", tmp_path / "state")
    kept = json.loads((folder / "campaign.json").read_text())
    assert (kept["device"], len(kept["claims"]), len(kept["steps"])) == ("NVIDIA H100", len(CLAIMS), 2)
    rehearsal = campaign("not decided", device="cpu", rehearsed=True)
    assert "nothing is claimed" in report.format_text(rehearsal, rehearsed=True)
