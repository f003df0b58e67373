"""Options that several commands have are the same in all of them."""

from __future__ import annotations

from typing import get_args

import pytest

from lorameter.commands.options import SHARED
from lorameter.commands.parser import build_parser
from lorameter.commands.table import COMMANDS
from lorameter.report.run_view import Sort
from lorameter.results import columns, files
from lorameter.run.device_lock import IfBusy


def settings_of(command, name):
    """Metavar, choices, default and help of an option."""
    (commands,) = (action for action in build_parser()._actions if action.choices)
    found = commands.choices[command]._option_string_actions[f"--{name}"]
    return found.metavar, found.choices, found.default, found.help


@pytest.mark.parametrize("command", ["profile", "estimate"])
def test_a_variant_of_a_profile_is_named_like_a_study_of_one(command):
    """In the words of `run`: where a study is fitted to a machine, its variants are looked at as fitted."""
    assert settings_of(command, "profile") == settings_of("run", "profile")


def test_what_can_be_done_while_another_measurement_runs():
    """The words of the option are those that the lock knows."""
    assert SHARED["if-busy"]["choices"] == get_args(IfBusy)


def test_pytest_has_them_under_its_own_names(pytester):
    """With the words of the command line."""
    shown = " ".join(pytester.runpytest_subprocess("--help").stdout.str().split())
    assert "--lorameter-if-busy={wait,refuse,share}" in shown
    assert "number of replicates, instead of --lorameter-effort" in shown
    assert "--lorameter-on=CLUSTER" in shown
    assert "with --lorameter-on, on these nodes" in shown


def test_the_words_of_the_command_line_are_those_of_what_it_calls():
    """The parser names formats and tables without loading what knows them."""
    commands = {command.name: {names[0]: settings for names, settings in command.arguments} for command in COMMANDS}
    export = commands["export"]
    assert export["--format"]["choices"] == ("json", *files.TABULAR, *files.OF_TRENDS)
    assert export["--table"]["choices"] == tuple(columns.TABLES)
    assert commands["report"]["--sort"]["choices"] == get_args(Sort)
