"""The interpreter and environment that a measuring process runs in: where it is, what it has installed, and
environments made for requirements.

The two sides of an A/B differ in their host and in nothing else: the same command lines are started in both. What a
host has installed is read by a process of its own, which runs a script of the standard library only
(`describe_env.py`), so that it works in an interpreter without lorameter and nothing imports torch.

A side of an A/B that is another version of a library must not change what is installed. So its requirements go into a
virtual environment whose path continues into the present environment: the requirements, and what pip installs with
them, come first, and everything else (torch is gigabytes) is shared. The layer is made once for the same requirements
on the same present environment; like the models in the cache it is whole or absent.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any

import msgspec

from lorameter.errors import HIDDEN, InvalidRunError, UsageError, impossible, shorten
from lorameter.machine.processes import kill_group
from lorameter.machine.provenance import LIBRARIES, library_version
from lorameter.machine.repository import git_state
from lorameter.machine.software import cuda_of, switches_of
from lorameter.records.locks import locked
from lorameter.records.os_errors import refusal_said

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
    """Variables in addition to those of the parent."""

    def command(self, module: str, *arguments: str) -> list[str]:
        """The command line that runs a module in this interpreter."""
        return [self.python, "-m", module, *arguments]

    def variables(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The inherited environment with this host's variables and path."""
        variables = {**inherited, **self.environment}
        in_front = [*self.path, *filter(None, [variables.get("PYTHONPATH")])]
        return variables | ({"PYTHONPATH": os.pathsep.join(in_front)} if in_front else {})


class InterpreterFacts(msgspec.Struct, frozen=True):
    """Installed packages of an interpreter, as `describe_env.py` prints them."""

    python: Annotated[str, msgspec.Meta(pattern=r"^\d+\.\d+")]
    executable: str
    packages: dict[str, str]
    """Normalised distribution names and versions."""
    origins: dict[str, str | None]
    """The file that an import of each module would load, or None."""


def inspect(host: Host, modules: Sequence[str] = ()) -> InterpreterFacts:
    """The packages of an interpreter, and the files from which it would import some modules. None is imported.

    Raises:
        UsageError: the program cannot be started, or is no Python that can run this.
    """
    script = Path(__file__).with_name("describe_env.py").read_text(encoding="utf-8")
    try:
        process = subprocess.run(
            [host.python, "-c", script, json.dumps(list(modules))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=host.variables(os.environ),
            cwd=host.cwd,
            timeout=ANSWER_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise impossible("interpreter", "python", host.python, f"it does not answer: {error}", _REMEDY) from None
    printed = process.stdout.decode(errors="replace")
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
        # without the commit that the script adds
        "libraries": {
            name: facts.packages[name].split(" ")[0] if name in facts.packages else None for name in LIBRARIES
        },
        "cuda": None if torch is None else cuda_of(Path(torch).parent),
        "packages": facts.packages,
        "git": git_state(Path(host.cwd) if host.cwd is not None else Path.cwd()),
        "switches": switches_of(host.variables(os.environ)),
    }


_REMEDY = "Name the executable of a Python 3.11 or later, for example ENVIRONMENT/bin/python."


_LAYER_FILE = "_lorameter_layer.pth"
_PIP_DESTINATIONS = ("PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_ROOT", "PYTHONPATH", "PYTHONHOME")
"""Variables that would have pip install, or look, somewhere else than in the layer."""


def parse_requirements(text: str) -> tuple[str, ...] | None:
    """The requirements of one line in PEP 508's form, sorted; None if it is no such line.

    Spaces separate requirements, and may stand around a comparison and an `@`. A name alone counts only if it is a
    library that lorameter knows or that is installed: any mistyped word has the form of a name, and installing a
    stranger's package for it would be worse than refusing.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    text = re.sub(r"\s*(===|==|~=|!=|>=|<=|<|>|,)\s*", r"\1", text)
    text = re.sub(r"\s+@\s+", "@", text)
    try:
        requirements = [Requirement(word) for word in text.split()]
    except InvalidRequirement:
        return None
    for each in requirements:
        named_only = not each.specifier and each.url is None
        if named_only and each.name not in LIBRARIES and library_version(each.name) is None:
            return None
    return tuple(sorted(str(each) for each in requirements)) or None


def restore_requirements(whose: str, requirements: str) -> str:
    """Requirements of a run that is resumed, whose record leaves credentials out: an address without its user, which
    pip may know from ~/.netrc, a keyring or an index of the same host.

    Args:
        whose: names them in a refusal.
        requirements: as they were recorded.

    Raises:
        UsageError: something else than a user was left out.
    """
    restored = requirements.replace(f"://{HIDDEN}@", "://")
    if HIDDEN in restored:
        raise UsageError(
            f"{whose}: {requirements}: a part of it was left out of the record as a credential, so it cannot be "
            "installed again. Measure a new A/B."
        )
    return restored


def layered_environment(requirements: Sequence[str], cache: Path, *, report: Callable[[str], object]) -> Path:
    """The interpreter of an environment with these requirements on top of the present one; made if it is not there.

    pip's own configuration and PIP_* variables apply. Processes that ask at the same time wait for one another.

    Args:
        requirements: as from `parse_requirements`.
        cache: lorameter's cache directory; the layer is `environments/KEY` in it.
        report: gets a line for each step, and pip's own lines.

    Raises:
        UsageError: the environment cannot be made, or pip fails; with pip's last lines.
        InvalidRunError: because of what the system refuses, as where the disk is full.
    """
    target = (cache / "environments" / _key(requirements)).absolute()
    with locked(target, "waiting for another process that is making the same environment", report):
        if not target.is_dir():
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # what a killed install left; the lock says that none is running
            try:
                _build(requirements, partial, report)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target / "bin" / "python"


def site_packages(python: Path) -> Path:
    """The folder of a layer's own packages."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return python.parent.parent / "lib" / version / "site-packages"


def _key(requirements: Sequence[str]) -> str:
    """A hash of what the layer depends on: the requirements, the interpreter, and what is installed beneath."""
    present = sorted(f"{each.metadata['Name']}=={each.version}" for each in importlib.metadata.distributions())
    parts = [sorted(requirements), sys.version, sys.executable, present, _present_folders()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _present_folders() -> list[str]:
    """The present environment's folders of installed packages, in the order of its path."""
    known = {*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])}
    return [folder for folder in sys.path if folder in known]


def _build(requirements: Sequence[str], out: Path, report: Callable[[str], object]) -> None:
    """Make the environment in `out`. It is run by its path only, so renaming it afterwards does no harm."""
    report(f"making an environment with {' '.join(requirements)}")
    # Asked of the path alone: the finder that setuptools installs takes a question about pip for an import of pip, and
    # withdraws its distutils from this process for good. An import of setuptools then fails.
    shared_pip = ["--without-pip"] if PathFinder.find_spec("pip", _present_folders()) else []
    _run([sys.executable, "-m", "venv", *shared_pip, str(out)], requirements, lambda line: None)
    python = out / "bin" / "python"
    # addsitedir, unlike a line with a path, processes the .pth files there: editable installs go on working.
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in _present_folders()]
    (site_packages(python) / _LAYER_FILE).write_text("".join(lines), encoding="utf-8")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    # In a file that no other user can read, and not on the command line: addresses may hold credentials.
    listed = out / "requirements.txt"
    listed.touch(mode=0o600)
    listed.write_text("".join(f"{each}\n" for each in requirements), encoding="utf-8")
    _run([*pip, "--requirement", str(listed)], requirements, report)
    listed.unlink()


def _run(command: Sequence[str], requirements: Sequence[str], report: Callable[[str], object]) -> None:
    """Run venv or pip and hand on its lines; it is killed when this process is interrupted."""
    last: collections.deque[str] = collections.deque(maxlen=4)
    environment = {name: value for name, value in os.environ.items() if name not in _PIP_DESTINATIONS}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", env=environment, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            for line in map(str.strip, process.stdout):
                if line and "Requirement already satisfied" not in line:
                    last.append(line)
                    report(line)
        except BaseException:
            kill_group(process.pid)  # with what builds a package for it
            raise
    if not process.returncode:
        return
    failed = f"ab: an environment with {' '.join(requirements)} could not be made"
    if refusal := refusal_said("\n".join(last)):
        raise InvalidRunError(f"{failed}: {refusal}, or where temporary files are made (TMPDIR). Nothing was kept.")
    raise UsageError(
        f"{failed}: {' / '.join(last) or 'no message'}. Nothing was kept; check the names and versions, the connection "
        "and the index that pip is configured to use (PIP_INDEX_URL, PIP_FIND_LINKS)."
    )
