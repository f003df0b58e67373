"""The table of what a worker can be asked."""

from __future__ import annotations

import pytest

from lorameter.studies.request import COMMANDS, words_of
from lorameter.trial.profiling.trial import ProfiledTrial
from lorameter.trial.trial import Trial


def test_every_command_of_a_trial_is_a_method_of_it():
    """A word in the table that nobody carries out would be a failed trial."""
    assert {*Trial.COMMANDS} == {*words_of("trial")}
    for kind in (Trial, ProfiledTrial):
        assert all(callable(getattr(kind, word)) for word in kind.COMMANDS)
    assert all(command.label for command in COMMANDS.values())


@pytest.mark.parametrize("word", ["prepare", "cold", "memory_breakdown", "_take_step", "fly"])
def test_a_trial_refuses_what_is_not_its_own(word):
    """Methods are reached by name, so only the words of the table may name one."""
    with pytest.raises(ValueError, match=word):
        Trial.run(object.__new__(Trial), word)


def test_what_is_timed_in_a_trial_is_watched():
    """A sample without its surroundings could not be told from a disturbed one."""
    for command in COMMANDS.values():
        assert not (command.timed and command.by == "trial") or command.telemetry_phase == command.phase
    watched = {command.telemetry_phase for command in COMMANDS.values() if command.telemetry_phase}
    assert watched == {command.ends for command in COMMANDS.values() if command.ends}
