"""What all self-benchmarks share: a way to print past pytest's capture, and a first line that names the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.machine.provenance import origin_of, probe_machine


@pytest.fixture
def say(capsys):
    """Print a line past pytest's capture."""

    def printed(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}", end="", flush=True)

    return printed


@pytest.fixture(scope="session", autouse=True)
def machine(pytestconfig):
    """Say once on which machine, with which libraries and from which commit the figures below come."""
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(origin_of(Path(__file__).parent), end="", flush=True)
    return probe_machine()
