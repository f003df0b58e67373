"""Reads the results of the steps for the judges: facts, test results, documents and runs.

A result that a step did not write is missing, with the reason, and a claim that needs it is not decided.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.steps import runs_of
from lorameter.errors import LorameterError
from lorameter.records import store
from lorameter.records.store import Run


class NotSeenError(Exception):
    """The evidence of a claim is missing; the message gives the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """The outcome of a test: passed, failed or skipped, and the first line of the reason."""

    outcome: str
    why: str = ""


class Evidence:
    """The results of a campaign so far. Every method raises `NotSeenError` for a missing result."""

    def __init__(self, state: Path, journal: Journal) -> None:
        self._state = state
        self._journal = journal

    def fact(self, name: str) -> dict[str, Any]:
        """Return one fact of the probe."""
        found = self._facts.get(name)
        if found is None:
            raise NotSeenError(f"the probe has no fact {name} ({self._state_of('probe')})")
        for key in ("error", "skipped"):
            if key in found:
                raise NotSeenError(f"the probe of {name}: {found[key]}")
        return found

    def tests(self, *names: str) -> dict[str, Tested]:
        """Return tests by `FILE::NAME`, with all cases of a parametrised test."""
        found: dict[str, Tested] = {}
        for name in names:
            cases = {case: test for case, test in self._tests.items() if case == name or case.startswith(f"{name}[")}
            if not cases:
                raise NotSeenError(f"{name} has not been run")
            found |= cases
        return found

    def document(self, step: str) -> dict[str, Any]:
        """Return the JSON document that a step printed."""
        text = self._text(step)
        try:
            found = json.loads(text)
        except ValueError:
            raise NotSeenError(f"{step}: no document ({self._state_of(step)})") from None
        if not isinstance(found, dict):
            raise NotSeenError(f"{step}: its output is no document")
        return found

    def run(self, step: str) -> Run:
        """Return the newest run of a step, which may be incomplete."""
        run = newest_run(step, self._state)
        if run is None:
            raise NotSeenError(f"{step}: no run ({self._state_of(step)})")
        try:
            return store.read_run(run, runs_of(step, self._state))
        except LorameterError as error:
            raise NotSeenError(f"{step}: {error}") from None

    @cached_property
    def _facts(self) -> dict[str, dict[str, Any]]:
        return {fact["fact"]: fact for fact in self._lines("probe") if "fact" in fact}

    def _lines(self, step: str) -> Iterator[dict[str, Any]]:
        if self._journal.last(step) is None:
            return
        for line in self._text(step).splitlines():
            if line.startswith("{"):
                yield json.loads(line)

    @cached_property
    def _tests(self) -> dict[str, Tested]:
        found: dict[str, Tested] = {}
        for path in sorted((self._state / "outputs").glob("tests-*.xml")):
            if self._journal.last(path.stem) is not None:
                found |= read_tests(path)
        return found

    def _text(self, step: str) -> str:
        path = self._state / "outputs" / f"{step}.out"
        if self._journal.last(step) is None or not path.exists():
            raise NotSeenError(f"{step}: {self._state_of(step)}")
        return path.read_text(encoding="utf-8", errors="replace")

    def _state_of(self, step: str) -> str:
        last = self._journal.last(step)
        if last is None:
            return "not begun"
        return f"{last.outcome}: {last.last_line}" if last.last_line and last.outcome != "done" else last.outcome


def newest_run(step: str, state: Path) -> str | None:
    """Return the id of a step's newest run, or None."""
    folder = runs_of(step, state)
    runs = sorted(path.parent.name for path in folder.glob(f"*/{store.MANIFEST}")) if folder.is_dir() else []
    return runs[-1] if runs else None


def read_tests(path: Path) -> dict[str, Tested]:
    """Return pytest's results by `FILE::NAME`; a test whose fixture raised has failed."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        file = str(case.get("classname", "")).replace(".", "/") + ".py"
        test = Tested(outcome="passed")
        for kind, outcome in (("skipped", "skipped"), ("error", "failed"), ("failure", "failed")):
            if (element := case.find(kind)) is not None:
                test = Tested(outcome=outcome, why=_first_line(element))
        found[f"{file}::{case.get('name')}"] = test
    return found


def _first_line(element: ElementTree.Element) -> str:
    return (element.get("message") or element.text or "").strip().partition("\n")[0][:200]
