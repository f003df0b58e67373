"""Tests that every format of an invalid run begins with the reason and shows no valid verdict."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest

import lorameter
from lorameter.cli import main
from tests.constructed import RUNS

COUNTED = re.compile(r"slower|faster|equivalent|inconclusive|regressed|improved|cannot tell", re.IGNORECASE)
INVALID = {
    "control-failed": "its control regressed in phase 'train': the reference differs from itself",
    "failed": "trial r0-qlora-nf4-r64-a256-isolated is oom in build: tried to allocate 2.00 GiB",
    "killed": "its status is 'running', not 'complete'",
    "swept-in-part": "3 planned trials without a record, r0-r=32 among them",
}


class Body(HTMLParser):
    """The texts between the tags of a page's body, in order."""

    def __init__(self, text):
        super().__init__()
        self.words = []
        self.feed(text.partition("<body>")[2])

    def handle_data(self, data):
        self.words += [data.strip()] if data.strip() else []


@pytest.fixture
def reported(tmp_path, capsys):
    """A function that reports a run in each format and returns the lines of each and the texts of the page."""

    def read(run, *options):
        page = tmp_path / "page.html"
        words = ["report", str(run), "--runs-dir", str(RUNS), *options]
        found = {}
        for form in ("text", "markdown", "github"):
            main([*words, "--format", form, "--html", str(page)])
            found[form] = capsys.readouterr().out.splitlines()
        text = page.read_text("utf-8")
        found["page"] = Body(text).words
        found["verdicts"] = re.findall(r'<span class="verdict [^"]*">(.*?)</span>', text)
        found["title"] = [unescape(re.search("<title>(.*?)</title>", text)[1])]
        return found

    return read


def without_escapes(line):
    """Return a line without the escapes of Markdown and of a workflow command."""
    return re.sub(r"\\(.)", r"\1", line).replace("%2C", ",").replace("%3A", ":")


@pytest.mark.parametrize("run", INVALID)
def test_an_invalid_run_is_reported_first_and_has_no_valid_verdict(run, reported, capsys):
    """Each format begins with the reason, which the terminal repeats as its last line, and each verdict in headline,
    tables, figures and --json is `invalid`."""
    found = reported(run)
    for form in ("text", "markdown", "github", "page", "title"):
        first = without_escapes(found[form][0])
        assert "INVALID: " in first, form
        assert INVALID[run] in first, form
    last = max(number for number, line in enumerate(found["text"]) if line.startswith("INVALID: "))
    assert last > 20
    assert found["text"][last:] == found["text"][: len(found["text"]) - last]
    main(["report", run, "--runs-dir", str(RUNS), "--json"])
    document = json.loads(capsys.readouterr().out)
    ratios = [row["ratio"] for table in document["tables"] for row in table["rows"] if row["ratio"]]
    assert {ratio["verdict"] for ratio in ratios} <= {"invalid"}
    assert all(ratio["reason"].startswith("the run is invalid: ") for ratio in ratios)
    names = {row["name"] for table in document["tables"] for row in table["rows"]}
    for form in ("text", "markdown"):
        for line in found[form]:
            named = re.match(r"\W*(training|generation|cold start|\S+) ", line)
            if named and without_escapes(named[1]) in {"training", "generation", "cold start", *names}:
                assert not COUNTED.search(line), (form, line)
    assert set(found["verdicts"]) <= {"invalid"}
    assert bool(found["verdicts"]) == bool(ratios)


def test_a_required_path_that_was_not_active_makes_the_run_invalid(write_run, reported):
    """The status of the trial does not matter."""

    def fell_back(record):
        check = {"path": "base.bits", "required": 4, "observed": 16, "status": "fallback", "reason": "seen"}
        return record.replaced(checks=(check,)) if record.trial == "r1-nf4" else record

    path = write_run("fell", {"plain": [1.0, 1.1, 1.2], "nf4": [2.0, 2.2, 2.4]}, change=fell_back)
    line = reported(path)["text"][0]
    assert line == "INVALID: trial r1-nf4: required path base.bits is fallback, not active"
    assert set(lorameter.load(path).comparisons["verdict"]) == {"invalid"}
