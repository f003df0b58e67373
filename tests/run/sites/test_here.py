"""Replicates on two shares of this machine's CPUs, with real trials (make proof-long)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorameter.records import store
from tests.run.sites.wholeness import sites_of_whole

pytestmark = [pytest.mark.selftest, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[3]


def run(*arguments, runs):
    """The run that the command has measured."""
    words = [sys.executable, "-m", "lorameter.cli", "run", *map(str, arguments), "--runs-dir", str(runs), "--json"]
    ways = os.pathsep.join(filter(None, [str(ROOT / "harness"), str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"PYTHONPATH": ways}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = (one for one in runs.iterdir() if one.is_dir())
    return store.read_run(str(path), runs)


def test_records_of_two_sites_are_those_of_one_device(study, results_of, tmp_path):
    """Each replicate is on one and neither is left out; seeds, orders and losses are the same to the bit."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this machine has one CPU, and two sites of it take two")
    spread, alone = run(study(), "--sites", "0,1", runs=tmp_path / "there"), run(study(), runs=tmp_path / "here")
    assert len(sites_of_whole(spread)) == 2
    assert [results_of(record) for record in spread.records] == [results_of(record) for record in alone.records]
    assert spread.manifest.fingerprint == alone.manifest.fingerprint
    assert spread.manifest.tokens == alone.manifest.tokens
