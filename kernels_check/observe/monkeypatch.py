"""Another function in place of one that a module holds, and the way back whatever has happened meanwhile.

Blocks that are opened in one callback of a training and closed in another need not end in the reverse of the order in
which they began, and a program may put a function of its own in the same place. So what goes is the one link of the
chain that is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _PatchedFunction:
    """Stands where a function stood, and calls what was made of it."""

    def __init__(self, original: Callable[..., Any], make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.original, self._make = original, make
        self._made: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._made is None:
            self._made = self._make(self.original)
        return self._made(*args, **kwargs)

    def link(self, original: Callable[..., Any]) -> None:
        """Take another function for the original from here on."""
        self.original, self._made = original, None

    def end(self) -> None:
        """Call the original alone, for whoever has kept this."""
        self._made = self.original


@contextmanager
def patched(holder: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Put what ``make`` makes of an attribute in its place, for the length of the block."""
    ours = _PatchedFunction(getattr(holder, name), make)
    setattr(holder, name, ours)
    try:
        yield
    finally:
        _take_out(holder, name, ours)


def _take_out(holder: Any, name: str, ours: _PatchedFunction) -> None:
    outer = getattr(holder, name)
    if outer is ours:
        setattr(holder, name, ours.original)
    while isinstance(outer, _PatchedFunction):
        if outer.original is ours:
            outer.link(ours.original)
        outer = outer.original
    ours.end()
