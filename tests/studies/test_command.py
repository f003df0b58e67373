"""The table of a worker's commands."""

from __future__ import annotations

import pytest

from lorameter.studies.request import COMMANDS, commands_by
from lorameter.trial.profiling.trial import ProfiledTrial
from lorameter.trial.trial import Trial


def test_every_command_of_a_trial_is_a_method_of_it():
    """A command without a method would be a failed trial."""
    assert {*Trial.COMMANDS} == {*commands_by("trial")}
    for kind in (Trial, ProfiledTrial):
        assert all(callable(getattr(kind, word)) for word in kind.COMMANDS)
    assert all(command.label for command in COMMANDS.values())


@pytest.mark.parametrize("word", ["prepare", "cold", "memory_breakdown", "_take_step", "fly"])
def test_a_trial_refuses_what_is_not_its_own(word):
    """Methods are called by name, so only names in the table are allowed."""
    with pytest.raises(ValueError, match=word):
        Trial.run(object.__new__(Trial), word)


def test_timed_commands_of_a_trial_have_telemetry():
    """Without it a disturbed sample could not be recognised."""
    for command in COMMANDS.values():
        assert not (command.timed and command.by == "trial") or command.telemetry_phase == command.phase
    watched = {command.telemetry_phase for command in COMMANDS.values() if command.telemetry_phase}
    assert watched == {command.ends for command in COMMANDS.values() if command.ends}
