"""The command that a process runs, as it is written down: without what may be a credential."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import PurePath

from lorameter.errors import UsageError, redact
from lorameter.studies.credentials import hide_credentials
from lorameter.studies.protocol import Protocol
from lorameter.studies.script_study import study_of_command
from lorameter.studies.study import Study


def write_command(words: Sequence[str]) -> str:
    """The words as one line; what an option or a name that sounds like a credential is given is left out, and bytes
    that are no text are question marks."""
    return shlex.join(map(redact, hide_credentials(words))).encode(errors="replace").decode()


def own_command() -> str:
    """The command line of this process."""
    program, *words = sys.orig_argv or [sys.executable]
    return write_command([PurePath(program).name, *words])


def study_of(command: str, *, threads: int, protocol: Protocol, requirements: dict[str, object]) -> Study:
    """The study of a command that runs already. A line that no study could hold (a program text behind `-c`) is written
    as its program alone."""
    for line in (command, shlex.join(shlex.split(command)[:1])):
        try:
            return study_of_command(line, threads=threads, protocol=protocol, requirements=requirements)
        except UsageError as error:
            refused = error
    raise refused
