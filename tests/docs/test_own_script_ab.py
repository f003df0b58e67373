"""The page on two scripts against each other: its commands are known, its study is read, and its numbers and codes are
those of the code."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

from lorameter.attach import script_trial
from lorameter.commands.parser import build_parser
from lorameter.commands.table import COMMANDS
from lorameter.run.workers import script_sandbox
from lorameter.studies.protocol import STEPS_PER_TURN
from lorameter.studies.study_file import load_study
from lorameter.verdicts import same_training

PAGE = Path(__file__).parents[2] / "docs" / "own-script-ab.md"
TEXT = PAGE.read_text(encoding="utf-8")


def block(kind):
    """The text of the one block of a kind."""
    (found,) = re.findall(rf"^```{kind}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return found


def section(title):
    """What stands below a title."""
    return TEXT.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_its_commands_are_known():
    """Each as it is typed: two commands, or one on two sides."""
    lines = block("").splitlines()
    given = [build_parser().parse_args(shlex.split(line)[1:]) for line in lines]
    assert [(one.base_command, one.candidate_command) for one in given[:1]] == [
        ("python train.py", "python train.py --use_liger_kernel")
    ]
    assert [(one.script, one.base, one.candidate) for one in given[1:]] == [
        ("python train.py", "trl==0.28.0", "trl==0.29.0"), ("python train.py", "main", "HEAD"),
    ]  # fmt: skip


def test_its_study_is_read(tmp_path):
    """With all that a variant which is a command may say."""
    (tmp_path / "own.toml").write_text(block("toml"))
    study = load_study(str(tmp_path / "own.toml"))
    assert study.of_scripts
    assert (study.protocol.replicates, study.protocol.turns, study.protocol.steps_per_turn) == (8, 20, STEPS_PER_TURN)
    plain, liger = study.variants
    assert (plain.cwd, plain.env, plain.python) == ("", {}, "")
    assert liger.command == "python train.py --use_liger_kernel"
    assert (liger.cwd, liger.env["TOKENIZERS_PARALLELISM"]) == ("/data/project", "false")
    assert liger.python == "/opt/other/bin/python"


def codes_of(module):
    """Of every notice that a module makes: its texts that are written as codes."""
    return set(re.findall(r'"([a-z]+(?:-[a-z]+)+)"', inspect.getsource(module)))


def codes_in(text):
    """What stands in the text as a code does."""
    return set(re.findall(r"`([a-z]+(?:-[a-z]+)+)`", text))


@pytest.mark.parametrize(
    ("title", "module"),
    [
        ("Do they do the same?", same_training),
        ("What a measured script writes", script_sandbox),
        ("The end", script_trial),
    ],
)
def test_its_notices_are_those_that_there_are(title, module):
    """None that nobody gives, and none is left out."""
    assert codes_in(section(title)) == codes_of(module)


def test_its_numbers_are_those_of_the_code():
    """Steps of a turn and of a process, what is copied, and what is a difference."""
    assert STEPS_PER_TURN == 2
    (steps,) = (said["help"] for command in COMMANDS if command.name == "ab" for (name, *_), said in command.arguments
                if name == "--steps")  # fmt: skip
    assert f"process ({steps.rpartition('default ')[2]})" in TEXT
    assert f"Files above {script_sandbox.LARGE_BYTES >> 20} MiB" in TEXT
    assert f"more than {script_sandbox.MAX_BYTES >> 30} GiB" in TEXT
    assert f"differ by more than {same_training.TOLERANCE:.0%}".replace("%", " %") in section("Do they do the same?")
    assert f"lies within {same_training.MARGIN:.0%}".replace("%", " %") in section("Do they do the same?")


def test_what_it_says_is_linked_is_linked():
    """Files that are read at most, and what tools keep for themselves."""
    assert set(re.findall(r"`([\w.]+)`", section("What a measured script writes"))) >= {".git", "__pycache__", "wandb"}
    assert ".git" in script_sandbox.LINKED
    assert {"__pycache__", "wandb"} <= set(script_sandbox.LEFT_OUT)
