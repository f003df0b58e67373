"""An executor whose workers do no work, so that commands that start jobs are tested in seconds.

Jobs are separate processes; the variable `PRETENDED` configures them, as JSON.

slow    [[cpus, trial, factor], …]: the factor of a step on these CPUs, for trials with this text in their name
lost    CPUs on which no process can be launched
hangs   whether turns never end; turn_s sets the time of a turn, in seconds
peft    the version of peft, by CPUs
"""

from __future__ import annotations

import json
import os
import time

from lorameter.errors import InvalidRunError
from lorameter.machine.provenance import Machine, MachineFacts
from lorameter.records.record import PartialRecord
from lorameter.run.workers import TrialFiles
from lorameter.run.workers.environment import Host
from tests.run.fakes import FakeExecutor

MACHINE = Machine(
    device="cpu", device_name="Test CPU", device_memory_bytes=None, driver=None, cuda=None, cpu_model="Test CPU",
    cpus=2, memory_bytes=8 * 2**30, avx512_bf16=True, kernel="6.0", python="3.11.0",
)  # fmt: skip


def setting(name, default):
    """Return a setting that the test passes to this process."""
    return json.loads(os.environ.get("PRETENDED", "{}")).get(name, default)


def cpus():
    """Return the CPUs of this process's site."""
    return os.environ.get("LORAMETER_CPUS", "")


class Fake(FakeExecutor):
    """An executor that is also its worker."""

    def machine(self):
        return MACHINE

    def device_id(self):
        return "pretended"

    def free_bytes(self):
        return 2**33

    def facts(self):
        host = None
        if self.host != Host():
            host = {"python": "3.11.0", "libraries": {"peft": "1.0"}, "cuda": None}
            host |= {"git": {"commit": None, "dirty": False}, "packages": {"python": self.host.python}}
        libraries = {"peft": setting("peft", {}).get(cpus(), "1.0")}
        return MachineFacts(machine=MACHINE, settings={}, libraries=libraries, git={"commit": None}, host=host)

    def start(self, folder, threads):
        self.folder = folder
        (folder / "logs").mkdir(exist_ok=True)

    def make_place(self, trial, log):
        path = self.folder / "logs" / f"{log}.log"
        path.write_text(f"{self.label} {cpus()} {'' if self.host == Host() else self.host.python}\n")
        return TrialFiles(scratch=trial, log_path=str(path))

    def launch(self):
        if cpus() in setting("lost", []):
            raise InvalidRunError("its zygote is gone")
        return self

    def ask(self, command, trial, timeout_s, **arguments):
        if command != "turn":
            return PartialRecord()
        while setting("hangs", False):
            time.sleep(0.1)
        time.sleep(setting("turn_s", 0.0))
        slow = [factor for on, part, factor in setting("slow", []) if on == cpus() and part in trial]
        return PartialRecord(samples={"step_time_s": ((slow or [1.0])[0] * 0.1,) * arguments["steps"]})
