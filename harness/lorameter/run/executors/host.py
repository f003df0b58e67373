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
from functools import partial
from pathlib import Path
from typing import Any

from kernels_check.terminal import print_stderr
from lorameter.errors import UsageError, impossible, shorten
from lorameter.machine.kernel_env import switches_of
from lorameter.machine.provenance import LIBRARIES
from lorameter.machine.repository import git_state
from lorameter.machine.software import cuda_of
from lorameter.records import codec
from lorameter.run.executors.answer import run_one_shot

_VERSION = re.compile(r"\d+\.\d+", re.ASCII)
ANSWER_TIMEOUT_S = 120.0
"""Reading the metadata of 100 distributions takes 0.1 s; a cold network disk can make it a minute."""
ANSWER_BYTES = 1 << 20
"""A thousand distributions take 40 kB; what says more is no Python."""


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
    script = Path(__file__).with_name("describe_env.py").read_text(encoding="utf-8")
    try:
        with subprocess.Popen(
            [host.python, "-c", script, json.dumps(list(modules))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=host.variables(os.environ),
            cwd=host.cwd,
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            tell_waiting = partial(print_stderr, f"waiting for {host.python}, for {ANSWER_TIMEOUT_S:g} s at most")
            printed = run_one_shot(
                process, b"", process.stdout, ANSWER_TIMEOUT_S, most_bytes=ANSWER_BYTES, overdue=tell_waiting
            ).decode(errors="replace")
    except (OSError, TimeoutError) as error:
        said = str(error) or f"nothing within {ANSWER_TIMEOUT_S:g} s"
        raise impossible("interpreter", "python", host.python, f"it does not answer: {said}", _REMEDY) from None
    answer = read_answer(printed) if process.returncode == 0 else None
    if answer is None:
        lines = (printed.strip() or "nothing").splitlines()
        said = shorten(lines[-1 if "Traceback" in lines[0] else 0])
        why = f"no Python that can be asked what it has installed; it said: {said}"
        raise impossible("interpreter", "python", host.python, why, _REMEDY)
    return answer


def read_answer(printed: str) -> dict[str, Any] | None:
    """What an interpreter says of itself: the last line of what it printed that reads so; None where none does."""
    return next(filter(None, map(_answer_in, reversed(printed.splitlines()))), None)


def _answer_in(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        answer: dict[str, Any] = codec.parse(line)
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
