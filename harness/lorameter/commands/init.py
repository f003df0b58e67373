"""Writes the two files that make a folder a benchmark suite: `init`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lorameter.errors import EXIT_PASS, UsageError

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


def add_commands(commands: Any, common: Any) -> None:
    """The parser of this command; `common` adds the options that every command has."""
    init = commands.add_parser(
        "init",
        help="write the conftest.py and test_variants.py of a benchmark suite",
        description="Write the two files that make a folder a benchmark suite for pytest. Existing files are kept.",
    )
    init.add_argument(
        "folder", metavar="DIR", nargs="?", type=Path, default=Path("benchmarks"), help="default: benchmarks"
    )
    common(init)
    init.set_defaults(command=run_init)


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
        from lorameter.commands.output import print_json

        print_json({"folder": str(folder), "files": list(FILES)})
    else:
        print(f"wrote {' and '.join(str(folder / name) for name in FILES)}")
        print(f"next: pytest {folder} --benchmark-save=NAME")
    return EXIT_PASS
