"""Fixtures of this folder: one real executor and its tokens, shared because of their start time."""

from __future__ import annotations

import functools

import pytest

from lorameter.run.workers.local import LocalExecutor


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of the runs and logs of `executor`."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="session")
def executor(folder):
    """A real executor that is started once."""
    local = LocalExecutor()
    local.start(folder, 1)
    local.hello()
    yield local
    local.close()


@pytest.fixture(scope="session")
def tokens_of(folder):
    """A function that returns the tokens of a workload, which are prepared once."""
    from lorameter.trial.data.tokens import prepare

    return functools.cache(lambda workload: prepare(workload, folder))
