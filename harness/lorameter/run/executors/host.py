"""Where a measuring process lives: an interpreter, what stands in front on its path, and the folder it runs in.

The two sides of an A/B differ in their host and in nothing else: the same command lines are started in both. What a
host has installed is asked of a process of its own, which runs a script of the standard library only (`facts`), so
that an interpreter without lorameter can answer too and torch is imported by nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from lorameter.errors import impossible, shorten
from lorameter.machine.kernel_env import switches_of
from lorameter.machine.processes import kill_group
from lorameter.machine.provenance import LIBRARIES
from lorameter.machine.repository import git_state
from lorameter.machine.software import cuda_of

ANSWER_TIMEOUT_S = 120.0
"""Reading the metadata of 100 distributions takes 0.1 s; a cold network disk can make it a minute."""
MAX_ANSWER_BYTES = 1 << 20
"""A thousand distributions take 40 kB; a program that prints more is no Python."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The interpreter of a zygote, a cold start and a token process. The default is the present one."""

    python: str = field(default_factory=lambda: sys.executable)
    """Absolute path of the executable, links kept: a virtual environment's python is a link."""
    path: tuple[str, ...] = ()
    """Folders in front on PYTHONPATH, so in front of everything installed, editable installs included."""
    cwd: str | None = None
    """Folder that the processes run in, and which `python -m` puts first on the path; None: that of the parent."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables beside those of the parent."""

    def command(self, module: str, *arguments: str) -> list[str]:
        """The command line that runs a module in this interpreter."""
        return [self.python, "-m", module, *arguments]

    def variables(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The inherited environment with this host's variables and path."""
        variables = {**inherited, **self.environment}
        in_front = [*self.path, *filter(None, [variables.get("PYTHONPATH")])]
        return variables | ({"PYTHONPATH": os.pathsep.join(in_front)} if in_front else {})


class InterpreterFacts(msgspec.Struct, frozen=True):
    """What an interpreter has installed, as `describe_env.py` prints it."""

    python: Annotated[str, msgspec.Meta(pattern=r"^\d+\.\d+")]
    executable: str
    packages: dict[str, str]
    """Normalised distribution names and versions."""
    origins: dict[str, str | None]
    """The file that an import of each module would load, or None."""


def inspect(host: Host, modules: Sequence[str] = ()) -> InterpreterFacts:
    """What an interpreter has installed, and where some modules would be imported from. No module is imported for it.

    Raises:
        UsageError: the program cannot be started, or is no Python that can run this.
    """
    script = Path(__file__).with_name("describe_env.py").read_text(encoding="utf-8")
    try:
        process = subprocess.Popen(
            [host.python, "-c", script, json.dumps(list(modules))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=host.variables(os.environ),
            cwd=host.cwd,
            start_new_session=True,
        )
    except OSError as error:
        raise impossible("interpreter", "python", host.python, f"it does not start: {error}", _REMEDY) from None
    limit = threading.Timer(ANSWER_TIMEOUT_S, kill_group, [process.pid])
    limit.start()
    with process:
        assert process.stdout is not None
        printed = process.stdout.read(MAX_ANSWER_BYTES).decode(errors="replace")
        if len(printed) == MAX_ANSWER_BYTES:
            kill_group(process.pid)
    limit.cancel()
    for line in reversed(printed.splitlines() if process.returncode == 0 else []):
        with contextlib.suppress(msgspec.MsgspecError):
            return msgspec.json.decode(line, type=InterpreterFacts)
    lines = (printed.strip() or "nothing").splitlines()
    output = shorten(lines[-1 if "Traceback" in lines[0] else 0])
    why = f"no Python that can be asked what it has installed; it printed: {output}"
    raise impossible("interpreter", "python", host.python, why, _REMEDY)


def describe(host: Host) -> dict[str, Any]:
    """The provenance of a host: `python`, `libraries`, `cuda`, all `packages`, the `git` state of its folder, and the
    `switches` of its environment.

    Names and meanings are those of `provenance.collect`.

    Raises:
        UsageError: the interpreter does not answer.
    """
    facts = inspect(host, ["torch"])
    torch = facts.origins["torch"]
    return {
        "python": facts.python,
        "libraries": {name: _version(facts.packages.get(name)) for name in LIBRARIES},
        "cuda": None if torch is None else cuda_of(Path(torch).parent),
        "packages": facts.packages,
        "git": git_state(Path(host.cwd) if host.cwd is not None else Path.cwd()),
        "switches": switches_of(host.variables(os.environ)),
    }


def _version(described: str | None) -> str | None:
    """The bare version, without the commit that `facts` adds."""
    return None if described is None else described.split(" ")[0]


_REMEDY = "Name the executable of a Python 3.11 or later, for example ENVIRONMENT/bin/python."
