"""Setup commands: `init` writes a suite, `doctor` checks the machine, `completion` prints shell completions."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorameter.commands.output import print_result, show_result
from lorameter.commands.parser import build_parser
from lorameter.errors import EXIT_INVALID, EXIT_PASS, UsageError
from lorameter.machine.doctor import examine, is_fit
from lorameter.machine.survey import survey
from lorameter.records import store
from lorameter.report.machine import describe_checks

CONFTEST = '''\
"""Makes this folder a lorameter suite: its tests replay one interleaved run."""

from lorameter.pytest_plugin import attach


def pytest_configure(config):
    """Attach the session that plans, measures and reports."""
    attach(config)
'''
TESTS = '''\
"""One test per variant and phase; select with `-k`. Run as `pytest benchmarks/ --benchmark-save=NAME`."""

import pytest


@pytest.mark.lorameter("train")
def test_train_step(replay):
    """Time of one optimizer step: forward, backward, clip, update."""
    replay()


@pytest.mark.lorameter("generate")
def test_generate_warm(replay):
    """Time of one greedy request with the trained adapter, unmerged, in a warm process."""
    replay()


@pytest.mark.lorameter("cold")
def test_cold_start(replay):
    """Time from starting an interpreter to the first completion of the trained adapter."""
    replay()
'''
FILES = {"conftest.py": CONFTEST, "test_variants.py": TESTS}
"""The text of each file of a suite."""


def run_init(options: argparse.Namespace) -> int:
    """Write the files. Raises `UsageError` if one of them exists; then none is written."""
    folder: Path = options.folder
    existing = [name for name in FILES if (folder / name).exists()]
    if existing:
        raise UsageError(f"init: {folder} already holds {' and '.join(existing)}. Give another folder, or remove them.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in FILES.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise UsageError(f"init: {folder} cannot be written: {error.strerror}. Give another folder.") from None
    wrote = f"wrote {' and '.join(str(folder / name) for name in FILES)}"
    next_step = f"next: pytest {folder} --benchmark-save=NAME"
    print_result(options, f"{wrote}\n{next_step}", {"folder": str(folder), "files": list(FILES)})
    return EXIT_PASS


def run_doctor(options: argparse.Namespace) -> int:
    """Print the checks; the exit code says whether the machine can be used for measurements."""
    checks = examine(survey(store.runs_dir(options.runs_dir)))
    fit = is_fit(checks)
    show_result(options, describe_checks(checks, fit=fit), lambda: {"fit": fit, "checks": checks})
    return EXIT_PASS if fit else EXIT_INVALID


def run_completion(options: argparse.Namespace) -> int:
    """Print the completion script for a shell."""
    import shtab

    script = shtab.complete(build_parser(), shell=options.shell)
    print_result(options, script, {"shell": options.shell, "script": script})
    return EXIT_PASS
