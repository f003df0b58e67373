"""Fixtures of runs with known content, each read back like a user's."""

from __future__ import annotations

import pytest

from lorameter.records import store
from tests.constructed import RUNS


@pytest.fixture
def read():
    """A function that reads a constructed run by its name."""
    return lambda name: store.read_run(name, RUNS)


@pytest.fixture
def sound(write_run):
    """The directory of a valid run of two variants in five replicates."""
    return write_run("sound", {"plain": [1.0, 1.1, 1.2, 1.3, 1.4], "nf4": [2.0, 2.2, 2.4, 2.6, 2.8]})
