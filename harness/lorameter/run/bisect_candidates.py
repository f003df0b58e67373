"""What lies between a good and a bad end, in order: commits of a repository, or releases of a package.

Commits are those of the bad end's first parents: each is a state that the branch was in. Releases are asked of pip, so
that its index and its configuration are those of whoever installs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lorameter.errors import UsageError, redact
from lorameter.machine.provenance import probe_machine
from lorameter.machine.repository import run_git
from lorameter.records import codec, store
from lorameter.records.store import Run
from lorameter.run.arms import variants_of
from lorameter.run.bisect import Candidate
from lorameter.run.executors.environments import parse_requirements
from lorameter.run.plan import Plan

if TYPE_CHECKING:
    from packaging.version import Version

PIP_TIMEOUT_S = 120.0
MOST = 4096
"""Steps between the ends; more are two ends that have little to do with each other."""


def list_steps(good: str, bad: str, repository: Path) -> tuple[Candidate, ...]:
    """The good end, what lies between, and the bad end.

    Args:
        good: a git revision, or requirements such as "peft==0.19.0".
        bad: of the same kind, later.
        repository: a folder in the repository whose revisions are meant.

    Raises:
        UsageError: the ends are not of one kind, not in order, or nothing is known of what lies between.
    """
    commits = [_commit(word, repository) for word in (good, bad)]
    if all(commits):
        return _revisions(good, bad, commits[0], commits[1], repository)
    requirements = [parse_requirements(word) for word in (good, bad)]
    if requirements[0] and requirements[1]:
        return _releases(requirements[0], requirements[1])
    unknown = good if not (commits[0] or requirements[0]) else bad
    raise UsageError(
        f"bisect: --good {good!r} and --bad {bad!r}: {unknown!r} is no revision of {repository}, and no requirement of "
        "an exact version. Name two commits, or two releases of one package as in peft==0.19.0."
    )


def find_measured(plan: Plan, sides: tuple[str, str], runs: Path) -> Run | None:
    """The newest A/B of this plan and these sides, base and candidate, that is whole and of this machine; None of none.

    Args:
        plan: as it would be measured now.
        sides: the words by which both are known: commits, or requirements.
        runs: the folder of runs; what cannot be read there is none.
    """
    asked = (codec.to_json(plan.study), plan.phases, tuple(variant.name for variant in variants_of(plan.contenders)))
    device = probe_machine().device_name
    for path in reversed(store.list_runs(runs)):
        try:
            manifest = store.read_manifest(path)
        except UsageError:
            continue
        held = (manifest.study, tuple(manifest.phases), manifest.selection)
        specs = tuple(manifest.sides.get(name, {}).get("spec") for name in ("base", "candidate"))
        here = manifest.provenance.get("device_name") == device
        if manifest.status == "complete" and here and specs == sides and held == asked:
            return store.read_run(str(path), runs)
    return None


def _commit(word: str, repository: Path) -> str:
    done = run_git(repository, "rev-parse", "--verify", "--end-of-options", f"{word}^{{commit}}")
    return done.stdout.strip() if done.returncode == 0 else ""


def _revisions(good: str, bad: str, first: str, last: str, repository: Path) -> tuple[Candidate, ...]:
    if first == last:
        raise UsageError(f"bisect: {good} and {bad} are the same commit. Name two.")
    if run_git(repository, "merge-base", "--is-ancestor", first, last).returncode:
        raise UsageError(f"bisect: {good} is no ancestor of {bad}. Name a good end that the bad one was made from.")
    words = ("--reverse", "--first-parent", "--format=%H %h %s", f"--max-count={MOST + 1}")
    listed = run_git(repository, "log", *words, f"{first}..{last}")
    lines = listed.stdout.splitlines()
    if listed.returncode or not lines:
        raise UsageError(f"bisect: git lists nothing between {good} and {bad}: {listed.stderr.strip()}.")
    if len(lines) > MOST:
        raise UsageError(f"bisect: more than {MOST} commits lie between {good} and {bad}. Name nearer ends.")
    steps = [line.split(" ", 1) for line in lines]
    candidates = (Candidate(spec=commit, label=redact(label)) for commit, label in steps)
    return (Candidate(spec=first, label=f"{good} ({first[:9]})"), *candidates)


def _releases(good: tuple[str, ...], bad: tuple[str, ...]) -> tuple[Candidate, ...]:
    differing = [(one, other) for one, other in zip(sorted(good), sorted(bad), strict=False) if one != other]
    if len(good) != len(bad) or len(differing) != 1:
        said = f"{' '.join(good)} and {' '.join(bad)}"
        raise UsageError(f"bisect: {said} must differ in the version of one package. Name two of its releases.")
    (name, first), (other, last) = (_exact(word) for word in differing[0])
    if name != other or first >= last:
        raise UsageError(
            f"bisect: {' and '.join(differing[0])} are not two releases of one package in order. "
            "The good one comes first."
        )
    between = [version for version in _versions(name, first, last) if first < version < last]
    others = [word for word in good if word != differing[0][0]]
    return tuple(
        Candidate(spec=" ".join([f"{name}=={version}", *others]), label=f"{name} {version}")
        for version in (first, *between, last)
    )


def _exact(word: str) -> tuple[str, Version]:
    """The package and the version of `NAME==VERSION`."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version

    asked = Requirement(word)
    pinned = [one for one in asked.specifier if one.operator == "==" and not one.version.endswith("*")]
    if len(pinned) != 1 or len(asked.specifier) != 1 or asked.extras or asked.marker or asked.url:
        raise UsageError(f"bisect: {word}: an exact version is needed. Write {asked.name}==VERSION.")
    try:
        return canonicalize_name(asked.name), Version(pinned[0].version)
    except InvalidVersion:
        raise UsageError(f"bisect: {word}: no version that can be put in order. Name a release.") from None


def _versions(name: str, first: Version, last: Version) -> list[Version]:
    """The releases that pip's index has, in order; those before a release only where an end is one."""
    from packaging.version import InvalidVersion, Version

    pre = ["--pre"] if first.is_prerelease or last.is_prerelease else []
    command = [
        sys.executable,
        "-m",
        "pip",
        "index",
        "versions",
        name,
        *pre,
        "--disable-pip-version-check",
        "--no-input",
    ]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=PIP_TIMEOUT_S,
            check=False, start_new_session=True,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"bisect: pip cannot list the releases of {name}: {error}. Check its index.") from None
    prefix = "Available versions:"
    listed = next((line.removeprefix(prefix) for line in done.stdout.splitlines() if line.startswith(prefix)), None)
    if done.returncode or listed is None:
        said = redact((done.stderr.strip().splitlines() or ["it says nothing"])[-1])
        raise UsageError(f"bisect: pip cannot list the releases of {name}: {said}. Check the name and its index.")
    found: list[Version] = []
    for word in listed.split(","):
        try:
            found.append(Version(word.strip()))
        except InvalidVersion:  # of before versions had a form
            continue
    return sorted(found)
