"""The interpreter and environment of a measuring process, its installed packages, and environments for requirements.

The two sides of an A/B differ only in their host: both start the same command lines. A separate process reads the
packages of a host with a script that uses only the standard library (`lorameter.machine.describe_env`), so that it
works in an interpreter without lorameter and does not import torch.

A side of an A/B with another version of a library must not change the current environment. So its requirements are
installed into a virtual environment whose path continues into the current environment: the requirements and their
dependencies come first, and everything else (torch is gigabytes) is shared. Such a layer is made once for the same
requirements on the same environment; like the models in the cache, it is complete or absent.
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

from lorameter.errors import HIDDEN, InvalidRunError, UsageError, refused_value, require, shorten
from lorameter.machine import describe_env
from lorameter.machine.processes import kill_group
from lorameter.machine.provenance import LIBRARIES, built_cuda_version, git_state, kernel_switches, library_version
from lorameter.records.fileio import hold_lock
from lorameter.records.os_errors import extract_os_error

ANSWER_TIMEOUT_S = 120.0
"""Reading the metadata of 100 distributions takes 0.1 s, and up to a minute from a cold network disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The interpreter of a zygote, a cold start and a token process. The default is the current one."""

    python: str = field(default_factory=lambda: sys.executable)
    """Absolute path of the executable, without resolving links: the python of a virtual environment is a link."""
    path: tuple[str, ...] = ()
    """Folders at the front of PYTHONPATH, so before everything installed, including editable installs."""
    cwd: str | None = None
    """Working folder of the processes, which `python -m` puts first on the path; None: that of the parent."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables in addition to those of the parent."""

    def variables(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The inherited environment with this host's variables and path."""
        variables = {**inherited, **self.environment}
        in_front = [*self.path, *filter(None, [variables.get("PYTHONPATH")])]
        return variables | ({"PYTHONPATH": os.pathsep.join(in_front)} if in_front else {})


class InterpreterFacts(msgspec.Struct, frozen=True):
    """Installed packages of an interpreter, as printed by `lorameter.machine.describe_env`."""

    python: Annotated[str, msgspec.Meta(pattern=r"^\d+\.\d+")]
    executable: str
    packages: dict[str, str]
    """Normalised distribution names and versions."""
    origins: dict[str, str | None]
    """The file that an import of each module would load, or None."""


def inspect(host: Host, modules: Sequence[str] = ()) -> InterpreterFacts:
    """The packages of an interpreter, and the files from which it would import some modules, without importing them.

    Raises:
        UsageError: the program cannot be started, or is not a suitable Python.
    """
    script = Path(describe_env.__file__).read_text(encoding="utf-8")
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
        raise refused_value("interpreter", "python", host.python, f"it does not answer: {error}", _REMEDY) from None
    printed = process.stdout.decode(errors="replace")
    for line in reversed(printed.splitlines() if process.returncode == 0 else []):
        with contextlib.suppress(msgspec.MsgspecError):
            return msgspec.json.decode(line, type=InterpreterFacts)
    output = shorten((printed.strip() or "nothing").splitlines()[-1])
    why = f"no Python that can be asked what it has installed; it printed: {output}"
    raise refused_value("interpreter", "python", host.python, why, _REMEDY)


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
        "cuda": None if torch is None else built_cuda_version(Path(torch).parent),
        "packages": facts.packages,
        "git": git_state(Path(host.cwd) if host.cwd is not None else Path.cwd()),
        "switches": kernel_switches(host.variables(os.environ)),
    }


_REMEDY = "Name the executable of a Python 3.11 or later, for example ENVIRONMENT/bin/python."


_PIP_DESTINATIONS = ("PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_ROOT", "PYTHONPATH", "PYTHONHOME")
"""Variables that would make pip install or search elsewhere than in the layer."""


def parse_requirements(text: str) -> tuple[str, ...] | None:
    """Parse requirements on one line in the form of PEP 508, sorted; None if the text is not such a line.

    Spaces separate requirements, and are allowed around a comparison and an `@`. A name alone is accepted only if
    lorameter knows the library or it is installed: every mistyped word looks like a name, and installing an unrelated
    package for it would be worse than refusing.
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


def restore_spec(whose: str, spec: str) -> str:
    """The word of a side of a run to resume. Its record omits credentials: an address in requirements has no user, whom
    pip may know from ~/.netrc, a keyring or an index of the same host.

    Args:
        whose: names the side in an error message.
        spec: the recorded word.

    Raises:
        UsageError: the record omits something other than a user.
    """
    restored = spec.replace(f"://{HIDDEN}@", "://")
    require(
        HIDDEN not in restored,
        f"{whose}: {spec}: a part of it was left out of the record as a credential. Measure a new A/B.",
    )
    return restored


def layered_environment(requirements: Sequence[str], cache: Path, *, report: Callable[[str], object]) -> Path:
    """The interpreter of an environment with these requirements on top of the current one, which is made if needed.

    pip's own configuration and PIP_* variables apply. Concurrent calls in several processes wait for each other.

    Args:
        requirements: the result of `parse_requirements`.
        cache: lorameter's cache directory; the layer is `environments/KEY` in it.
        report: receives a line for each step, and the output of pip.

    Raises:
        UsageError: the environment cannot be made, or pip fails; the message has pip's last lines.
        InvalidRunError: a system limit is reached, for example the disk is full.
    """
    present = sorted(f"{each.metadata['Name']}=={each.version}" for each in importlib.metadata.distributions())
    parts = [sorted(requirements), sys.version, sys.executable, present, _present_folders()]  # determine the layer
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    target = (cache / "environments" / key).absolute()
    with hold_lock(target, "waiting for another process that is making the same environment", report):
        if not target.is_dir():
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # left over from a killed install; the lock shows that none runs
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


def _present_folders() -> list[str]:
    """The folders of installed packages in the current environment, in path order."""
    known = {*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])}
    return [folder for folder in sys.path if folder in known]


def _build(requirements: Sequence[str], out: Path, report: Callable[[str], object]) -> None:
    """Make the environment in `out`. It is only used through its path, so renaming it afterwards is safe."""
    report(f"making an environment with {' '.join(requirements)}")
    # Looked up by path only: the finder of setuptools mistakes a query about pip for an import of pip, and permanently
    # removes its distutils from this process. A later import of setuptools then fails.
    shared_pip = ["--without-pip"] if PathFinder.find_spec("pip", _present_folders()) else []
    _run([sys.executable, "-m", "venv", *shared_pip, str(out)], requirements, lambda line: None)
    python = out / "bin" / "python"
    # Unlike a line with a path, addsitedir processes the .pth files there, so editable installs keep working.
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in _present_folders()]
    (site_packages(python) / "_lorameter_layer.pth").write_text("".join(lines), encoding="utf-8")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    # In a private file and not on the command line: addresses may contain credentials.
    listed = out / "requirements.txt"
    listed.touch(mode=0o600)
    listed.write_text("".join(f"{each}\n" for each in requirements), encoding="utf-8")
    _run([*pip, "--requirement", str(listed)], requirements, report)
    listed.unlink()


def _run(command: Sequence[str], requirements: Sequence[str], report: Callable[[str], object]) -> None:
    """Run venv or pip and report its output; it is killed when this process is interrupted."""
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
            kill_group(process.pid)  # including processes that build a package for it
            raise
    if not process.returncode:
        return
    failed = f"ab: an environment with {' '.join(requirements)} could not be made"
    if refusal := extract_os_error("\n".join(last)):
        raise InvalidRunError(f"{failed}: {refusal}, or where temporary files are made (TMPDIR). Nothing was kept.")
    raise UsageError(
        f"{failed}: {' / '.join(last) or 'no message'}. Nothing was kept; check the names and versions, the connection "
        "and the index that pip is configured to use (PIP_INDEX_URL, PIP_FIND_LINKS)."
    )
