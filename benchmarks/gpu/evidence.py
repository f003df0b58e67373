"""Reads the results of the steps for the judges: test results, documents and runs.

A result that a step did not write is missing, with the reason, and a claim that needs it is not decided.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.steps import run_folder
from lorameter.errors import LorameterError
from lorameter.records import store
from lorameter.records.store import Run


class MissingEvidenceError(Exception):
    """The evidence of a claim is missing; the message gives the reason."""


class TestResult(NamedTuple):
    """The outcome of a test: passed, failed or skipped, and the first line of the reason."""

    outcome: str
    reason: str


class Evidence:
    """The results of a campaign so far. Every method raises `MissingEvidenceError` for a missing result."""

    def __init__(self, state: Path, journal: Journal) -> None:
        self._state = state
        self._journal = journal

    def tests(self, name: str) -> dict[str, TestResult]:
        """Return all cases of the test `FILE::NAME`."""
        found = {case: test for case, test in self._tests.items() if case == name or case.startswith(f"{name}[")}
        if not found:
            raise MissingEvidenceError(f"{name} has not been run")
        return found

    def document(self, step: str, key: str) -> Any:
        """Return the value of a key in the JSON document that a step printed; a rehearsal may print other keys."""
        if self._journal.last(step) is None:
            raise MissingEvidenceError(f"{step}: not begun")
        path = self._state / "outputs" / f"{step}.out"
        try:
            found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        except (OSError, ValueError):
            raise MissingEvidenceError(f"{step}: no document ({self._describe_state(step)})") from None
        if key not in found:
            raise MissingEvidenceError(f"{step}: its document has no {key}")
        return found[key]

    def run(self, step: str) -> Run:
        """Return the newest run of a step, which may be incomplete."""
        run = newest_run(step, self._state)
        if run is None:
            raise MissingEvidenceError(f"{step}: no run ({self._describe_state(step)})")
        try:
            return store.read_run(run, run_folder(step, self._state))
        except LorameterError as error:
            raise MissingEvidenceError(f"{step}: {error}") from None

    @cached_property
    def _tests(self) -> dict[str, TestResult]:
        found: dict[str, TestResult] = {}
        for path in sorted((self._state / "outputs").glob("tests-*.xml")):
            if self._journal.last(path.stem) is not None:
                found |= read_test_results(path)
        return found

    def _describe_state(self, step: str) -> str:
        last = self._journal.last(step)
        if last is None:
            return "not begun"
        return f"{last.outcome}: {last.last_line}" if last.last_line and last.outcome != "done" else last.outcome


def newest_run(step: str, state: Path) -> str | None:
    """Return the id of a step's newest run, or None."""
    return max((path.parent.name for path in run_folder(step, state).glob(f"*/{store.MANIFEST}")), default=None)


def read_test_results(path: Path) -> dict[str, TestResult]:
    """Return pytest's results by `FILE::NAME`; a test whose fixture raised has failed."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        file = str(case.get("classname", "")).replace(".", "/") + ".py"
        test = TestResult("passed", "")
        for kind, outcome in (("skipped", "skipped"), ("error", "failed"), ("failure", "failed")):
            if (element := case.find(kind)) is not None:
                message = (element.get("message") or element.text or "").strip()
                test = TestResult(outcome, message.partition("\n")[0][:200])
        found[f"{file}::{case.get('name')}"] = test
    return found
