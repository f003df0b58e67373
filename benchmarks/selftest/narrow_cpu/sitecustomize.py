"""With this folder on PYTHONPATH, every process that starts sees a CPU without AVX512-BF16 where bitsandbytes looks.

bitsandbytes then never repacks 4-bit weights, as on most CPUs. It asks its native library, which asks the CPU itself,
so no variable reaches it; `portable.py` plants the answer this way, in child processes too. Whatever other
`sitecustomize` would have run runs after this one.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ASKED = "bitsandbytes.functional"
"""The module whose `has_avx512bf16` all others import."""


class NarrowLoader(importlib.abc.Loader):
    """Loads as the loader does that it wraps, and then plants the answer."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As ever."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """A release of bitsandbytes that asks by another name must not pass for planted."""
        self._loader.exec_module(module)
        if not hasattr(module, "has_avx512bf16"):
            raise AttributeError(f"{ASKED} has no has_avx512bf16 any more; see {__file__}")
        vars(module)["has_avx512bf16"] = lambda: False


class NarrowFinder(importlib.abc.MetaPathFinder):
    """Finds the one module as ever, with another loader; all others are left alone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The specification of the one module; None for any other."""
        if fullname != ASKED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = NarrowLoader(spec.loader)
        return spec


def run_the_one_behind() -> None:
    """Run the `sitecustomize` that this one stands in front of, if there is one."""
    here = Path(__file__).parent
    spec = importlib.machinery.PathFinder.find_spec(
        "sitecustomize", [entry for entry in sys.path if Path(entry).absolute() != here]
    )
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, NarrowFinder())
run_the_one_behind()
