"""Judges disturbances of a trial by clocks, heat, memory and the kernel's counters, never by the measured times.

A rule that depended on the measured times would bias them. Each disturbance states the measured value and the limit.
Most are only notices, because the statistics tolerate noise. Past a second limit the trial is invalid and is measured
again (`lorameter.run.runner`). That limit is lenient on purpose: a strict filter would leave too little to compare.

The limits follow from the margin of 5 %, within which two values count as equal: a disturbance that may have changed a
time by more than that makes the trial invalid, and a fifth of that gives a notice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lorameter.machine.telemetry import telemetry_key
from lorameter.records.units import format_bytes, format_count

CLOCK_MARGIN = 0.05
NOTICED = 0.01
"""Share of the timed stretches from which a notice is given: the tolerance, the smallest slow-down worth an alarm."""
THROTTLED_INVALID = 0.10
"""Share of time with clocks reduced by heat or power supply. A GPU that protects itself runs at half its clock or less,
so a tenth of the time costs at least half of that: the margin."""
CLOCK_MOVED = CLOCK_MARGIN
"""Range of the SM clock over its maximum: the time of a compute-bound step is inversely proportional to the clock."""
CLOCK_INVALID = 0.25
"""nvbench discards samples whose clock is below 75 % of the default (its throttle threshold)."""
SHARED_INVALID_BYTES = 2**30
"""Memory held by other processes. A CUDA context takes 0.3 to 0.6 GiB: above this limit another process holds data for
work; below it, the process may be an idle notebook."""
HIDDEN_LIMIT_BYTES = 512 * 2**20
"""Memory in use without a listed process from which a hidden process is assumed. The context of a compute process takes
0.3 to 0.6 GiB; a display server without a CUDA context takes less."""
PAGE_TIME_S = 1e-4
"""Time to read one page of 4 KiB from a solid-state disk."""
SWAP_INVALID_BYTES_PER_S = CLOCK_MARGIN / PAGE_TIME_S * 4096
"""Swap rate that takes 5 % of the time: about 2 MB/s."""
CONTENDED = CLOCK_MARGIN
"""Share of the time in which runnable work waited for a CPU; 5 %, as for the occupancy."""
OCCUPANCY_INVALID = 0.5
"""CPU time over wall time of an isolated trial of one thread: at this limit it ran half of the time at most. Several
threads wait for each other, so their occupancy does not show other work."""
MIN_REQUESTED_S = 1.0
"""Minimum CPU time of which a withheld share is computed. The kernel counts steal in ticks of 10 ms; with less CPU
time, a single tick would exceed the 1 % at which a share gives a notice."""
WITHHELD_INVALID = 0.25
"""Share of the requested CPU time that a hypervisor or a quota withheld. It is withheld in bursts, which affect one
step fully and the next not at all, so the median tolerates more than the margin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """One condition that casts doubt on a trial's measurements."""

    code: str
    message: str
    """The finding and the limit, both as numbers; the caller adds the trial."""
    remedy: str
    weight: float
    """The measured value divided by the limit for a notice, to sort by severity."""
    invalid: bool = False
    """Whether the trial is invalid."""


def judge(
    values: Mapping[str, float],
    memory: Mapping[str, int],
    phase: str,
    *,
    in_turns: bool,
    occupancy: float | None = None,
) -> tuple[Disturbance, ...]:
    """The disturbances of a trial in one phase, the worst first; a quantity that was not measured gives none.

    Args:
        values: telemetry of the trial's record, by the names of `lorameter.machine.telemetry`.
        memory: memory values of the record, by the names of `lorameter.trial.memory`.
        phase: "train" or "generate".
        in_turns: whether other trials took turns with this trial. CPU contention and clock changes then affect all of
            them alike and do not make the trial invalid. Swapping affects only the process that lost pages, and does.
        occupancy: CPU time over wall time of the timed steps of one thread on a CPU; None for several threads, and on a
            GPU, because the host waits for it.
    """
    phase_values = _PhaseValues(values, phase)
    found = [
        *_throttled(phase_values),
        *_power_capped(phase_values),
        *_clocks(phase_values, in_turns=in_turns),
        *_shared(phase_values),
        *_swapped(phase_values),
        *_retrying(memory, phase),
        *_contended(phase_values, occupancy, in_turns=in_turns),
        *_withheld(phase_values, in_turns=in_turns),
    ]
    return tuple(sorted(found, key=lambda disturbance: (not disturbance.invalid, -disturbance.weight)))


@dataclass(frozen=True, slots=True)
class _PhaseValues:
    """Values of one phase by the names of their meters; None for values that were not measured."""

    values: Mapping[str, float]
    phase: str

    def device(self, name: str) -> float | None:
        return self.values.get(telemetry_key("device", name, self.phase))

    def host(self, name: str) -> float | None:
        return self.values.get(telemetry_key("host", name, self.phase))

    def shares(self, time_counter: str, sample_counter: str) -> list[tuple[float, str]]:
        """Shares of the watched time by a time counter of the GPU, and of the samples at the ends of the stretches;
        each with a description, if it was measured."""
        parts = (
            (self.device(time_counter), self.host("watched_s"), ".2f", "s"),
            (self.device(sample_counter), self.device("samples"), ".0f", "samples"),
        )
        return [
            (min(1.0, part / whole), f"{part:{digits}} of {whole:{digits}} {unit}")
            for part, whole, digits, unit in parts
            if part is not None and whole
        ]


def _throttled(values: _PhaseValues) -> Iterator[Disturbance]:
    shares = values.shares("thermal_slowdown_s", "throttled_samples")
    share, words = max(shares, default=(0.0, ""))  # the power supply has samples only
    if share > NOTICED:
        yield Disturbance(
            code="throttled",
            message=f"the GPU lowered its clocks to protect itself in {words} ({share:.0%}; from "
            f"{NOTICED:.0%} it is a notice, above {THROTTLED_INVALID:.0%} the trial is invalid)",
            remedy="Improve its cooling or power supply, or lock a lower clock (nvidia-smi -lgc), and measure again.",
            weight=share / NOTICED,
            invalid=share > THROTTLED_INVALID,
        )


def _power_capped(values: _PhaseValues) -> Iterator[Disturbance]:
    shares = values.shares("power_slowdown_s", "power_capped_samples")
    share, words = shares[0] if shares else (0.0, "")
    if share > NOTICED:
        yield Disturbance(
            code="power-capped",
            message=f"the power limit set the clock in {words} ({share:.0%}; a notice from {NOTICED:.0%})",
            remedy="Times are those of this limit (nvidia-smi -q -d POWER); compare them under the same one.",
            weight=share / NOTICED,
        )


def _clocks(values: _PhaseValues, *, in_turns: bool) -> Iterator[Disturbance]:
    low, high = values.device("sm_clock_min_hz"), values.device("sm_clock_max_hz")
    if low is not None and high and (moved := 1 - low / high) > CLOCK_MOVED:
        yield Disturbance(
            code="clocks-moving",
            message=f"the SM clock was between {low / 1e6:.0f} and {high / 1e6:.0f} MHz, a range of {moved:.0%} (from "
            f"{CLOCK_MOVED:.0%} it is a notice, above {CLOCK_INVALID:.0%} an isolated trial is invalid)",
            remedy="Lock the clock (nvidia-smi -lgc MHZ) and turn persistence on (nvidia-smi -pm 1).",
            weight=moved / CLOCK_MOVED,
            invalid=moved > CLOCK_INVALID and not in_turns,
        )


def _shared(values: _PhaseValues) -> Iterator[Disturbance]:
    others, others_bytes, hidden = values.device("others"), values.device("others_bytes"), values.device("hidden_bytes")
    if others:
        size = "memory of unknown size" if others_bytes is None else format_bytes(others_bytes)
        yield Disturbance(
            code="gpu-shared",
            message=f"{others:.0f} other process{'es' * (others != 1)} held {size} of the device (from 1 process it "
            f"is a notice, above {format_bytes(SHARED_INVALID_BYTES)} the trial is invalid)",
            remedy="End them, or measure on a GPU that is free (nvidia-smi lists them).",
            weight=1 + (others_bytes or 0.0) / SHARED_INVALID_BYTES,
            invalid=others_bytes is not None and others_bytes > SHARED_INVALID_BYTES,
        )
    elif hidden is not None and hidden > HIDDEN_LIMIT_BYTES:
        yield Disturbance(
            code="unaccounted-gpu-memory",
            message=f"{format_bytes(hidden)} of the device were in use by processes that are not visible (from "
            f"{format_bytes(HIDDEN_LIMIT_BYTES)} it is a notice)",
            remedy="Run nvidia-smi outside the container, or start the container with the machine's "
            "process numbers (--pid=host).",
            weight=hidden / HIDDEN_LIMIT_BYTES,
        )


def _swapped(values: _PhaseValues) -> Iterator[Disturbance]:
    moved, watched = [values.host(name) for name in ("swap_in_bytes", "swap_out_bytes")], values.host("watched_s")
    total = sum(size for size in moved if size is not None)
    if total and watched:
        rate = total / watched
        yield Disturbance(
            code="swapped",
            message=f"the machine swapped {format_bytes(total)} in {watched:.2f} s (from one page it is a notice, "
            f"above {format_bytes(SWAP_INVALID_BYTES_PER_S)} a second the trial is invalid)",
            remedy="Free memory or turn swap off (swapoff -a); a smaller batch takes less.",
            weight=1 + rate / SWAP_INVALID_BYTES_PER_S,
            invalid=rate > SWAP_INVALID_BYTES_PER_S,
        )


def _retrying(memory: Mapping[str, int], phase: str) -> Iterator[Disturbance]:
    """Never invalid: a variant that barely fits will always retry, and its times include that cost."""
    retries, failures = (memory.get(f"device_{name}_{phase}", 0) for name in ("alloc_retries", "ooms"))
    if retries or failures:
        yield Disturbance(
            code="memory-retrying",
            message=f"the allocator emptied its cache {format_count(retries, 'time')} and failed "
            f"{format_count(failures, 'time')} for lack of device memory (from 1 it is a notice)",
            remedy="Each time stops the device; take a smaller batch, checkpointing, or a larger GPU to time compute.",
            weight=float(retries + failures),
        )


def _contended(values: _PhaseValues, occupancy: float | None, *, in_turns: bool) -> Iterator[Disturbance]:
    stalled, watched, switches = map(values.host, ("cpu_stall_s", "watched_s", "involuntary_switches"))
    share = stalled / watched if stalled is not None and watched else None
    low = occupancy is not None and occupancy < OCCUPANCY_INVALID
    if low or (share is not None and share > CONTENDED):
        waited = "" if share is None else f"work waited for a CPU in {share:.0%} of the time"
        had = "" if occupancy is None else f"the trial's one thread had a CPU for {occupancy:.0%} of its time"
        taken = "" if switches is None else f"lost one {format_count(round(switches), 'time')}"
        counts = f", with a CPU for less than {OCCUPANCY_INVALID:.0%} of the time an isolated trial is invalid"
        limit = "" if occupancy is None else counts
        yield Disturbance(
            code="cpu-contention",
            message=f"{', '.join(filter(None, (waited, had, taken)))} (warning threshold {CONTENDED:.0%}{limit})",
            remedy="Stop other work on this machine, or give this process CPUs of its own (taskset, cpuset).",
            weight=(share or 0.0) / CONTENDED + (1 - occupancy if occupancy is not None else 0.0),
            invalid=low and not in_turns,
        )


def _withheld(values: _PhaseValues, *, in_turns: bool) -> Iterator[Disturbance]:
    for code, counter, given_counter, who, remedy in (
        (
            "stolen",
            "steal_s",
            "busy_s",
            "the hypervisor gave this machine's CPUs to others",
            "Use a dedicated machine.",
        ),
        (
            "quota",
            "quota_stall_s",
            "quota_used_s",
            "the container's CPU quota withheld CPU time",
            "Raise the quota (docker run --cpus, limits.cpu), or use a cpuset instead.",
        ),
    ):
        withheld, given = values.host(counter), values.host(given_counter)
        if withheld is None or given is None or withheld + given < MIN_REQUESTED_S:
            continue
        share = withheld / (withheld + given)
        if share > NOTICED:
            yield Disturbance(
                code=code,
                message=f"{who} for {share:.0%} of the CPU time that was requested (from {NOTICED:.0%} it is a notice, "
                f"above {WITHHELD_INVALID:.0%} an isolated trial is invalid)",
                remedy=remedy,
                weight=share / NOTICED,
                invalid=share > WITHHELD_INVALID and not in_turns,
            )
