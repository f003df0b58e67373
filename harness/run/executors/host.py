"""Where a measuring process lives: an interpreter, what stands in front on its path, and the folder it runs in.

The two sides of an A/B differ in their host and in nothing else: the same command lines are started in both. What a
host has installed is asked of a process of its own, which runs a script of the standard library only (`facts`), so
that an interpreter without lorameter can answer too and torch is imported by nobody.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import UsageError, impossible
from harness.machine.provenance import LIBRARIES
from harness.machine.repository import git_state
from harness.machine.software import cuda_of
from harness.machine.steering import switches_of
from harness.records import codec

_VERSION = re.compile(r"\d+\.\d+", re.ASCII)
ANSWER_TIMEOUT_S = 120.0
"""Reading the metadata of 100 distributions takes 0.1 s; a cold network disk can make it a minute."""


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


def inspect(host: Host, modules: Sequence[str] = ()) -> dict[str, Any]:
    """What the interpreter says of itself: `python`, `executable`, `packages`, and the `origins` of some modules.

    `packages` maps normalised distribution names to versions; `origins` maps each module to the file that an import
    would load, or None. No module is imported for it.

    Raises:
        UsageError: the program cannot be started, or is no Python that can run this.
    """
    script = Path(__file__).with_name("facts.py").read_text(encoding="utf-8")
    try:
        done = subprocess.run(
            [host.python, "-c", script, json.dumps(list(modules))],
            capture_output=True,
            text=True,
            errors="replace",
            env=host.variables(os.environ),
            cwd=host.cwd,
            stdin=subprocess.DEVNULL,
            timeout=ANSWER_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise impossible("interpreter", "python", host.python, f"it does not answer: {error}", _REMEDY) from None
    answer = read_answer(done.stdout) if done.returncode == 0 else None
    if answer is None:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
        why = f"no Python that can be asked what it has installed; it said: {said[-1 if 'Traceback' in said[0] else 0]}"
        raise impossible("interpreter", "python", host.python, why, _REMEDY)
    return answer


def read_answer(printed: str) -> dict[str, Any] | None:
    """What an interpreter says of itself: the last line of what it printed; None where that says something else."""
    try:
        answer: dict[str, Any] = codec.parse(printed.strip().splitlines()[-1])
        codec.from_json(dict[str, str], answer["packages"], "packages")
        codec.from_json(dict[str, str | None], answer["origins"], "origins")
        known = _VERSION.match(answer["python"]) and isinstance(answer["executable"], str)
    except (LookupError, TypeError, codec.NotJsonError, UsageError):
        return None
    return answer if known else None


def describe(host: Host) -> dict[str, Any]:
    """The provenance of a host: `python`, `libraries`, `cuda`, all `packages`, the `git` state of its folder, and the
    `switches` of its environment.

    Names and meanings are those of `provenance.collect`.

    Raises:
        UsageError: the interpreter does not answer.
    """
    facts = inspect(host, ["torch"])
    packages: dict[str, str] = facts["packages"]
    torch = facts["origins"]["torch"]
    return {
        "python": facts["python"],
        "libraries": {name: _version(packages.get(name)) for name in LIBRARIES},
        "cuda": None if torch is None else cuda_of(Path(torch).parent),
        "packages": packages,
        "git": git_state(Path(host.cwd) if host.cwd is not None else Path.cwd()),
        "switches": switches_of(host.variables(os.environ)),
    }


def _version(described: str | None) -> str | None:
    """The bare version, without the commit that `facts` adds."""
    return None if described is None else described.split(" ")[0]


_REMEDY = "Name the executable of a Python 3.11 or later, for example ENVIRONMENT/bin/python."
