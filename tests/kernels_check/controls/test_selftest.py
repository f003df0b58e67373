"""The self-test runs the controls, tells what held, and fails if any did not."""

import dataclasses
import json

import pytest

from kernels_check.__main__ import main
from kernels_check.check import Check
from kernels_check.controls import catalogue
from kernels_check.controls.control import Outcome
from kernels_check.controls.selftest import WIDTH, show

EAGER = next(control for control in catalogue.CONTROLS if control.name == "eager attention")
SKIPPED = dataclasses.replace(EAGER, name="elsewhere", needs_cuda="the reason")
UNCAUGHT = dataclasses.replace(EAGER, name="uncaught", sabotage=EAGER.twin)


@pytest.fixture
def only(monkeypatch):
    """Run some controls instead of all."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return lambda *controls: monkeypatch.setattr(catalogue, "CONTROLS", controls)


def test_all_held_is_success(only, capsys):
    """A row a control, a line for what was skipped, exit status 0."""
    only(EAGER, SKIPPED)
    assert main(["selftest"]) == 0
    shown = capsys.readouterr().out
    assert "fallback (eager)" in shown
    assert "active (flash)" in shown
    assert "skipped: elsewhere, spy: needs a CUDA device: the reason" in shown
    assert "2 hold, 0 failed, 2 skipped" in shown


def test_a_name_is_whole_beside_whatever_was_observed(capsys):
    """A row without the name of its control says nothing."""
    check = Check(path="attention.backend", required="flash", observed="a kernel " * 20, status="fallback", reason="x")
    name = "the longest name of a control there is, or nearly so"
    show([
        Outcome(control=name, path=check.path, required="flash", instrument=instrument, held=True, fault=None,
                sabotage=check, twin=check)
        for instrument in ("profile", "spy")
    ])  # fmt: skip
    assert name in capsys.readouterr().out
    assert max(len(control.name) for control in catalogue.CONTROLS) < WIDTH // 2


def test_one_that_fails_fails_the_run(only, capsys):
    """Exit status 4, and the fault in words."""
    only(UNCAUGHT, EAGER)
    assert main(["selftest"]) == 4
    shown = capsys.readouterr().out
    assert "FAILED: uncaught, profile: the sabotage is active" in shown
    assert "2 hold, 2 failed, 0 skipped" in shown


def test_json_is_one_document_with_the_evidence(only, capsys):
    """Both checks of each outcome, on stdout alone; progress goes to stderr."""
    only(EAGER, SKIPPED, UNCAUGHT)
    assert main(["selftest", "--json"]) == 4
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["schema"] == 1
    assert document["held"] is False
    assert document["counts"] == {"held": 2, "failed": 2, "skipped": 2}
    first = document["outcomes"][0]
    assert (first["control"], first["path"], first["instrument"]) == ("eager attention", "attention.backend", "profile")
    assert first["sabotage"]["status"] == "fallback"
    assert first["twin"]["status"] == "active"
    assert "eager attention" in captured.err


def test_bad_usage_is_its_own_exit_status(capsys):
    """As in every command."""
    with pytest.raises(SystemExit) as caught:
        main(["selftest", "--fast"])
    assert caught.value.code == 2
    assert "--fast" in capsys.readouterr().err
