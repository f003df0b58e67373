"""Tests that the numbers in docs/own-script-ab.md are those of the code."""

from pathlib import Path

from lorameter.commands.table import COMMANDS
from lorameter.run.workers import script_sandbox
from lorameter.studies.protocol import STEPS_PER_TURN
from lorameter.verdicts import same_training

PAGE = Path(__file__).parents[2] / "docs" / "own-script-ab.md"
TEXT = PAGE.read_text(encoding="utf-8")


def section(title):
    """Return the text below a title."""
    return TEXT.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_its_numbers_are_those_of_the_code():
    """The page states the steps of a turn and of a process, the copied size, and the limits of a difference."""
    assert STEPS_PER_TURN == 2
    (arguments,) = (command.arguments for command in COMMANDS if command.name == "ab")
    (steps,) = (options["help"] for (name, *_), options in arguments if name == "--steps")
    assert f"process ({steps.rpartition('default ')[2]})" in TEXT
    assert f"Files above {script_sandbox.LARGE_BYTES >> 20} MiB" in TEXT
    assert f"more than {script_sandbox.MAX_BYTES >> 30} GiB" in TEXT
    assert f"differ by more than {same_training.TOLERANCE:.0%}".replace("%", " %") in section("Do they do the same?")
    assert f"lies within {same_training.MARGIN:.0%}".replace("%", " %") in section("Do they do the same?")
