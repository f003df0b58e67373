"""An executor whose measuring processes do no work, so that commands on several sites are tested in seconds.

It is added to the table of executors by the name `pretending`.
"""

from __future__ import annotations

import threading

from lorameter.machine.provenance import Machine, MachineFacts
from lorameter.records.record import PartialRecord
from lorameter.records.worker_info import BaseSummary, TokenSummary, WorkerInfo
from lorameter.run.executors import TrialFiles
from lorameter.run.executors.host import Host

MACHINE = Machine(
    device="cpu", device_name="Test CPU", device_memory_bytes=None, driver=None, cuda=None, cpu_model="Test CPU",
    cpus=2, memory_bytes=8 * 2**30, avx512_bf16=True, kernel="6.0", python="3.11.0",
)  # fmt: skip


HOST = {"python": "3.11.0", "libraries": {"peft": "1.0"}, "cuda": None, "git": {"commit": None, "dirty": False}}
MADE = []
"""Executors of this process, in the order in which they were opened."""


class Meeting:
    """Keeps each site of this process from measuring until so many of them are about to."""

    def __init__(self, sites):
        self.sites, self.here, self.come = sites, set(), threading.Condition()

    def join(self, site):
        with self.come:
            self.here.add(site)
            self.come.notify_all()
            assert self.come.wait_for(lambda: len(self.here) >= self.sites, timeout=60)


SLOW = {}
"""By how much a step takes longer, by a part of the executor's label and of the trial's name."""
MEETINGS = [Meeting(1)]
"""The last one counts."""


class Fake:
    """An executor and its worker."""

    start_latency_s = 0.01

    def __init__(self, label, host=None):
        self.label, self.host = label, host
        MADE.append(self)

    def machine(self):
        return MACHINE

    def device_id(self):
        return "pretended"

    def free_bytes(self):
        return 2**33

    def facts(self):
        host = None if self.host in (None, Host()) else {**HOST, "packages": {"python": self.host.python}}
        return MachineFacts(machine=MACHINE, settings={}, libraries={"peft": "1.0"}, git={"commit": None}, host=host)

    def start(self, folder, threads):
        self.folder = folder
        (folder / "logs").mkdir(exist_ok=True)

    def hello(self):
        return WorkerInfo(harness="1.0 sha256:one", pid=1, import_time_s=1.0, device="cpu", torch="0")

    def prepare_tokens(self, workload, *, keep=True):
        return TokenSummary(
            path="t", hash="a" * 64, data="synthetic", synthetic=True, tokenizer_substituted=False, train_sequences=1,
            real_tokens=1, padded_tokens=0, records=1,
        )  # fmt: skip

    def lanes(self, threads):
        return 1

    def prepare_base(self, request):
        return BaseSummary(path="b", hash="b" * 64, base="b", bytes=1, conversions=0, quantisations=0, seconds=0.0)

    def make_place(self, trial, log):
        return TrialFiles(scratch=trial, log_path=str(self.folder / "logs" / f"{log}.log"))

    def clear_place(self, trial):
        pass

    def launch(self):
        return self

    def ask(self, command, trial, timeout_s, **arguments):
        if trial.startswith("r"):  # one of the plan's
            MEETINGS[-1].join(self.label[-1:])
        if command != "turn":
            return PartialRecord()
        factor = next((factor for (label, part), factor in SLOW.items() if label in self.label and part in trial), 1.0)
        return PartialRecord(samples={"step_time_s": (factor * 0.1,) * arguments["steps"]})

    def close(self):
        pass


def open_executor(*, host=None, label=""):
    """As `lorameter.run.executors.EXECUTORS` has them."""
    return Fake(label, host)
