"""The page says what the committed reports say, and no more."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from benchmarks.gpu import page, report
from benchmarks.gpu.claim import Decision
from benchmarks.gpu.claims import CLAIMS
from benchmarks.gpu.journal import Entry, Journal
from benchmarks.gpu.steps import STEPS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def campaign(tmp_path, machine):
    """A function that makes a campaign on a GPU in which every claim was decided alike."""

    def make(verdict, *, device="NVIDIA H100", units=("u",), rehearsed=False):
        journal = Journal(tmp_path / device / "state", device)
        for unit in units:
            journal.add(Entry(
                step="probe", outcome="rehearsed" if rehearsed else "done", code=0, took_s=12.0, begun_unix_s=1.8e9,
                device=device, unit=unit, sources="s",
            ))  # fmt: skip
        return report.Campaign(
            machine=dataclasses.replace(machine, device="cuda", device_name=device, driver="580"),
            origin="machine: here", rehearsed=rehearsed, steps=STEPS, journal=journal,
            decisions=tuple((claim, Decision(verdict=verdict, evidence="seen")) for claim in CLAIMS),
        )  # fmt: skip

    return make


def test_the_page_is_what_follows_from_the_reports():
    """As it is committed; `python -m benchmarks.gpu` writes it."""
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.rewritten(text, CLAIMS, page.campaigns(page.REPORTS)) == text


def test_a_page_without_a_place_for_the_table_is_refused():
    """And nothing of it is overwritten."""
    with pytest.raises(ValueError, match="expected once each"):
        page.rewritten("no marks", CLAIMS, [])


def test_each_card_has_a_column_and_its_report(tmp_path, campaign):
    """Confirmed on one and refuted on another is refuted somewhere; a claim that is new has a dash."""
    reports = tmp_path / "reports"
    for verdict, device in (("confirmed", "NVIDIA H100"), ("refuted", "NVIDIA L4")):
        report.write(campaign(verdict, device=device), reports, tmp_path / "state")
    found = page.campaigns(reports)
    assert [one["folder"] for one in found] == ["2027-01-15_nvidia-h100_gpu", "2027-01-15_nvidia-l4_gpu"]
    text = page.rewritten(f"a\n{page.BEGIN}\nwhat was there\n{page.END}\nz", CLAIMS, found)
    assert "what was there" not in text
    assert f"0 are confirmed and nowhere refuted, {len(CLAIMS)} refuted somewhere" in text
    row = next(line for line in text.splitlines() if line.startswith(f"| {CLAIMS[0].says}"))
    assert row.endswith("| confirmed | **refuted** |")
    found[0]["claims"] = []
    assert "| – | **refuted** |" in page.table(CLAIMS, found)
    assert "none is confirmed and none refuted" in page.summary(CLAIMS, [])


def test_every_link_of_the_page_leads_somewhere():
    """From docs/, whatever the claim rests on."""
    for link in re.findall(r"\]\(([^)]+)\)", page.PAGE.read_text(encoding="utf-8")):
        assert (page.PAGE.parent / link).exists(), link


def test_a_report_ends_with_the_claims_and_names_its_cards(tmp_path, campaign):
    """Two GPUs of one name are said; of a rehearsal, that nothing is claimed; the document holds all of it."""
    found = campaign("confirmed", units=("u", "v"))
    text = report.text(found)
    assert "on 2 GPUs of this name" in text
    assert text.rstrip().splitlines()[-1] == f"{len(CLAIMS)} confirmed; 0 refuted; 0 not decided"
    assert "done           24 s  probe" in text
    assert "not begun" in text
    folder = report.write(found, tmp_path / "reports", tmp_path / "state")
    kept = json.loads((folder / "campaign.json").read_text())
    assert (kept["device"], len(kept["claims"]), len(kept["steps"])) == ("NVIDIA H100", len(CLAIMS), 2)
    assert "nothing is claimed" in report.text(campaign("not decided", device="cpu", rehearsed=True))


def test_what_steps_printed_and_their_runs_are_kept_if_small(tmp_path, campaign, monkeypatch):
    """Outputs, manifests and records; no tokens, and nothing that is large."""
    monkeypatch.setattr(report, "MOST_KEPT_BYTES", 10)
    state = tmp_path / "some-state"
    for name, text in (
        ("outputs/probe.out", "{}"), ("outputs/large.out", "x" * 11), ("runs/study/r1/manifest.json", "{}"),
        ("runs/study/r1/tokens-1.safetensors", "x"),
    ):  # fmt: skip
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).write_text(text)
    folder = report.write(campaign("confirmed"), tmp_path / "reports", state)
    kept = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert kept == {"report.txt", "campaign.json", "outputs/probe.out", "runs/study/r1/manifest.json"}
