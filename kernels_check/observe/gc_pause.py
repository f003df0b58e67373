"""Python's collector of garbage, held while a check makes what lives as long as the check.

A snapshot, the hooks and what a profile holds are some hundred thousand objects. Each few hundred of them start a
collection, and every hundredth of those looks at the whole heap, of which nothing can be freed: with the large
libraries loaded that takes as long as a step. While the step itself runs, the collector is as the program has it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """Collect nothing in the block; afterwards the collector is on if it was on before."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
