"""`lorameter` with measuring processes that only pretend, so that a fault of the parent takes a second to inject.

    STOP_AT=r1-a:turn python pretended.py run study.toml ...

All else is real: the command line, the loop, the files, the locks, the signals. $STOP_AT names a trial and a command.
When that is asked, a line is written to the descriptor that $STOPPED names, and the process waits for whatever is done
to it; a signal's number after another colon is sent by the process to itself instead, and after "files" it can open no
more of them.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

import harness.run.executors.local as local
from harness.records.preparation import Hello, TokenSummary
from harness.records.record import Fragment

TRIAL, COMMAND, SIGNAL = (*os.environ.get("STOP_AT", "-").split(":"), "", "")[:3]


def stop(trial: str, command: str) -> None:
    """Wait for what comes, where that was asked for."""
    if (trial, command) != (TRIAL, COMMAND):
        return
    if SIGNAL == "files":
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len([*Path("/proc/self/fd").iterdir()]) - 1, most))
        return
    if SIGNAL:
        os.kill(os.getpid(), int(SIGNAL))
        return
    os.write(int(os.environ["STOPPED"]), b"stopped\n")
    while True:
        signal.pause()


class Pretended(local.LocalExecutor):
    """Every step takes the same time."""

    start_latency_s = 0.01

    def start(self, folder: Path, threads: int) -> None:
        self._disk = local._Disk(folder)
        stop("", "start")

    def hello(self) -> Hello:
        return Hello(harness="0.1 sha256:one", pid=1, import_time_s=1.0, device="cpu", torch="0")

    def prepare_tokens(self, workload, *, keep=True) -> TokenSummary:
        return TokenSummary(
            path="t", hash="a" * 64, data="synthetic", synthetic=True, tokenizer_substituted=False, train_sequences=1,
            real_tokens=1, padded_tokens=0, records=1,
        )  # fmt: skip

    def launch(self) -> Pretended.Worker:
        return self.Worker()

    def cold_start(self, request) -> Fragment:
        stop(request.trial, "cold")
        return Fragment(samples={"cold_start_time_s": (1.0,)})

    class Worker:
        """One process that is none."""

        start_latency_s = 0.01

        def ask(self, command, trial, timeout_s, **arguments) -> Fragment:
            stop(trial, command)
            if command != "turn":
                return Fragment()
            counts = {"turn_real_tokens": (64.0,), "turn_sequences": (2.0,), "train_loss": (2.0,)}
            times = dict.fromkeys(("step_time_s", "step_cpu_time_s"), (0.1,) * arguments["steps"])
            return Fragment(samples=times | counts)

        def close(self) -> None:
            pass


if __name__ == "__main__":
    from harness.cli import main

    local.LocalExecutor = Pretended
    sys.exit(main(sys.argv[1:]))
