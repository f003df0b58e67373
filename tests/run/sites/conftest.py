"""Fixtures of tests on clusters: a study that takes a second, and the time-independent parts of a record.

Checks that a run on several sites is complete.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lorameter.cli import main
from lorameter.records import store
from lorameter.run.sites import driver, gpus
from lorameter.run.workers import EXECUTORS

STUDY = """
title = "two ranks of an adapter"
[workload]
sequence_length = 32
batch_size = 2
train_sequences = 16
held_out_records = 4
held_out_sequences = 2
[protocol]
replicates = {replicates}
warmup_steps_min = 1
warmup_steps_max = 2
turns = {turns}
steps_per_turn = 2
allow_disturbed = true
phases = ["train"]
[[variant]]
name = "small"
r = 4
[[variant]]
name = "large"
r = 8
"""


@pytest.fixture
def study(tmp_path):
    """A function that writes the study and returns its path."""

    def write(*, replicates=2, turns=2):
        path = tmp_path / "small.toml"
        path.write_text(STUDY.format(replicates=replicates, turns=turns))
        return path

    return write


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """Replace this machine by one with two CPUs and a fake executor, also in jobs; returns a function that configures
    the executors of jobs."""
    folder = str(Path(__file__).parent / "pretended")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(EXECUTORS, "pretending", "pretending:Fake")
    monkeypatch.setenv("PYTHONPATH", folder, prepend=os.pathsep)
    monkeypatch.setenv("LORAMETER_EXECUTOR", "pretending")
    monkeypatch.setenv("LORAMETER_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5})
    monkeypatch.setattr(gpus, "physical_cores", lambda cpus: [(cpu,) for cpu in sorted(cpus)])
    monkeypatch.setattr(driver, "POLL_S", 0.05)
    monkeypatch.chdir(tmp_path)

    def tell(**words):
        monkeypatch.setenv("PRETENDED", json.dumps(words))

    tell()
    return tell


@pytest.fixture
def placed(study):
    """A function that writes the study with additional lines in [protocol]."""

    def write(lines, **options):
        path = study(**options)
        path.write_text(path.read_text().replace("[protocol]", f"[protocol]\n{lines}"))
        return path

    return write


@pytest.fixture
def run(pretended, capsys, tmp_path):
    """A function that runs a command and returns its exit code, the last run, and its output."""

    def command(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        runs = sorted((tmp_path / "runs").glob("*/manifest.json"), key=lambda path: path.stat().st_mtime_ns)
        last = store.read_run(str(runs[-1].parent), tmp_path / "runs") if runs else None
        return code, last, " ".join((captured.out + captured.err).split())

    return command


def sites_of_whole(run):
    """Assert that all trials of a run are ok and each replicate is on one site, and return the sites."""
    assert {record.status for record in run.records} == {"ok"}
    assert [record.trial for record in run.records] == list(run.manifest.order)
    sites = {}
    for record in run.records:
        sites.setdefault(record.replicate, set()).add(record.site)
    assert all(len(of_one) == 1 for of_one in sites.values())
    return set.union(*sites.values())
