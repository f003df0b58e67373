"""`python -m kernels_check`: what a recording is said to have run, and the rules that say so."""

import dataclasses
import json

import pytest

RECORDINGS = "kernels.json kernels.csv operators.json no-events.json not-json.json sound.json absent.json".split()


@pytest.mark.parametrize("form", ["", " --json"], ids=["text", "json"])
@pytest.mark.parametrize("file", RECORDINGS)
def test_what_a_recording_shows(file, form, kernels_check, holds):
    """Backends, paths and shares of time, and what cannot be read, are those that were kept."""
    line = f"trace files/{file}{form}"
    holds(line, kernels_check(line))


def test_the_rules(kernels_check, holds):
    """Names, patterns and evidence are those that were kept; which libraries are installed is the machine's."""
    outcome = kernels_check("rules --json")
    document = json.loads(outcome.out)
    assert document.pop("installed")
    holds("rules --json", dataclasses.replace(outcome, out=json.dumps(document)))


def test_the_rules_in_words(kernels_check, holds):
    """The list of them is that which was kept."""
    holds("rules", kernels_check("rules"))


@pytest.mark.parametrize("line", ["no-such-command", "trace", "rules --no-such-option"])
def test_a_misused_command_line(line, kernels_check):
    """Exit code 2 and nothing on standard output."""
    outcome = kernels_check(line)
    assert (outcome.code, outcome.out) == (2, "")
