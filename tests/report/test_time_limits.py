"""Tests of the report of a run whose time limit skipped a part."""

from __future__ import annotations

import dataclasses

import pytest

from lorameter.cli import main
from lorameter.errors import EXIT_INVALID, EXIT_PASS

STEPS = {"plain": [1.0, 1.1, 1.2], "nf4": [2.0, 2.2, 2.4]}


@pytest.fixture
def reported(write_run, small_study, capsys):
    """A function that writes a run without requests and with a limit of three minutes, and returns exit code and text
    of its report."""
    protocol = dataclasses.replace(small_study.protocol, max_minutes=3.0)
    study = dataclasses.replace(small_study, protocol=protocol)

    def without_requests(record):
        kept = {name: samples for name, samples in record.samples.items() if name != "request_time_s"}
        return record.replaced(samples=kept)

    def read(**changes):
        path = write_run(
            "limited", STEPS, study=study, phases=("train", "generate"), change=without_requests, **changes
        )
        code = main(["report", str(path)])
        return code, " ".join(capsys.readouterr().out.split())

    return read


def test_a_run_whose_limit_left_out_all_requests_is_valid(reported):
    """The report shows the measured phases; a skipped phase has no table and no control."""
    code, text = reported(skipped=("cold", "merged", "requests"))
    assert code == EXIT_PASS
    assert "training" in text
    assert "generation" not in text


def test_missing_requests_that_were_not_skipped_make_a_run_invalid(reported):
    """A planned phase that was not skipped needs its control."""
    code, text = reported()
    assert code == EXIT_INVALID
    assert text.startswith("INVALID: the control of phase 'generate' was not measured")
