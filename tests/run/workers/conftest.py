"""One real executor for the tests of this folder and the tokens that it has made: their starts are what costs."""

from __future__ import annotations

import pytest

from lorameter.run.workers.local import LocalExecutor


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """That of the runs of `executor`; their logs lie in it."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="session")
def executor(folder):
    """Started once."""
    local = LocalExecutor()
    local.start(folder, 1)
    local.hello()
    yield local
    local.close()


@pytest.fixture(scope="session")
def tokens_of(executor):
    """A function that gives the tokens of a workload; for each they are made once, in a process of their own."""
    prepared = {}

    def tokens(workload):
        if workload not in prepared:
            prepared[workload] = executor.prepare_tokens(workload)
        return prepared[workload]

    return tokens
