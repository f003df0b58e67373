"""Tests that an option of several commands is the same in all of them."""

from __future__ import annotations

from typing import get_args

from lorameter.commands.options import SHARED
from lorameter.commands.table import COMMANDS
from lorameter.report.run_view import Sort
from lorameter.results import rows
from lorameter.results.export import DASHBOARDS, TABULAR
from lorameter.run.workers import IfBusy


def test_option_choices_are_those_of_the_device_lock():
    """The choices of the option are those of the lock."""
    assert SHARED["if-busy"]["choices"] == get_args(IfBusy)


def test_parser_choices_match_the_modules_that_define_them():
    """The parser lists formats and tables without importing the modules that define them."""
    commands = {command.name: {names[0]: settings for names, settings in command.arguments} for command in COMMANDS}
    export = commands["export"]
    assert export["--format"]["choices"] == ("json", *TABULAR, *DASHBOARDS)
    assert export["--table"]["choices"] == tuple(rows.TABLES)
    assert commands["report"]["--sort"]["choices"] == get_args(Sort)
