"""What an executor that measures on the present machine answers for it."""

from __future__ import annotations

from lorameter.machine import provenance
from lorameter.machine.provenance import Machine


class Here:
    """The part of `Executor` that knows the machine."""

    def machine(self) -> Machine:
        """The present one."""
        return provenance.probe_machine()

    def lanes(self, threads: int) -> int:
        """One: what its processes need is not known."""
        return 1

    def device_id(self) -> str:
        """The CPU, all of it, or the GPU by its own number."""
        return provenance.device_id()

    def free_bytes(self) -> int | None:
        """On its device, or in this container, now."""
        return provenance.free_bytes(self.machine())
