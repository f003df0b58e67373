"""Tests of the reports of the stored runs: on a terminal, as Markdown, on GitHub and as a page."""

from pathlib import Path

import pytest

from tests.contract import doors
from tests.contract.expected import check_text

SHOWN = {"report-base": "report base", "report-candidate": "report candidate", "compare": "compare base candidate"}
OTHERS = {
    "compare-regressed": "compare steady slower --runs-dir derived",
    "gate-policy": "gate steady slower --policy strict.toml --runs-dir derived",
    "claims": "claims base", "sample": "sample base qlora", "history": "history --runs", "list-runs": "list runs",
    "list-studies": "list studies", "list-models": "list models", "list-variants": "list variants study.toml",
    "report-failed": "report failed --runs-dir derived",
    "compare-not-comparable": "compare steady elsewhere --runs-dir derived",
}  # fmt: skip
MARKDOWN = (*SHOWN, "compare-regressed", "gate-policy", "claims")
PAGES = (*MARKDOWN, "history")


def text_of(line, outcome):
    """Return both streams and the exit code in the stored format."""
    return f"$ lorameter {line}\nexit code {outcome.code}\n--- stdout\n{outcome.out}--- stderr\n{outcome.err}"


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", SHOWN)
def test_on_a_terminal(name, columns):
    """No line is longer than the pseudo-terminal is wide."""
    shown = doors.show(columns, "lorameter", *SHOWN[name].split())
    check_text(f"terminal/{name}-{columns}.txt", shown)
    assert max(map(len, shown.splitlines())) <= columns


@pytest.mark.parametrize("name", SHOWN | OTHERS)
def test_in_a_pipe(name, lorameter):
    """Both streams and the exit code are the expected ones."""
    line = (SHOWN | OTHERS)[name]
    check_text(f"text/{name}.txt", text_of(line, lorameter(line)))


@pytest.mark.parametrize("name", MARKDOWN)
def test_as_markdown(name, lorameter):
    """`--markdown` equals `--format markdown`."""
    line = (SHOWN | OTHERS)[name]
    outcome = lorameter(f"{line} --markdown")
    check_text(f"markdown/{name}.md", outcome.out)
    assert lorameter(f"{line} --format markdown").out == outcome.out


def test_on_github(lorameter, monkeypatch, tmp_path):
    """Workflow commands go to standard output, and the Markdown to the job summary."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    line = "gate steady slower --runs-dir derived --format github"
    outcome = lorameter(line)
    check_text("text/gate-github.txt", text_of(line, outcome))
    check_text("markdown/gate-github.md", (tmp_path / "summary.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PAGES)
def test_as_a_page(name, lorameter, tmp_path):
    """Headings, ids, tables and charts are the expected ones in a single file without external resources, with the same
    exit code."""
    line = (SHOWN | OTHERS)[name]
    code = lorameter(line).code
    assert lorameter(f"{line} --html {tmp_path / 'page.html'}").code == code
    page = doors.Page(Path(tmp_path / "page.html").read_text(encoding="utf-8"))
    check_text(f"page/{name}.txt", "\n".join(page.lines))
    assert [one for one in page.loaded if not one.startswith(("data:", "#"))] == []
