"""The one CPU on which processes that take turns are timed, round by round.

What is slow about a CPU is then so for all of them (`lorameter.machine.affinity`). It is another one in each replicate,
and the fastest of its neighbours where that one is slower at this moment: what disturbs a CPU for a while makes ratios
wide, though it makes none of them false. The speed of a CPU is looked at between two rounds, and never at what was
measured on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping

from lorameter.machine.affinity import benchmark_cpus
from lorameter.run.executors import PinnableWorker

LOOK_EVERY_S = 4.0
"""CPUs are looked at no more often: it takes some hundredths of a second, and rounds may be shorter than that."""
LOOKED_AT = 4
"""CPUs, of a machine that has many."""
SLOWER_SHARE = 0.03
"""By how much a CPU must be slower than another to be left for it."""


class CpuPinning:
    """Of the workers of a group, while they are timed; a context, at whose end they stand."""

    def __init__(
        self,
        workers: Iterable[object],
        number: int,
        *,
        look: Callable[[Collection[int]], Mapping[int, float]] = benchmark_cpus,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`number` says whose turn it is among the CPUs that all workers have, counted round."""
        self._workers = _all_seated(list(workers))
        self._number, self._look, self._clock = number, look, clock
        self._cpus: tuple[int, ...] = ()
        self._cpu: int | None = None
        self._looked_s = float("-inf")

    def __enter__(self) -> CpuPinning:
        shared = [set(worker.cpus()) for worker in self._workers]
        self._cpus = tuple(sorted(set.intersection(*shared))) if len(shared) > 1 else ()
        return self

    def __exit__(self, *error: object) -> None:
        if self._cpu is not None:
            for worker in self._workers:
                worker.stand()

    def begin_round(self) -> None:
        """Have all of them sit on one CPU for the round that comes next."""
        now = self._clock()
        if len(self._cpus) < 2 or now - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = now
        cpu = self._choose()
        if cpu != self._cpu:
            self._cpu = cpu
            for worker in self._workers:
                worker.sit(cpu)

    def _choose(self) -> int:
        first = self._number % len(self._cpus)
        own, *others = (*self._cpus[first:], *self._cpus[:first])
        took = self._look((own, *others[: LOOKED_AT - 1]))
        if not took:
            return own
        fastest = min(took, key=lambda cpu: took[cpu])
        return own if took.get(own, float("inf")) <= (1 + SLOWER_SHARE) * took[fastest] else fastest


def _all_seated(workers: list[object]) -> list[PinnableWorker]:
    """All of them, or none where one cannot be told: those that are compared are treated alike."""
    seated = [worker for worker in workers if isinstance(worker, PinnableWorker)]
    return seated if len(seated) == len(workers) else []
