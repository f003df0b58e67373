"""Tests of the reports of the stored runs: on a terminal, as Markdown, on GitHub and as a page.

Tests of the tables of `load` and `load_all`: columns, types, and row counts of a stored run.
"""

import json

import pytest

from tests.contract import doors
from tests.contract.expected import check_document, check_text

ON_TERMINALS = {"report-base": "report base", "compare": "compare base candidate"}
IN_PIPES = {
    "compare-regressed": "compare steady slower --runs-dir derived",
    "gate-policy": "gate steady slower --policy strict.toml --runs-dir derived",
    "claims": "claims base", "sample": "sample base qlora", "history": "history --runs", "list-runs": "list runs",
    "list-studies": "list studies", "list-models": "list models", "list-variants": "list variants study.toml",
    "report-failed": "report failed --runs-dir derived",
    "compare-not-comparable": "compare steady elsewhere --runs-dir derived",
}  # fmt: skip
MARKDOWN = (*ON_TERMINALS, "compare-regressed", "gate-policy", "claims")
PAGES = (*MARKDOWN, "history")


def format_outcome(line, outcome):
    """Return both streams and the exit code in the stored format, without the line that names the page."""
    shown = "".join(one for one in outcome.err.splitlines(keepends=True) if not one.startswith("page: "))
    return f"$ lorameter {line}\nexit code {outcome.code}\n--- stdout\n{outcome.out}--- stderr\n{shown}"


@pytest.mark.parametrize(("name", "columns"), [("report-base", 80), ("report-base", 120), ("compare", 80)])
def test_no_line_is_wider_than_the_terminal(name, columns):
    """No line is longer than the pseudo-terminal is wide."""
    shown = doors.show(columns, "lorameter", *ON_TERMINALS[name].split())
    check_text(f"terminal/{name}-{columns}.txt", shown)
    assert max(map(len, shown.splitlines())) <= columns


@pytest.mark.parametrize("name", ON_TERMINALS | IN_PIPES)
def test_the_output_in_a_pipe_and_the_page_are_the_expected_ones(name, lorameter, tmp_path):
    """Both streams and the exit code are the expected ones, also with a page: its headings, ids, tables and charts are
    the expected ones, in a single file without external resources."""
    line, path = (ON_TERMINALS | IN_PIPES)[name], tmp_path / "page.html"
    check_text(f"text/{name}.txt", format_outcome(line, lorameter(f"{line} --html {path}" if name in PAGES else line)))
    if name in PAGES:
        page = doors.Page(path.read_text(encoding="utf-8"))
        check_text(f"page/{name}.txt", "\n".join(page.lines))
        assert [one for one in page.loaded if not one.startswith(("data:", "#"))] == []


@pytest.mark.parametrize("name", MARKDOWN)
def test_markdown_is_the_expected_one(name, lorameter):
    """`--markdown` prints the report as GitHub shows it."""
    check_text(f"markdown/{name}.md", lorameter(f"{(ON_TERMINALS | IN_PIPES)[name]} --markdown").out)


def test_github_gets_commands_and_a_summary(lorameter, monkeypatch, tmp_path):
    """Workflow commands go to standard output, and the Markdown to the job summary."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    line = "gate steady slower --runs-dir derived --format github"
    outcome = lorameter(line)
    check_text("text/gate-github.txt", format_outcome(line, outcome))
    check_text("markdown/gate-github.md", (tmp_path / "summary.md").read_text(encoding="utf-8"))


TABLES = ("trials", "samples", "estimates", "comparisons")


def columns(frames):
    return {name: {key: str(kind) for key, kind in getattr(frames, name).dtypes.items()} for name in TABLES}


def test_a_run_has_the_expected_columns():
    """A run is loaded by its id and a folder, or by its path."""
    frames = doors.load("base", "runs")
    check_document("frames/columns", columns(frames))
    rows = {name: len(getattr(frames, name)) for name in TABLES}
    assert {name: len(getattr(doors.load("runs/base"), name)) for name in TABLES} == rows
    check_document("frames/rows", rows)


def test_values_are_those_of_the_records():
    """Durations are bit-equal to the records, and missing values are missing."""
    lines = (doors.HERE / "runs" / "base" / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    records = {record["trial"]: record for record in map(json.loads, lines)}
    samples = doors.load("base", "runs").samples
    for trial, rows in samples[samples.metric == "step_time_s"].groupby("trial"):
        assert rows.sort_values("sample").value.tolist() == records[trial]["samples"]["step_time_s"]
    assert doors.load("base", "runs").trials.failure.isna().all()


def test_all_runs_of_a_folder_have_the_same_columns():
    """The columns are the same, and unreadable runs are named."""
    every = doors.load_all("runs")
    assert columns(every) == columns(doors.load("base", "runs"))
    assert set(every.trials["run"]) == {"base", "candidate"}
    assert len(every.unreadable) == 0
    assert len(doors.load_all("damaged").unreadable) == 1


def test_a_missing_run_is_an_error():
    """The error names the run."""
    with pytest.raises(Exception, match="no-such-run"):
        doors.load("no-such-run", "runs")
