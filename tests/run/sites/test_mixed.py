"""Tests of different sites: each has its share of the replicates, is judged alone, and is never pooled."""

from __future__ import annotations

import json
import sys

import pytest

from lorameter.studies.from_run import read_study
from lorameter.verdicts.ab import attribution_of, report_of
from lorameter.verdicts.validity import run_validity

SITES = ("--sites", "0,1", "--mixed")
SIDES = ("--base", sys.executable, "--candidate", sys.executable, "--phase", "train", "--variant", "small")
SECOND = "5"
"""The CPUs of the second site."""


@pytest.fixture
def spread(placed, run, pretended):
    """A function that measures eight replicates on two sites, the second of which is slow for some trials."""

    def measure(command, *words, slow=()):
        pretended(slow=slow)
        return run(command, placed("", replicates=8), *SITES, *words)

    return measure


def document(output):
    """Return the JSON document that a command printed."""
    return json.JSONDecoder().raw_decode(output[output.index("{") :])[0]


def test_ratios_are_those_of_each_site(spread, run, tmp_path):
    """Each site has the same number of replicates however fast it is. The mean of both ratios, 1.22 here, describes
    neither site, so that commands which would pool sites refuse with each site and its machine."""
    _, last, _ = spread("run", slow=[(SECOND, "large", 1.5)])
    name = last.manifest.run
    assert {record.machine for record in last.records} == {"Test CPU"}
    assert last.manifest.sites == ("cpus-0", "cpus-1")
    code, _, output = run("report", name, "--json")
    tables = document(output)["tables"]
    assert code == 0
    assert [(table["site"], table["title"]) for table in tables] == [
        ("cpus-0", "Training on cpus-0"), ("cpus-1", "Training on cpus-1"),
    ]  # fmt: skip
    ratios = [{row["name"]: row["ratio"] for row in table["rows"]}["large"] for table in tables]
    assert [one["ratio"] for one in ratios] == pytest.approx([1.0, 1.5])
    assert [one["replicates"] for one in ratios] == [4, 4]
    assert "the sites are different machines (cpus-0: Test CPU; cpus-1: Test CPU)" in run("report", name)[2]
    for words in (
        ("compare", name, name), ("gate", name, name), ("accept", name), ("claims", name), ("export", name),
        ("report", name, "--html", tmp_path / "page.html"),
    ):  # fmt: skip
        code, _, output = run(*words)
        assert code == 2, words
        assert "different machines" in output or "claims nothing" in output

    lines = (last.path / "trials.jsonl").read_text().splitlines(keepends=True)
    (last.path / "trials.jsonl").write_text(lines[0])
    for words, refusal in (
        (("--on", "here"), "mixed: there is one site here"), (("--mixed",), "--mixed would change the study"),
    ):  # fmt: skip
        code, _, output = run("run", "--resume", name, *words)
        assert (code, refusal in output) == (2, True), output
    code, again, _ = run("run", "--resume", name)
    assert {record.machine for record in again.records} == {"Test CPU"}
    assert {record.status for record in again.records} == {"ok"}


def test_a_control_that_fails_on_one_site_fails_the_run(spread):
    """The other site does not matter."""
    code, last, _ = spread("run", slow=[(SECOND, "control", 1.5)])
    stands = run_validity(last, read_study(last))
    assert code == 4
    assert any("regressed in phase 'train on cpus-1'" in fault.message for fault in stands.faults)


def test_a_gate_of_an_ab_fails_where_one_site_regresses(spread, run):
    """The verdict names the site, also in the stored run."""
    code, last, output = spread("ab", *SIDES, slow=[(SECOND, "candidate", 1.5)])
    assert code == 1, output
    rows = {row.site: row for row in report_of(last).comparisons if row.metric == "step_time_s"}
    assert {site: row.verdict for site, row in rows.items()} == {"cpus-0": "equivalent", "cpus-1": "regressed"}
    assert {part.variant for part in attribution_of(last).parts} == {"small on cpus-0", "small on cpus-1"}
    code, _, output = run("gate", last.manifest.run)
    assert code == 1
    assert "small on cpus-1" in output
