"""Tests of the matrix of checks on the page: the colour of each status, and the status shown for several trials."""

from __future__ import annotations

import re

import pytest

from lorameter.cli import main
from lorameter.errors import EXIT_INVALID, EXIT_PASS

TONES = {"fallback": "bad", "absent": "bad", "unknown": "warning", "active": "good", "not_applicable": "warning"}


@pytest.fixture
def matrix(write_run, tmp_path, capsys):
    """A function that writes a run whose `nf4` trials have these statuses, and returns class and text of its cell."""

    def shown(*statuses, required=4):
        def checked(record):
            if record.name != "nf4":
                return record
            status = statuses[record.replicate % len(statuses)]
            check = {"path": "base.bits", "required": required, "observed": 16, "status": status, "reason": "seen"}
            return record.replaced(checks=(check,))

        page = tmp_path / "page.html"
        path = write_run("checked", {"plain": [1.0, 1.1, 1.2], "nf4": [1.0, 1.1, 1.2]}, change=checked)
        assert main(["report", str(path), "--html", str(page)]) in (EXIT_PASS, EXIT_INVALID)
        capsys.readouterr()
        cell = r'<td (?:data-variant="nf4" data-head="nf4"|colspan="2" data-head="all")>'
        found = re.findall(cell + r'<details><summary class="(\w+)">(\w+)', page.read_text("utf-8"))
        return found[0]

    return shown


@pytest.mark.parametrize(
    ("statuses", "worst"),
    [
        (("active", "unknown", "fallback"), "fallback"),
        (("unknown", "absent", "active"), "absent"),
        (("active", "active", "unknown"), "unknown"),
        (("not_applicable", "active", "active"), "not_applicable"),
    ],
)
def test_the_worst_status_of_the_trials_is_shown(matrix, statuses, worst):
    """A fallback in one trial is shown although the path is unknown in another."""
    assert matrix(*statuses) == (TONES[worst], worst)
