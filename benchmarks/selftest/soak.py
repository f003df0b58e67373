"""Five hundred trials in one run, a third of them broken on purpose: what becomes of each, and of the parent's memory.

    python benchmarks/selftest/soak.py [--trials N]

Zygotes, trials and faults are real and as small as they can be; only what a trial measures is of no interest here. Some
variants break by themselves in every replicate (an exception, a loss that is no number). Of the others one or two in
each replicate are broken from outside, in turn by each of `FAULTS`: signals, a stop for longer than the limit of
silence, an address space that is full, the death of the zygote under way; and now and then the zygote dies between two
trials, which must cost none.

Every row is held against what was done to its trial. The parent's resident set and descriptors, and those of each
zygote, are read after every trial. Exit status 1, with the reasons, if a row is wrong or something grew.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from reading import machine_line

from harness.records.record import Status, TrialRecord
from harness.records.store import Run
from harness.run.contenders import contenders_of
from harness.run.executors.local import LocalExecutor
from harness.run.measure import Arm, measure
from harness.run.plan import Plan, Slot, make_plan
from harness.studies.protocol import Protocol
from harness.studies.study import Study
from harness.studies.variant import Variant
from harness.studies.workload import Workload

HEALTHY = 7
"""Variants that break only where they are broken; with the control eight trials of a replicate, and two that do."""
SLOTS = HEALTHY + 3
SHARE = 1 / 3
"""Of all trials: those that are broken."""
SILENCE_S = 15.0
"""Limit of a command: no command of so small a trial comes near it, whatever else the machine does."""
BETWEEN = 10
"""In every so many replicates the zygote is killed between two trials."""
MOST_GROWTH = 32 * 1024
"""Bytes a trial by which the parent may grow: it keeps the records of its run, with their evidence, until the end."""
MOST_ZYGOTE_GROWTH = 4 * 1024
"""Bytes a trial by which a zygote may grow: it keeps nothing."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is done to a trial before which command, and what must become of it."""

    number: signal.Signals | None = None
    """The signal that is sent; None for a full address space."""
    before: str
    to_zygote: bool = False
    status: Status
    says: str
    """What the message of its failure holds."""


FAULTS = {
    "killed": Fault(number=signal.SIGKILL, before="finish_training", status="crashed", says="SIGKILL"),
    "segfault": Fault(number=signal.SIGSEGV, before="verify", status="crashed", says="SIGSEGV"),
    "hang": Fault(number=signal.SIGSTOP, before="warm_up", status="timeout", says=f"no answer within {SILENCE_S:g} s"),
    "oom": Fault(before="build", status="oom", says="memory"),
    "zygote killed": Fault(
        number=signal.SIGKILL, before="build", to_zygote=True, status="crashed", says="zygote ended with signal 9"
    ),
    "zygote ended": Fault(
        number=signal.SIGTERM, before="finish_training", to_zygote=True, status="crashed",
        says="zygote ended with signal 15",
    ),
}  # fmt: skip
BY_THEMSELVES: dict[str, tuple[Status, str]] = {
    "exception": ("crashed", "no_such_module"),
    "nan": ("invalid", "loss"),
}
"""How variants end that break by themselves, and what is said of it."""


def study_of(replicates: int) -> Study:
    """As little work as still is a trial."""
    healthy = [Variant(name=f"v{number}", r=4 + number) for number in range(HEALTHY)]
    broken = [
        Variant(name="exception", r=4, target_modules=("no_such_module",)),
        Variant(name="nan", r=4, learning_rate=1e30, lora_alpha=10**12, max_grad_norm=0.0),
    ]
    return Study(
        name="soak",
        title="soak",
        workload=Workload(
            sequence_length=32, batch_size=2, train_sequences=16, held_out_records=4, held_out_sequences=2,
            prompt_tokens=8, new_tokens=4,
        ),
        protocol=Protocol(
            replicates=replicates, warmup_steps_min=1, warmup_steps_max=1, turns=1, steps_per_turn=2,
            step_timeout_s=SILENCE_S, allow_disturbed=True, peak_replicates=1,
        ),
        variants=(*healthy, *broken),
        reference="v0",
    )  # fmt: skip


def faults_of(plan: Plan) -> dict[str, str]:
    """The fault of each trial that is broken from outside: each kind in turn, spread over variants and replicates."""
    whole = [slot for slot in plan.slots if slot.variant.name not in BY_THEMSELVES]
    wanted = round(SHARE * len(plan.slots)) - (len(plan.slots) - len(whole))
    kinds = list(FAULTS)
    chosen = [whole[number * len(whole) // wanted] for number in range(wanted)]
    return {slot.trial: kinds[number % len(kinds)] for number, slot in enumerate(chosen)}


@dataclass(frozen=True)
class Seen:
    """One process at the end of one trial."""

    pid: int
    resident_bytes: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Seen:
        """As the kernel counts."""
        process = psutil.Process(pid)
        return cls(pid, process.memory_info().rss, process.num_fds())


@dataclass
class Breaker:
    """A display that shows nothing: it breaks trials where that was planned, and looks at the processes."""

    executor: LocalExecutor
    faults: dict[str, str]
    parent: list[Seen] = field(default_factory=list)
    zygotes: list[Seen] = field(default_factory=list)
    between: int = 0
    """Times that a zygote was killed between two trials."""

    def starting(self, plan: Plan, run_id: str) -> None:
        """Nothing to show."""

    def trial_phase(self, slot: Slot, phase: str) -> None:
        """Before a command, when the trial's process waits for it."""
        fault = FAULTS.get(self.faults.get(slot.trial, ""))
        if fault is None or fault.before != phase:
            return
        zygote = psutil.Process(self._zygote())
        (child,) = zygote.children()
        if fault.number is None:
            most = child.memory_info().vms
            resource.prlimit(child.pid, resource.RLIMIT_AS, (most, most))
        else:
            (zygote if fault.to_zygote else child).send_signal(fault.number)

    def trial_ended(self, record: TrialRecord) -> None:
        """After its record was saved: its process is gone, and nothing is under way."""
        self.parent.append(Seen.of(os.getpid()))
        try:
            seen = Seen.of(self._zygote())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):  # it has died with the trial
            return
        self.zygotes.append(seen)
        if record.position % (BETWEEN * SLOTS) == SLOTS // 2:
            os.kill(seen.pid, signal.SIGKILL)
            self.between += 1

    def _zygote(self) -> int:
        assert self.executor._zygote is not None
        return self.executor._zygote.pid


def wrong_rows(run: Run, plan: Plan, faults: dict[str, str]) -> Iterator[str]:
    """What does not hold of the rows: one a trial, with the end that was made for it and the numbers until then."""
    if [record.trial for record in run.records] != [slot.trial for slot in plan.slots]:
        yield f"{len(run.records)} rows of {len(plan.slots)} trials, or in another order"
    if run.damaged_lines or run.measured_again or run.state != "complete":
        yield f"{run.damaged_lines} damaged lines, {run.measured_again} measured again, {run.state}"
    for record in run.records:
        fault = FAULTS.get(faults.get(record.trial, ""))
        status, says = (fault.status, fault.says) if fault else BY_THEMSELVES.get(record.name, ("ok", ""))
        message = record.failure.message if record.failure else ""
        if record.status != status or says.lower() not in message.lower():
            yield f"{record.trial}: {record.status} ({message}), and {status} ({says}) was made of it"
        timed = len(record.samples.get("step_time_s", ()))
        reached = status == "ok" or (fault is not None and fault.before == "finish_training")
        if reached and (timed, record.turn_lengths) != (2, (2,)):
            yield f"{record.trial}: {timed} timed steps in {record.turn_lengths} are kept of 2"


def growth(seen: Sequence[Seen]) -> float:
    """Bytes a trial by which a process grew: the median of the last fifth over that of the second, whose first trials
    fill what is filled once."""
    fifth = len(seen) // 5
    if not fifth:
        return 0.0
    early, late = seen[fifth : 2 * fifth], seen[-fifth:]
    rise = statistics.median(one.resident_bytes for one in late) - statistics.median(
        one.resident_bytes for one in early
    )
    return rise / (len(seen) - 2 * fifth)


def what_grew(breaker: Breaker) -> Iterator[str]:
    """Print how the processes went; yields what did not stay flat."""
    parent = growth(breaker.parent)
    print(
        f"parent: {breaker.parent[0].resident_bytes / 2**20:.0f} MiB after the first trial, "
        f"{breaker.parent[-1].resident_bytes / 2**20:.0f} MiB after the last, {parent / 1024:.1f} KiB a trial "
        f"(at most {MOST_GROWTH / 1024:.0f})"
    )
    if parent > MOST_GROWTH:
        yield f"the parent grew by {parent / 1024:.1f} KiB a trial"
    counts = Counter(one.descriptors for one in breaker.parent)
    print(f"parent: descriptors after each trial: {_spread(counts)}")
    if max(counts) > breaker.parent[0].descriptors:
        yield f"the parent's descriptors grew from {breaker.parent[0].descriptors} to {max(counts)}"
    by_pid: dict[int, list[Seen]] = {}
    for one in breaker.zygotes:
        by_pid.setdefault(one.pid, []).append(one)
    longest = max(by_pid.values(), key=len)
    print(f"zygotes: {len(by_pid)}; the longest lived for {len(longest)} trials")
    worst = max((growth(seen) for seen in by_pid.values() if len(seen) >= 10), default=0.0)
    print(f"zygotes: at most {worst / 1024:.1f} KiB a trial (at most {MOST_ZYGOTE_GROWTH / 1024:.0f})")
    if worst > MOST_ZYGOTE_GROWTH:
        yield f"a zygote grew by {worst / 1024:.1f} KiB a trial"
    counts = Counter(one.descriptors for one in breaker.zygotes)
    print(f"zygotes: descriptors after each trial: {_spread(counts)}")
    if any(max(one.descriptors for one in seen) > seen[0].descriptors for seen in by_pid.values()):
        yield f"a zygote's descriptors grew: {_spread(counts)}"


def _spread(counts: Counter[int]) -> str:
    return ", ".join(f"{number} ({times} times)" for number, times in sorted(counts.items()))


def main(arguments: list[str]) -> int:
    """Make the plan, break what it says, judge the rows and the processes."""
    parser = argparse.ArgumentParser(description="Many trials, a third of them broken: right rows, flat processes.")
    parser.add_argument("--trials", type=int, default=500, help=f"a multiple of {SLOTS} (default: %(default)s)")
    options = parser.parse_args(arguments)
    study = study_of(max(options.trials // SLOTS, 1))
    plan = make_plan(study, contenders=contenders_of(study, ()), phases=("train",), interleaving="replicates")
    executor = LocalExecutor()
    breaker = Breaker(executor, faults_of(plan))
    print(machine_line(), flush=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = measure(plan, runs=Path(folder), display=breaker, arms=[Arm(executor=executor)])
        took = time.monotonic() - begin
        wrong = list(wrong_rows(run, plan, breaker.faults))
        if left := [child for child in psutil.Process().children(recursive=True) if child.is_running()]:
            wrong.append(f"processes are left: {left}")
    kinds = Counter(breaker.faults.values()) + Counter(
        record.name for record in run.records if record.name in BY_THEMSELVES
    )
    statuses = Counter(record.status for record in run.records)
    print(f"{len(plan.slots)} trials, {sum(kinds.values())} of them broken, in {took / 60:.1f} minutes")
    print(f"broken: {', '.join(f'{kind} {count}' for kind, count in kinds.items())}")
    print(f"zygotes killed between trials: {breaker.between}")
    print(f"rows: {', '.join(f'{status} {count}' for status, count in sorted(statuses.items()))}")
    wrong += what_grew(breaker)
    if len(breaker.parent) != len(plan.slots):
        wrong.append(f"{len(breaker.parent)} trials were looked at of {len(plan.slots)}")
    for reason in wrong:
        print(f"wrong: {reason}")
    print("holds: every row is right, nothing grew" if not wrong else f"{len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
