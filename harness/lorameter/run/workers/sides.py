"""Prepares the two sides of `lorameter ab`: each is given as one word, from which the host of its trials is made.

A word names a revision of a repository, an interpreter, or requirements. The trials must import the named code, so each
kind is checked at the end: the file that an import *would* load must be in the worktree, or in the layer of the
requirements. A side that fails the check is refused (an import hook of an editable install can take precedence over the
path): if it silently measured the code of the other side, the verdict would be `equivalent`.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from lorameter.errors import redact, refused_value, require
from lorameter.machine.provenance import run_git
from lorameter.records.fileio import is_file, scratch_folder
from lorameter.records.record import Side
from lorameter.run.plan import PRESENT, SideKind, Sides, SideSpec
from lorameter.run.workers.environment import Host, inspect, layered_environment, parse_requirements, site_packages
from lorameter.studies.protocol import HERE, Protocol
from lorameter.terminal import print_stderr

DECLARED: dict[SideKind, tuple[str, ...]] = {
    "command": (),
    "present": (),
    "revision": ("git",),
    "interpreter": ("python", "libraries", "cuda", "kernels"),
    "requirements": ("libraries", "cuda", "kernels"),  # another torch may be built for another CUDA, with another cuDNN
}
"""Fields of the provenance in which sides of each kind are expected to differ."""
OLDEST_PYTHON = (3, 11)
"""The oldest supported Python, as in requires-python of pyproject.toml: the harness runs in each side's interpreter."""
NEEDED = {"torch": "torch", "transformers": "transformers", "peft": "peft", "bitsandbytes": "bitsandbytes"}
"""Modules that the worker imports, each with its distribution."""
OWN_PACKAGES = ("lorameter", "kernels_check")

_BUILD_EACH = "Build an environment for each revision and name its Python."
_PYTHON_NAME = re.compile(r"python(\d+(\.\d+)?t?)?")
_REMEDY = (
    "Name a git revision (HEAD~1, v1.0, a commit), a Python executable (ENVIRONMENT/bin/python, python3.12) or "
    'requirements ("peft==0.19.1 transformers>=5.17").'
)


def _require(holds: object, word: str, why: str, remedy: str) -> None:
    """Raise `UsageError` for a side, named by its word, unless a condition holds."""
    if not holds:
        raise refused_value("ab", "side", word, why, remedy)


def name_sides(words: Mapping[Side, str], repository: Path, place: Protocol, *, slowdown_rows: int = 0) -> Sides:
    """The sides that a user names; they are not prepared yet.

    Args:
        words: a revision, a Python executable, or requirements in one string, by side.
        repository: a folder in the repository whose revisions can be named.
        place: where the sides will be measured.
        slowdown_rows: extra work of the candidate.

    Raises:
        UsageError: a word names nothing, an interpreter cannot be measured, or a side would differ on another machine.
    """
    sides: dict[Side, SideSpec] = {}
    for name, word in words.items():
        where = f"{place.said}, --{name} {word}"
        require(
            place.is_plain or redact(word) == word,
            f"{where}: it holds what may be a credential, and would be written into a file. Let pip find it in its "
            "configuration or a .netrc.",
        )
        here = place.on == HERE
        sides[name] = name_side(word, repository) if here else _name_remote_side(word, repository, where)
        if here and sides[name].kind == "interpreter":
            with contextlib.ExitStack() as stack:
                _inspect_interpreter(sides[name], stack)
    return sides | {"candidate": replace(sides["candidate"], slowdown_rows=slowdown_rows)}


def _name_remote_side(word: str, repository: Path, where: str) -> SideSpec:
    """A side on other machines. A revision is refused there: worktrees that several nodes make in one repository look
    abandoned to each other. An interpreter may exist there but not here."""
    if word.startswith(os.sep) and parse_requirements(word) is None:
        return SideSpec(kind="interpreter", spec=word, label=word)
    side = name_side(word, repository)
    require(
        side.kind != "revision",
        f"{where}: a revision is checked out on this machine only. Build an environment of it where all nodes see "
        "it and name the path of its Python, give requirements, or use --sites of this machine.",
    )
    require(
        side.kind != "interpreter" or os.sep in word,
        f"{where}: it may be another Python on each node. Name its path, such as {side.spec}.",
    )
    return side


def name_side(word: str, repository: Path) -> SideSpec:
    """The side that a word names.

    The first of these that exists: the path of an executable file, a revision, a Python on PATH, requirements.

    Raises:
        UsageError: the word names nothing.
    """
    _require(word.strip() and "\0" not in word, word, "it names nothing", _REMEDY)
    if os.sep in word and is_file(word) and os.access(word, os.X_OK):
        return SideSpec(kind="interpreter", spec=str(Path(word).absolute()), label=redact(word))
    # No revision contains an address, and git must not receive one, which may contain a credential.
    commit, refusal = (None, "no revision holds '://'") if "://" in word else find_commit(word, repository)
    if commit is not None:
        label = word if commit.startswith(word) else f"{word} ({commit[:9]})"
        return SideSpec(kind="revision", spec=commit, label=redact(label))
    if _PYTHON_NAME.fullmatch(word) and (program := shutil.which(word)):
        return SideSpec(kind="interpreter", spec=str(Path(program).absolute()), label=word)
    if requirements := parse_requirements(word):
        return SideSpec(kind="requirements", spec=word, label=redact(" ".join(requirements)))
    why = (
        "not an interpreter (no executable file of that path, no Python of that name on PATH), not a revision of "
        f"{repository} (git: {refusal}), and not requirements (a name without a version counts only for a package that "
        "is installed: write NAME>=0 to mean another)"
    )
    raise refused_value("ab", "side", word, why, _REMEDY)


def command_sides(base: str, candidate: str) -> Sides:
    """The sides of an A/B of two commands, which differ in nothing else."""
    return {
        "base": SideSpec(kind="command", spec=base, label=base),
        "candidate": SideSpec(kind="command", spec=candidate, label=candidate),
    }


def present_sides(slowdown_rows: int) -> Sides:
    """Both sides of a calibration: the current interpreter, and the same with extra work in the adapters."""
    label = f"the same with {slowdown_rows} rows of extra work"
    return {
        "base": SideSpec(kind=PRESENT, label="the present interpreter"),
        "candidate": SideSpec(kind=PRESENT, label=label, slowdown_rows=slowdown_rows),
    }


@contextlib.contextmanager
def open_side(
    side: SideSpec, *, repository: Path, cache: Path, report: Callable[[str], object] = print_stderr
) -> Iterator[Host]:
    """Prepare one side, and remove its temporary files at the end.

    Args:
        side: the side to prepare.
        repository: a folder in the repository whose revisions can be named.
        cache: lorameter's cache directory, for the environments of requirements.
        report: receives a line for each slow operation; default: standard error, as standard output may be a document.

    Raises:
        UsageError: the side cannot be made, lacks a library that a trial needs, or would not be the code that runs.
    """

    def report_redacted(line: str) -> None:
        report(redact(line))  # pip and git print the addresses that they received

    with contextlib.ExitStack() as stack:
        if side.kind == "revision":
            yield _revision(side, repository, stack, report_redacted)
        elif side.kind == "requirements":
            yield _requirements(side.spec, cache, stack, report_redacted)
        elif side.kind == "interpreter":
            host = _inspect_interpreter(side, stack)
            _compile(host, [str(Path(host.path[0]) / package) for package in OWN_PACKAGES])
            yield host
        else:
            yield Host()


# --- a revision -------------------------------------------------------------------------------------------------------


def find_commit(spec: str, repository: Path) -> tuple[str | None, str]:
    """The commit of a revision; else None and git's reason."""
    done = run_git(repository, "rev-parse", "--verify", "--end-of-options", f"{spec}^{{commit}}")
    if done.returncode == 0:
        return done.stdout.strip(), ""
    return None, (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("fatal: ")


def _revision(side: SideSpec, repository: Path, stack: contextlib.ExitStack, report: Callable[[str], object]) -> Host:
    spec = side.label
    tree = stack.enter_context(_worktree(side.spec, repository))
    top = Path(run_git(repository, "rev-parse", "--show-toplevel").stdout.strip()).resolve()
    roots = [tree / folder for folder in _roots(repository.resolve(), top) if (tree / folder).is_dir()]
    own = tree / "harness"  # in lorameter's own repository, which may not be the installed one
    has_own = (own / "lorameter" / "__init__.py").is_file()
    if has_own:
        roots.append(own)
    path = [str(folder) for folder in roots]
    if not has_own:
        path.append(_own_packages(stack))
    host = Host(path=tuple(path), cwd=str(tree))
    modules = {name: folder for folder in reversed(roots) for name in _modules(folder)}
    _require(
        modules,
        spec,
        "it has no Python package at its top or in src, so nothing of it would be measured",
        _BUILD_EACH,
    )
    report(f"compiling the modules of {spec}")
    _compile(host, [str(modules[name] / name) for name in modules if (modules[name] / name).is_dir()])
    origins = inspect(host, [*modules, *NEEDED, *OWN_PACKAGES]).origins
    _check_origins(spec, {name: origins[name] for name in modules}, tree)
    _check_outside_working_tree(spec, {name: origins[name] for name in (*NEEDED, *OWN_PACKAGES)}, top, tree)
    return host


@contextlib.contextmanager
def _worktree(commit: str, repository: Path) -> Iterator[Path]:
    """Check out a commit into a temporary folder. No hooks of the repository run; submodules stay empty."""
    with scratch_folder() as folder:
        run_git(repository, "worktree", "prune")  # remove the entries of killed A/Bs, whose folders are gone
        tree = folder / commit[:12]
        quiet = ("-c", f"core.hooksPath={os.devnull}", "-c", "advice.detachedHead=false")
        try:
            done = run_git(repository, *quiet, "worktree", "add", "--detach", "--quiet", str(tree), commit)
            _require(
                not done.returncode,
                commit,
                f"git could not check it out: {done.stderr.strip()}",
                "Check free disk space and `git worktree list`.",
            )
            yield tree
        finally:
            # Twice: git thinks that a worktree whose creation was killed is still in use.
            run_git(repository, "worktree", "remove", "--force", "--force", str(tree))


def _roots(repository: Path, top: Path) -> list[Path]:
    """Folders that may hold packages, relative to the top: the top, src, the current folder, and editable installs.

    Editable installs are the folders of the repository that are on the current path.
    """
    current = repository.relative_to(top) if repository.is_relative_to(top) else Path()
    usual = [Path(), Path("src"), current, current / "src"]
    installed = [Path(entry).resolve() for entry in sys.path if entry]
    return list(dict.fromkeys([*usual, *(entry.relative_to(top) for entry in installed if entry.is_relative_to(top))]))


def _check_outside_working_tree(spec: str, origins: Mapping[str, str | None], top: Path, tree: Path) -> None:
    """Raise `UsageError` if a module that a trial needs would come from the working tree instead of the revision. An
    environment inside the working tree is not part of it."""
    installed = [folder for folder in map(Path, sys.path) if folder.name in ("site-packages", "dist-packages")]
    for name, origin in origins.items():
        file = Path(origin or "").resolve()
        outside = origin is None or file.is_relative_to(tree) or not file.is_relative_to(top)
        _require(
            outside or any(file.is_relative_to(folder.resolve()) for folder in installed),
            spec,
            f"the revision has no {name} where the present installation points, and an import loads {origin}",
            _BUILD_EACH,
        )


# --- an interpreter ---------------------------------------------------------------------------------------------------


def _inspect_interpreter(side: SideSpec, stack: contextlib.ExitStack) -> Host:
    """A host of this interpreter with the current harness; all other packages are its own. Raises `UsageError` if it is
    too old or lacks a module that a trial needs.

    PYTHONSAFEPATH keeps the current folder off its path, so that its own packages are compared.
    """
    safe = {"PYTHONSAFEPATH": "1"}
    facts = inspect(Host(python=side.spec, environment=safe))
    version = tuple(int(part) for part in facts.python.split(".")[:2])
    needed = ".".join(map(str, OLDEST_PYTHON))
    _require(
        version >= OLDEST_PYTHON,
        side.label,
        f"it is Python {facts.python}, and the harness needs {needed}",
        "Name a newer interpreter.",
    )
    # The interpreter's own path: a launcher in front of it (pyenv's) would be part of every cold start.
    host = Host(python=facts.executable, path=(_own_packages(stack),), environment=safe)
    needed_modules = NEEDED | ({"pynvml": "nvidia-ml-py"} if Path("/dev/nvidiactl").exists() else {})
    origins = inspect(host, [*needed_modules]).origins
    missing = [distribution for module, distribution in needed_modules.items() if origins[module] is None]
    _require(
        not missing,
        side.label,
        f"Python {facts.python} without {', '.join(missing)}",
        f"Run `{host.python} -m pip install {' '.join(missing)}`.",
    )
    return host


def _own_packages(stack: contextlib.ExitStack) -> str:
    """A folder that holds only the current harness, and nothing else of the current environment."""
    folder = stack.enter_context(scratch_folder()) / "packages"
    folder.mkdir()
    for package in OWN_PACKAGES:
        (folder / package).symlink_to(Path(str(importlib.resources.files(package))).resolve())
    return str(folder)


# --- requirements -----------------------------------------------------------------------------------------------------


def _requirements(spec: str, cache: Path, stack: contextlib.ExitStack, report: Callable[[str], object]) -> Host:
    requirements = parse_requirements(spec) or ()
    python = layered_environment(requirements, cache, report=report)
    host = Host(python=str(python), environment={"PYTHONSAFEPATH": "1"})
    layer = site_packages(python)
    names = _modules(layer)
    facts = inspect(host, [*names, *OWN_PACKAGES])
    if any(facts.origins[package] is None for package in OWN_PACKAGES):  # run from a checkout, not installed
        host = replace(host, path=(_own_packages(stack),))
    _check_origins(spec, inspect(host, names).origins, layer)  # of the host in its final state
    _check_versions(spec, requirements, facts.packages)
    return host


def _check_versions(spec: str, requirements: tuple[str, ...], packages: dict[str, str]) -> None:
    """Raise `UsageError` if the interpreter finds another version than the required one."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    for each in map(Requirement, requirements):
        version = packages.get(canonicalize_name(each.name), "").split(" ")[0]
        _require(
            version and each.specifier.contains(version, prereleases=True),
            spec,
            f"{each} was installed, and the interpreter sees {each.name} {version or 'nowhere'}",
            "Take what is in front of it off PYTHONPATH.",
        )


# --- for all kinds ---------------------------------------------------------------------------------------------


def _modules(folder: Path) -> list[str]:
    """Top-level modules and packages in a folder, except those that only a build or a test would import."""
    names = [path.parent.name for path in folder.glob("*/__init__.py")]
    names += [path.stem for path in folder.glob("*.py")]
    skipped = {"setup", "conftest", "tests", "test", "docs", "noxfile", *sys.stdlib_module_names}
    return sorted(name for name in {*names} if name.isidentifier() and name not in skipped)


def _compile(host: Host, folders: list[str]) -> None:
    """Write bytecode once: otherwise the first process to import a fresh checkout would compile it, on one side."""
    command = [host.python, "-m", "compileall", "-qq", *folders]
    subprocess.run(command, env=host.variables(os.environ), stdin=subprocess.DEVNULL, capture_output=True, check=False)


def _check_origins(spec: str, origins: Mapping[str, str | None], root: Path) -> None:
    """Raise `UsageError` if a module of a side would not be imported from `root`."""
    for name, origin in origins.items():
        _require(
            origin is not None and Path(origin).resolve().is_relative_to(root.resolve()),
            spec,
            f"its module {name} would not be measured: an import loads {origin or 'nothing'} instead",
            "An import hook or .pth file of the present environment goes first: uninstall the editable install "
            f"that provides {name}, or give each side an interpreter of its own.",
        )
