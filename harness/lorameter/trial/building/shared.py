"""One base model on which several trials have their adapters, each as if it were alone.

The base is frozen, so trials can share it: each brings its own adapter, optimizer and stream of random numbers, and is
switched on for its turn only. To be bit-equal to a trial alone, an adapter is attached under its own seed, and the
random numbers of a trial go on where its last turn left them. The switch is outside every timed window.

Not for adapters that change the base (see `lorameter.run.interleaving`): the digest of the base must be the same at the
end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from kernels_check.observe.digest import Fingerprinter
from kernels_check.observe.modules import RandomState
from lorameter.trial.building import peft_methods

T = TypeVar("T")


class SharedBase:
    """The base of one process; loaded by the first trial that is built, and once only."""

    def __init__(self) -> None:
        self._model: Any = None
        self._adapters = 0
        self._digest = ""
        self._unchanged: bool | None = None
        self._found: dict[str, Any] = {}
        self.loads = 0
        """How often a base was loaded in this process."""
        self.conversions = 0
        """How often it was made of its source for that: read, converted, quantised."""

    def adopt(self, load: Callable[[str], Any], add: Callable[[Any, str], None]) -> tuple[Any, str]:
        """The PEFT model with one more adapter, active, and that adapter's name.

        Args:
            load: makes the PEFT model with its first adapter, of the name given.
            add: adds an adapter of the name given to the PEFT model.
        """
        name = f"adapter{self._adapters}" if self._adapters else "default"
        if self._model is None:
            self._model = load(name)
            self.loads += 1
        else:
            add(self._model, name)
            peft_methods.activate(self._model, name)
        self._adapters += 1
        return self._model, name

    def once(self, name: str, find: Callable[[], T]) -> T:
        """What `find` returns for the first trial that asks: a property of the base, the same for all on it."""
        if name not in self._found:
            self._found[name] = find()
        return cast(T, self._found[name])

    def remember(self) -> None:
        """Take the digest of the base, which must not change from here on; only the first call counts."""
        self._digest = self._digest or base_digest(self._model)

    def unchanged(self) -> bool:
        """Whether the base is what it was when it was remembered; found out once, when all trials have ended."""
        if self._unchanged is None:
            self._unchanged = self._digest == base_digest(self._model)
        return self._unchanged


class ActiveAdapter:
    """A trial's place in its process: entering makes its adapter active and its random numbers current."""

    def __init__(self, model: Any, adapter: str) -> None:
        self._model = model
        self._adapter = adapter
        self._random = RandomState()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """For the time of a command; afterwards the random numbers wait for the next one."""
        peft_methods.activate(self._model, self._adapter)
        self._random.restore()
        try:
            yield
        finally:
            self._random = RandomState()


def base_digest(model: Any) -> str:
    """A fingerprint of every parameter that no adapter owns, byte by byte; 4-bit weights must be in their stored
    layout. What lies on a GPU is read there."""
    own, take = peft_methods.own_parameters(model), Fingerprinter()
    return " ".join(take(parameter.data) for name, parameter in model.named_parameters() if name not in own)
