"""A cold start in the order of what a user waits for: the base read and quantised, the first forward pass, the token.

transformers reads a tensor and has bitsandbytes quantise it in one call, so that the two are separated inside of it:
by the time that bitsandbytes' own functions take. On a GPU each then waits for the device, which the start of a user
does not; so this is no measurement of a cold start, and no comparison takes it.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lorameter.trial.process import synchronize

QUANTISING = ("quantize_4bit", "quantize_blockwise", "int8_vectorwise_quant")
"""What bitsandbytes makes quantised weights with; one may call another."""


class Waterfall:
    """The parts of one cold start, in seconds."""

    def __init__(self) -> None:
        self._quantise_s = 0.0
        self._first_forward_s = 0.0
        self._before_first_s = 0.0
        self._depth = threading.local()
        self._lock = threading.Lock()

    @contextmanager
    def loading(self, device: str) -> Iterator[None]:
        """Meanwhile what quantises is timed; the device has all of the base at the end."""
        import bitsandbytes.functional as functional

        with ExitStack() as stack:
            for name in QUANTISING:
                own = getattr(functional, name, None)
                if own is not None:
                    setattr(functional, name, self._timed(own, device))
                    stack.callback(setattr, functional, name, own)
            yield
            synchronize(device)

    @contextmanager
    def answering(self, model: Any, device: str) -> Iterator[None]:
        """Meanwhile the first forward pass of transformers' own model is timed."""
        asked, entered = time.perf_counter(), 0.0

        def enter(*_: Any) -> None:
            nonlocal entered
            if not entered:
                entered = time.perf_counter()
                self._before_first_s = entered - asked

        def leave(*_: Any) -> None:
            if not self._first_forward_s:
                synchronize(device)
                self._first_forward_s = time.perf_counter() - entered

        hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def values(self, *, base_s: float, first_token_s: float) -> dict[str, float]:
        """The parts by name; those of the base add up to `base_s`, those of the first token to `first_token_s`.

        Several threads may quantise at once, so that their time can be more than the base's; it then is all of it.
        """
        quantise = min(self._quantise_s, base_s)
        forward = min(self._first_forward_s, first_token_s)
        return {
            "cold_read_time_s": base_s - quantise,
            "cold_quantise_time_s": quantise,
            "cold_before_first_forward_s": min(self._before_first_s, first_token_s - forward),
            "cold_first_forward_time_s": forward,
        }

    def _timed(self, own: Callable[..., Any], device: str) -> Callable[..., Any]:
        @functools.wraps(own)
        def timed(*args: Any, **given: Any) -> Any:
            depth = getattr(self._depth, "value", 0)
            self._depth.value = depth + 1
            begin = time.perf_counter()
            try:
                return own(*args, **given)
            finally:
                self._depth.value = depth
                if not depth:
                    synchronize(device)
                    with self._lock:
                        self._quantise_s += time.perf_counter() - begin

        return timed
