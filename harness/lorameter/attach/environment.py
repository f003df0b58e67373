"""The environment of a script whose training is followed.

No file of the user's is changed and nothing is installed. A folder in front on PYTHONPATH holds a module that every
interpreter imports when it starts (`hook/sitecustomize.py`); launchers hand the environment on to what they start, so
that the hook is in each of their processes, and it only does something in one that trains.

`lorameter wrap` makes a temporary folder. It holds the command as it was typed, a file that the hook makes, and the
times of the ranks, and is removed when the command has ended.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from lorameter.errors import redact
from lorameter.studies.credentials import hide_credentials

ENV_FOLLOWER = "LORAMETER_FOLLOWER"
"""Names what follows the first training of the process: `package.module:callable`. The hook knows this and the next
two by itself, because it imports nothing until there is a training."""
DEFAULT_FOLLOWER = "lorameter.attach.writer:Writer"
"""Writes a run."""
MEASURED = "LORAMETER_MEASURED"
"""Is set where the script is started to be measured, without side effects (`lorameter.attach.disable_side_effects`)."""
HOOKED = "LORAMETER_HOOKED"
"""A file that the hook makes when an interpreter has loaded it; it holds what an interpreter lacks to be measured."""
RUN = "LORAMETER_RUN"
"""The directory of the run that the first training of the command is written to."""
WRAP = "LORAMETER_WRAP"
"""The temporary folder of the program that wraps the command."""
REQUIRE = "LORAMETER_REQUIRE"
"""JSON of the paths of kernels_check that a step must have."""
SOCKET = "LORAMETER_TURN_SOCKET"
"""The variable that holds the name of the parent's socket: of those that lie in no folder, whose path might be too
long (`address`)."""
HOOK = Path(__file__).with_name("hook")
"""The folder that goes in front on the path."""


def child_environment(
    inherited: Mapping[str, str],
    *,
    follower: str = DEFAULT_FOLLOWER,
    measured: bool = False,
    hooked: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The variables of a process whose first training is followed.

    Args:
        inherited: what it would have.
        follower: what follows, as `package.module:callable`; it is called without arguments when the training begins.
        measured: whether the script is started to be measured, and saves, reports and publishes nothing.
        hooked: a file that the hook makes when an interpreter has loaded it.
        variables: further ones.
    """
    path = os.pathsep.join(filter(None, [str(HOOK), inherited.get("PYTHONPATH", "")]))
    own = {"PYTHONPATH": path, ENV_FOLLOWER: follower}
    own |= {MEASURED: "1"} if measured else {}
    own |= {HOOKED: str(hooked)} if hooked is not None else {}
    return {**inherited, **own, **(variables or {})}


def address(name: str) -> str:
    """The address of a socket by its name, of Linux's abstract ones, which begin with a byte that no variable holds."""
    return "\0" + name.removeprefix("@")


def read_missing_packages(hooked: Path) -> str:
    """What an interpreter that has loaded the hook lacks to be measured, in words; nothing where none does."""
    try:
        return hooked.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def write_command(words: Sequence[str]) -> str:
    """The words as one line; what an option or a name that sounds like a credential is given is left out, and bytes
    that are no text are question marks."""
    return shlex.join(map(redact, hide_credentials(words))).encode(errors="replace").decode()


def read_command() -> str:
    """The command that is wrapped, from its file, since a variable holds 128 KiB; else that of this process."""
    if folder := os.environ.get(WRAP):
        return os.fsdecode((Path(folder) / "command").read_bytes())
    program, *words = sys.orig_argv or [sys.executable]
    return write_command([PurePath(program).name, *words])
