"""A fake executor between the runner and processes: an executor of this machine whose workers answer at once."""

from __future__ import annotations

from lorameter.records.record import BaseSummary, PartialRecord, TokenSummary, WorkerInfo
from lorameter.run.display import Display
from lorameter.run.workers import TrialFiles
from lorameter.run.workers.local import LocalExecutor


class FakeExecutor(LocalExecutor):
    """Executor and worker in one; every step takes 0.1 s, and `commanded_trials` records the trial of each command."""

    start_latency_s = 0.01
    harness = "0.1 sha256:one"
    tokens = "a" * 64
    commanded_trials: tuple[str, ...] = ()

    def __init__(self, *, host=None, label=""):
        super().__init__(host=host, label=label)
        self.label = label

    def start(self, folder, threads):
        pass

    def make_place(self, trial, log):
        return TrialFiles(scratch=trial, log_path=log)

    def clear_place(self, trial):
        pass

    def hello(self):
        return WorkerInfo(harness=self.harness, import_time_s=1.0, device="cpu", torch="0")

    def max_parallel(self, threads):
        return 1

    def prepare_base(self, request):
        return BaseSummary(path="b", hash="b" * 64, base="b", bytes=1, conversions=0, quantisations=0, seconds=0.0)

    def prepare_tokens(self, workload, *, keep=True):
        return TokenSummary(
            path="t", hash=self.tokens, data="synthetic", synthetic=True, tokenizer_substituted=False,
            train_sequences=1, real_tokens=1, padded_tokens=0, records=1,
        )  # fmt: skip

    def launch(self):
        return self

    def cpus(self):
        return ()

    def ask(self, command, trial, timeout_s, **arguments):
        FakeExecutor.commanded_trials = (*FakeExecutor.commanded_trials, trial)
        if command != "turn":
            return PartialRecord()
        counts = {"turn_tokens": (64.0,), "turn_sequences": (2.0,), "timed_loss": (2.0,)}
        times = dict.fromkeys(("step_time_s", "step_cpu_time_s"), (0.1,) * arguments["steps"])
        return PartialRecord(samples=times | counts)

    def close(self):
        pass


class Quiet(Display):
    """A display without output."""
