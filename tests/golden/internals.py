"""The only names from behind the doors that the golden tests know, found by name wherever they lie.

`estimate`, `run --dry-run` and `profile` look at the machine that they run on. Here that machine is a constructed one,
and a profile is read from a file in place of being measured. The function or class is looked for in the sources of
`harness`, so that a module may move without an edit here; one that is renamed fails with its name.
"""

from __future__ import annotations

import importlib
import json
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import harness

SOURCES = Path(harness.__file__).parent
MACHINE: dict[str, Any] = {
    "device": "cpu", "device_name": "AMD EPYC", "device_memory_bytes": None, "driver": None, "cuda": None,
    "cpu_model": "AMD EPYC", "cpus": 2, "memory_bytes": 25276502016, "avx512_bf16": True, "kernel": "6.0",
    "python": "3.11.7",
}  # fmt: skip
"""As the machine of the constructed runs."""
LIBRARIES = {"torch": "2.13.0+cpu", "transformers": "5.24.0"}
"""As those of the constructed runs: what a process begins with is theirs."""
FREE_BYTES = 20 * 2**30
MATRIX_RATE = 5e10


@cache
def _modules() -> dict[str, str]:
    """Source of each module by its dotted name."""
    found = {}
    for path in sorted(SOURCES.rglob("*.py")):
        parts = ("harness", *path.relative_to(SOURCES).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def found(name: str) -> Any:
    """The function or class of that name."""
    homes = [dotted for dotted, text in _modules().items() if re.search(rf"^(?:def|class) {name}\b", text, re.M)]
    assert len(homes) == 1, f"{name} is defined in {homes or 'no module'} of harness"
    return getattr(importlib.import_module(homes[0]), name)


def replace(monkeypatch: Any, name: str, value: Any) -> None:
    """Put `value` in the place of a function in every module that has it."""
    original = found(name)
    for dotted, text in _modules().items():
        if re.search(rf"\b{name}\b", text):
            module: ModuleType = importlib.import_module(dotted)  # now, or it would keep the replacement for good
            if getattr(module, name, None) is original:
                monkeypatch.setattr(module, name, value)


def on_the_constructed_machine(monkeypatch: Any) -> None:
    """Nothing is asked of the machine that this runs on, and nothing is measured."""
    machine = found("Machine")(**MACHINE)
    replace(monkeypatch, "probe_machine", lambda environment=None: machine)
    replace(monkeypatch, "library_version", LIBRARIES.get)
    replace(monkeypatch, "free_bytes", lambda machine, environment=None: FREE_BYTES)
    replace(monkeypatch, "_matrix_rate", lambda: MATRIX_RATE)


def with_profile(monkeypatch: Any, path: Path) -> None:
    """`lorameter profile` finds what stands in a file instead of measuring."""
    data = json.loads(path.read_text(encoding="utf-8"))
    profile = found("from_json")(found("Profile"), data, path.name)
    replace(monkeypatch, "profile_variant", lambda *_, **__: (profile, path.parent / path.stem))
