"""What there is to measure, and by which words it is asked for: `list`, and the options of every command."""

import dataclasses
import json
import re

import pytest

LINES = (
    "list studies",
    "list models",
    "list variants lora-or-qlora",
    "list variants llama2-lora-parameters",
    "list variants training-step",
)
SIZES = ("list sizes lora-or-qlora", "list sizes lora-or-qlora --model random:smollm2-135m")
COMMANDS = (
    "run report list compare gate accept ab bisect calibrate doctor estimate profile parity sample claims export "
    "history prune pack"
).split()


@pytest.mark.parametrize("form", ["", " --json"], ids=["text", "json"])
@pytest.mark.parametrize("line", LINES)
def test_what_there_is(line, form, lorameter, holds):
    """Names, titles and the content ids of variants are those that were kept."""
    holds(line + form, lorameter(line + form))


@pytest.mark.parametrize("form", ["", " --json"], ids=["text", "json"])
@pytest.mark.parametrize("line", SIZES)
def test_what_is_trained(line, form, lorameter, holds):
    """Parameters and bytes of every variant are those that were kept; what libraries say meanwhile is theirs."""
    holds(line + form, dataclasses.replace(lorameter(line + form), err=""))


def test_the_words_of_every_command(lorameter, holds):
    """The commands, and the options of each, are those that were kept; how help is laid out is argparse's."""
    found = {}
    for command in COMMANDS:
        outcome = lorameter(f"{command} --help")
        assert outcome.code == 0
        found[command] = sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", outcome.out)))
    holds("help of every command --json", dataclasses.replace(outcome, out=json.dumps(found)))
