"""Loads the proof programs by path, since they are scripts that import neighbouring modules."""

import importlib.util
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parents[2] / "benchmarks" / "selftest"


@pytest.fixture
def program(monkeypatch):
    """Load a program by its name, with its folder on the path while the test runs."""
    monkeypatch.syspath_prepend(PROGRAMS)

    def load(name):
        spec = importlib.util.spec_from_file_location(f"selftest_{name}", PROGRAMS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load
