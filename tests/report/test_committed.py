"""Tests that the committed reports are those of the runs next to them; `make reports` updates them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorameter.cli import main

ROOT = Path(__file__).parents[2]
REPORTS = sorted(path.parent.relative_to(ROOT) for path in (ROOT / "reports").glob("2*/manifest.json"))


@pytest.mark.parametrize("run", REPORTS, ids=lambda path: path.name)
def test_a_committed_report_is_current(run, monkeypatch, tmp_path, capsys):
    """Text, page and Markdown are equal to the last character."""
    monkeypatch.chdir(ROOT)
    page = tmp_path / "report.html"
    assert main(["report", str(run), "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert main(["report", str(run), "--markdown"]) == 0
    made = {"txt": text, "md": capsys.readouterr().out, "html": page.read_text(encoding="utf-8")}
    for ending, found in made.items():
        assert (run / f"report.{ending}").read_text(encoding="utf-8") == found, ending
