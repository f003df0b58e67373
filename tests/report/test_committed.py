"""The reports that are committed are those of the runs next to them: `make reports` makes them anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorameter.cli import main

ROOT = Path(__file__).parents[2]
REPORTS = sorted(path.parent.relative_to(ROOT) for path in (ROOT / "reports").glob("2*/manifest.json"))


@pytest.mark.parametrize("run", REPORTS, ids=lambda path: path.name)
@pytest.mark.parametrize(("file", "options"), [("report.txt", []), ("report.md", ["--markdown"])])
def test_a_committed_report_is_current(run, file, options, monkeypatch, capsys):
    """As text and as Markdown, to the last character."""
    monkeypatch.chdir(ROOT)
    assert main(["report", str(run), *options]) == 0
    assert (run / file).read_text(encoding="utf-8") == capsys.readouterr().out


@pytest.mark.parametrize("run", REPORTS, ids=lambda path: path.name)
def test_a_committed_page_is_current(run, monkeypatch, tmp_path, capsys):
    """The same for a browser."""
    monkeypatch.chdir(ROOT)
    assert main(["report", str(run), "--html", str(tmp_path / "report.html")]) == 0
    assert (run / "report.html").read_text(encoding="utf-8") == (tmp_path / "report.html").read_text(encoding="utf-8")
