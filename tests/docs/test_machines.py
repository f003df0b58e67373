"""The page about several machines: its commands are typed, its places are read, its files are loaded."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lorameter.commands.parser import build_parser
from lorameter.studies.placement import OWN_OPTIONS, SLURM_OPTIONS, SiteSpec, is_slurm, read_slurm
from lorameter.studies.study_file import load_study

PAGE = (Path(__file__).parents[2] / "docs" / "machines.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [
    words
    for kind, block in BLOCKS
    if not kind
    for line in block.splitlines()
    if (words := shlex.split(line, comments=True))
]


def test_every_command_can_be_typed(pytestconfig):
    """With options that there are, for a place that can be read; pytest's as well."""
    kinds = set()
    for words in COMMANDS:
        kinds.add(words[0])
        if words[0] == "lorameter":
            options = build_parser().parse_args(words[1:])
            place = SiteSpec().with_options(on=getattr(options, "on", None), sites=getattr(options, "sites", None))
            assert not place.is_plain, words
            if is_slurm(place.on):
                assert read_slurm(place.on).sites >= 1
        elif words[0] == "pytest":
            for option in (word.partition("=")[0] for word in words if word.startswith("--")):
                pytestconfig.getoption(option)  # raises for one that there is not
        else:
            assert words[:2] == ["pip", "install"]
            assert words[2] == "lorameter[ray]"
    assert kinds == {"lorameter", "pytest", "pip"}


@pytest.mark.parametrize("text", [block for kind, block in BLOCKS if kind == "toml"])
def test_every_file_can_be_loaded(text, tmp_path):
    """What is a part of a study in one that has nothing else."""
    path = tmp_path / "study.toml"
    path.write_text(text if "[[variant]]" in text else f'{text}[[variant]]\nname = "plain"\n', encoding="utf-8")
    study = load_study(str(path))
    assert study.workload.ranks > 1 or not study.protocol.place.is_plain


def test_the_table_of_keys_has_all_that_can_be_asked_of_jobs():
    """And no other."""
    (table,) = re.findall(r"^\| key \|.*?\n\n", PAGE, re.DOTALL | re.MULTILINE)
    named = [key for line in table.split("\n")[2:-2] for key in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(named) == sorted({*OWN_OPTIONS, *SLURM_OPTIONS})
