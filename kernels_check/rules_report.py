"""Prints the rules in the order in which they are tried, with how each is known and what it was checked against."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, TypeAlias

from kernels_check.rules import GRADES, Rule, load_operator_rules, load_rules, validated_against
from kernels_check.terminal import escape_control_chars, print_stderr

SCHEMA = 1
EXIT_DONE = 0
Standing: TypeAlias = Literal["same", "other", "not installed"]

_DISTRIBUTIONS = {"cudnn": ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")}
"""Distributions that bring a library, where they have another name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryVersion:
    """What is installed here of a library that rules were validated against."""

    library: str
    validated: str
    installed: str | None
    standing: Standing


def run(arguments: argparse.Namespace) -> int:
    """``rules [--check] [--json]``: versions that differ are a notice and never an error."""
    versions = installed_versions()
    notices = version_notices(versions)
    if arguments.json:
        print(json.dumps(_document(versions, notices), allow_nan=False))
    else:
        _print(versions, rules=not arguments.check)
    for notice in notices:
        print_stderr(f"notice: {notice}")
    return EXIT_DONE


def installed_versions() -> list[LibraryVersion]:
    """Compare what is installed with what the rules were validated against.

    Builds of one release (``2.13.0+cu130``, ``2.13.0+cpu``) have the same sources, so the same names.
    """
    found = []
    for library, validated in validated_against().items():
        installed = _installed(library)
        standing: Standing = "not installed"
        if installed is not None:
            standing = "same" if installed.partition("+")[0] == validated.partition("+")[0] else "other"
        found.append(LibraryVersion(library=library, validated=validated, installed=installed, standing=standing))
    return found


def version_notices(versions: list[LibraryVersion]) -> list[str]:
    """One sentence for each library whose kernels may have been renamed since."""
    return [
        f"{one.library} {one.installed} is installed, its rules were validated against {one.validated}: kernels may "
        "have been renamed; look at what `python -m kernels_check trace` leaves unclassified"
        for one in versions
        if one.standing == "other"
    ]


def _installed(library: str) -> str | None:
    for distribution in _DISTRIBUTIONS.get(library, (library,)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def _document(versions: list[LibraryVersion], notices: list[str]) -> dict[str, object]:
    stamp = validated_against()
    return {
        "schema": SCHEMA,
        "grades": GRADES,
        "validated_against": stamp,
        "installed": {one.library: asdict(one) for one in versions},
        "rules": [_entry(rule, stamp) for rule in load_rules()],
        "operators": [_entry(rule, stamp) for rule in load_operator_rules()],
        "notices": notices,
    }


def _entry(rule: Rule, stamp: Mapping[str, str]) -> dict[str, object]:
    validated = {rule.library: stamp[rule.library]} if rule.library is not None else {}
    return asdict(rule) | {"evidence": re.findall(r"\w", rule.evidence), "validated_against": validated}


def _described(rule: Rule, stamp: Mapping[str, str]) -> str:
    """Category, evidence, and on what it was validated, in one line; a table of seven columns fits no terminal."""
    where = "GPU only" if rule.gpu_only else "CPU and GPU"
    against = f" · {rule.library} {stamp[rule.library]}" if rule.library is not None else ""
    return f"· {rule.category} · evidence {rule.evidence} · {where}{against}"


def _print(versions: list[LibraryVersion], *, rules: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    stamp = validated_against()
    if rules:
        for title, ordered in (("Kernels", load_rules()), ("Operators on the host", load_operator_rules())):
            console.print(f"[bold]{title}[/bold]: the first rule that matches wins")
            for number, rule in enumerate(ordered, start=1):
                console.print(f"{number:3} [bold]{rule.name}[/bold] {_described(rule, stamp)}", soft_wrap=True)
                console.print(f"    {rule.meaning}", soft_wrap=True, markup=False)
                console.print(f"    {rule.pattern}", soft_wrap=True, markup=False, style="dim")
        grades = ", ".join(f"{letter} {meaning}" for letter, meaning in GRADES.items())
        console.print(f"evidence: {grades}; no library: known from published traces only")
    table = Table(title="Libraries", title_justify="left")
    for heading in ("library", "validated against", "installed", ""):
        table.add_column(heading)
    for one in versions:
        table.add_row(one.library, one.validated, escape_control_chars(one.installed or "-"), one.standing)
    console.print(table)
