"""Commands around measuring: `init` writes a suite, `doctor` checks the machine, `completion` completes commands."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorameter.commands.output import print_json
from lorameter.errors import EXIT_INVALID, EXIT_PASS, UsageError
from lorameter.machine.doctor import examine, is_fit
from lorameter.machine.survey import survey
from lorameter.records import codec, store
from lorameter.report.machine import describe_checks
from lorameter.report.terminal import console_for, show

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
    """Write the files. Raises `UsageError` where one of them exists; then none is written."""
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
    if options.json:
        print_json({"folder": str(folder), "files": list(FILES)})
    else:
        print(f"wrote {' and '.join(str(folder / name) for name in FILES)}")
        print(f"next: pytest {folder} --benchmark-save=NAME")
    return EXIT_PASS


def run_doctor(options: argparse.Namespace) -> int:
    """Print what was found; the exit code says whether anything may be measured here."""
    checks = examine(survey(store.runs_dir(options.runs_dir)))
    fit = is_fit(checks)
    if options.json:
        print_json({"fit": fit, "checks": [codec.to_json(check) for check in checks]})
    else:
        show(describe_checks(checks, fit=fit), console_for())
    return EXIT_PASS if fit else EXIT_INVALID


def run_completion(options: argparse.Namespace) -> int:
    """Print the script for a shell; `options.top` is the parser of all commands."""
    import shtab

    script = shtab.complete(options.top, shell=options.shell)
    if options.json:
        print_json({"shell": options.shell, "script": script})
    else:
        print(script)
    return EXIT_PASS
