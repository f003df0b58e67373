"""`python -m kernels_check`: what a recording is said to have run, and the rules that say so."""

import pytest

from kernels_check import rules_report

RECORDINGS = "kernels.json kernels.csv operators.json no-events.json not-json.json sound.json absent.json".split()


@pytest.mark.parametrize("form", ["", " --json"], ids=["text", "json"])
@pytest.mark.parametrize("file", RECORDINGS)
def test_what_a_recording_shows(file, form, kernels_check, holds):
    """Backends, paths and shares of time, and what cannot be read, are those that were kept."""
    line = f"trace files/{file}{form}"
    holds(line, kernels_check(line))


@pytest.fixture
def installed(monkeypatch):
    """Two of the libraries, as the rules were validated against them."""
    versions = {"torch": "2.13.0+cpu", "bitsandbytes": "0.50.2"}
    monkeypatch.setattr(rules_report, "_installed", versions.get)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("line", ["rules --json", "rules"])
def test_the_rules(line, kernels_check, holds):
    """Names, patterns, evidence and the list of them are those that were kept."""
    holds(line, kernels_check(line))


@pytest.mark.parametrize("line", ["no-such-command", "trace", "rules --no-such-option"])
def test_a_misused_command_line(line, kernels_check):
    """Exit code 2 and nothing on standard output."""
    outcome = kernels_check(line)
    assert (outcome.code, outcome.out) == (2, "")
