"""A report names the control that the time limit of its run left out."""

from __future__ import annotations

import dataclasses

import pytest

from lorameter.cli import main
from lorameter.errors import EXIT_INVALID, EXIT_PASS

STEPS = {"plain": [1.0, 1.1, 1.2], "nf4": [2.0, 2.2, 2.4]}


@pytest.fixture
def reported(write_run, small_study, capsys):
    """A function that writes a run of at most three minutes and reports it: the exit code and the text."""
    study = dataclasses.replace(small_study, protocol=dataclasses.replace(small_study.protocol, max_minutes=3.0))

    def read(phases, change, limited=True):
        path = write_run("limited", STEPS, study=study if limited else small_study, phases=phases, change=change)
        code = main(["report", str(path)])
        return code, " ".join(capsys.readouterr().out.split())

    return read


@pytest.mark.parametrize("limited", [True, False])
def test_a_run_whose_limit_left_out_all_requests_says_so(reported, limited):
    """It is invalid, since its control of a phase was not measured; without a limit nothing left it out."""

    def without_requests(record):
        kept = {name: samples for name, samples in record.samples.items() if name != "request_time_s"}
        return record.replaced(samples=kept)

    code, text = reported(("train", "generate"), without_requests, limited)
    assert code == EXIT_INVALID
    assert text.startswith("INVALID: the control of phase 'generate' was not measured")
    assert ("was not measured: the time limit of 3 minutes left it out" in text) == limited


def test_a_control_that_the_limit_left_out_is_not_called_inconclusive(reported):
    """One cold start of each variant and none of the control: the run is valid, and the report says what is missing."""

    def started(record):
        cold = record.role == "variant" and record.replicate == 0
        return record.replaced(samples=record.samples | ({"cold_start_time_s": (2.0,)} if cold else {}))

    code, text = reported(("train", "cold"), started)
    assert code == EXIT_PASS
    said = "the time limit of 3 minutes left out the control (a second measurement of plain)"
    assert f"A/A control: not measured: {said}" in text
    assert f"the control was not measured: {said}" in text.partition("Notices")[2]
    assert "cold_replicates" in text.partition("Notices")[2]
