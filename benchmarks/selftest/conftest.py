"""What all self-benchmarks share: a way to print past pytest's capture, and a first line that names the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.machine import provenance
from harness.machine.repository import git_state


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
    facts = provenance.probe_machine()
    versions = ", ".join(
        f"{name} {provenance.library_version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes")
    )
    git = git_state(Path(__file__).parent)
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(
            f"machine: {facts.device_name}, {facts.cpus} CPUs, {facts.memory_bytes / 2**30:.0f} GiB, {facts.device}; "
            f"Python {facts.python}, {versions}; commit {str(git['commit'])[:10]}"
            f"{' with local changes' if git['dirty'] else ''}",
            end="",
            flush=True,
        )
    return facts
