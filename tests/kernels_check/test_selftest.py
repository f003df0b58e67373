"""Tests of `kernels_check selftest`: twelve faults are found on this machine, and a missed fault fails the command."""

import dataclasses
import json

import pytest

from kernels_check import selftest
from kernels_check.__main__ import main

EAGER = selftest.CONTROLS[0]
MISSED = dataclasses.replace(EAGER, name="missed", fault=EAGER.healthy)


@pytest.fixture
def only(monkeypatch):
    """A function that replaces the twelve controls."""
    return lambda *controls: monkeypatch.setattr(selftest, "CONTROLS", controls)


def test_every_fault_is_found_and_every_healthy_run_passes(capsys):
    """The twelve controls each test another path; the command exits with 0."""
    assert main(["selftest"]) == 0
    shown = capsys.readouterr().out
    assert len({control.path for control in selftest.CONTROLS}) == 12
    assert "fallback (eager)" in shown
    assert "active (flash)" in shown
    assert shown.rstrip().endswith("12 of 12 hold")
    assert all(control.name in shown for control in selftest.CONTROLS)


def test_a_fault_that_is_not_found_fails_the_command(only, capsys):
    """A missed fault, a failing healthy run and an exception exit with 4 and the reason."""
    broken = dataclasses.replace(EAGER, name="broken", healthy=EAGER.fault)
    raises = dataclasses.replace(EAGER, name="raises", fault=lambda: selftest.build(attention="none"))
    only(EAGER, MISSED, broken, raises)
    assert main(["selftest"]) == 4
    shown = capsys.readouterr().out
    assert "FAILED: missed: the fault is active" in shown
    assert "FAILED: broken: the healthy run is fallback" in shown
    assert "FAILED: raises: ValueError" in shown
    assert "1 of 4 hold" in shown


def test_json_is_one_document_with_both_checks(only, capsys):
    """stdout has only the document, and progress goes to stderr."""
    only(EAGER, MISSED)
    assert main(["selftest", "--json"]) == 4
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["schema"], document["held"], document["counts"]) == (1, False, {"held": 1, "failed": 1})
    first = document["outcomes"][0]
    assert (first["control"], first["path"]) == (EAGER.name, "attention.backend")
    assert (first["fault"]["status"], first["healthy"]["status"]) == ("fallback", "active")
    assert EAGER.name in captured.err
