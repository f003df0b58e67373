"""A protocol: how often and how long variants are measured, independent of the variants.

The replicate (fresh processes) is the unit of inference; steps inside a process are sub-samples. Kalibera & Jones
(2013, "Rigorous benchmarking in reasonable time") show why: processes differ more from each other than steps do, so
repeating steps in one process gains little. One setting, `effort`, sets the number of replicates.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from lorameter.errors import require
from lorameter.records.metrics import PHASES, Phase
from lorameter.studies import limits
from lorameter.studies.placement import HERE, SiteSpec

PRECISION_REPLICATES = 40
"""Default maximum of the replicates if a precision is given."""
LIMITED_REPLICATES = 12
"""Default maximum of the replicates if a time limit is given."""
EFFORT_REPLICATES: dict[str, int] = {"quick": 3, "standard": 8, "rigorous": 12}

_LEAST = {
    "replicates": 1, "warmup_steps_min": 1, "turns": 1, "steps_per_turn": 1, "generate_warmup": 0,
    "generate_requests": 1, "open_ended_requests": 1, "peak_replicates": 0, "cold_replicates": 1, "retries": 0,
    "seed": 0, "memory_limit_bytes": 1, "epochs": 0,
}  # fmt: skip
STEPS_PER_TURN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """Replicates, warm-up, timed turns and limits. Raises `UsageError` for values that would measure nothing."""

    replicates: int = EFFORT_REPLICATES["quick"]
    """Passes over all variants in fresh processes: the unit of every interval."""
    warmup_steps_min: int = 3
    """Minimum number of discarded steps."""
    warmup_steps_max: int = 12
    """Maximum number of discarded steps; the warm-up ends when the step times are steady."""
    turns: int = 8
    """Timed turns of a trial in the training phase."""
    steps_per_turn: int = STEPS_PER_TURN
    """Timed steps of a turn."""
    epochs: float = 0.0
    """Train every trial for at least this many epochs: steps beyond the timed turns follow untimed, for the losses. 0
    ends the training with the timed turns."""
    phases: tuple[Phase, ...] = PHASES
    """Phases that are measured by default."""
    merged: bool = True
    """Also measure requests with the adapter merged."""
    peak_replicates: int = 3
    """Number of isolated trials that measure memory peaks. Peaks take few values and are compared by their maximum, so
    a few trials suffice. 0: no peaks."""
    cold_replicates: int | None = None
    """Replicates that measure cold starts, each of which reads, converts and quantises the base from its own files.
    None: all replicates."""
    generate_warmup: int = 1
    """Discarded requests between the first call and the warm ones."""
    generate_requests: int = 6
    """Warm requests per trial and adapter state (unmerged, merged)."""
    open_ended_requests: int = 6
    """Requests that end at EOS, if the workload has such requests."""
    seed: int = 0
    """Seed for the order of the plan and, with the replicate's number, for the training."""
    step_timeout_s: float = 600.0
    """Maximum time without an answer of a worker to one command; the worker is killed after it."""
    memory_limit_bytes: int | None = None
    """Address-space limit of a trial's process on a CPU; reaching it makes the trial `oom` instead of the machine."""
    retries: int = 2
    """How often a trial is measured again because a disturbance exceeded a limit (`lorameter.machine.disturbances`),
    together with all trials that took turns with it, at the end of its replicate. After that it stays invalid."""
    allow_disturbed: bool = False
    """Accept such trials, with a notice, for a machine that is shared with others."""
    precision: float | None = None
    """Stop as soon as every compared interval is at most this far from its centre (a fraction: 0.05 is 5 %; the
    tolerance of 0.01 is a good choice), but not before 5 replicates; `replicates` is the maximum. None measures all
    replicates."""
    max_minutes: float | None = None
    """Time limit of a run in minutes from its start, including the preparation of tokens and bases. A resumed
    run starts with the full limit. Turns, replicates, cold starts and requests are dropped to meet the limit, for all
    variants alike, by the rule in docs/method.md. None sets no limit."""
    on: str = HERE
    """Where `run`, `ab`, `calibrate` and pytest measure replicates, as with `--on`: `here`, `ray`, `ray://HOST:PORT` or
    `slurm:KEY=VALUE,…`. Not allowed in a profile, which is chosen by the current device."""
    sites: tuple[str, ...] = ()
    """The sites of `on` that are used at once, as with `--sites`: GPUs of this machine, or shares of its CPUs, as
    `["0", "1"]`, or `["0+1", "2+3"]` for trials with two ranks; node names on Ray; not with SLURM, whose `on` gives
    their number. Empty: one device here, all nodes of a cluster. Not allowed in a profile."""
    mixed: bool = False
    """Allow sites with different GPUs or CPUs, as with `--mixed`: on sites of this machine replicates are divided
    evenly, and every ratio belongs to one site, with its own interval; no value combines several sites. Not allowed
    with a precision or in a profile."""

    def __post_init__(self) -> None:
        limits.check_least("protocol", self, _LEAST, positive=("max_minutes", "step_timeout_s"))
        limits.check_fraction("protocol", "precision", self.precision)
        require(
            self.warmup_steps_max >= self.warmup_steps_min,
            f"protocol: warmup_steps_max = {self.warmup_steps_max}: below warmup_steps_min = {self.warmup_steps_min}. "
            "Raise it.",
        )
        require(self.phases, f"protocol: phases = []: nothing to measure. Name some of {', '.join(PHASES)}.")
        require(
            not self.mixed or self.precision is None,
            f"protocol: precision = {self.precision}: it is of one interval, and with mixed each site has its own. "
            "Leave one of the two out, and give replicates.",
        )
        self.place  # noqa: B018 # raises for an invalid place

    @property
    def place(self) -> SiteSpec:
        """Where replicates are measured."""
        return SiteSpec(on=self.on, sites=self.sites, mixed=self.mixed)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a trial, independent of its warm-up length: the first, the maximum warm-up, the timed
        ones."""
        return 1 + self.warmup_steps_max + self.turns * self.steps_per_turn

    def all_steps(self, sequences: int, sequences_per_step: int) -> int:
        """The larger of `total_steps` and the steps of the requested epochs, of `sequences` each."""
        return max(self.total_steps, math.ceil(self.epochs * sequences / sequences_per_step))

    def with_effort(self, effort: str) -> Protocol:
        """The same protocol with another effort: quick 3, standard 8, rigorous 12 replicates."""
        known = ", ".join(EFFORT_REPLICATES)
        require(effort in EFFORT_REPLICATES, f"effort = {effort!r}: unknown. Use one of {known}.")
        return dataclasses.replace(self, replicates=EFFORT_REPLICATES[effort])

    def here(self) -> Protocol:
        """The same protocol on one device of this machine."""
        return dataclasses.replace(self, on=HERE, sites=(), mixed=False)

    def least(self) -> Protocol:
        """The smallest protocol that runs every phase once; its measurements are not reported."""
        return dataclasses.replace(
            self,
            replicates=1,
            warmup_steps_min=1,
            warmup_steps_max=1,
            turns=1,
            steps_per_turn=1,
            epochs=0.0,
            peak_replicates=1,
            cold_replicates=None,
            generate_warmup=0,
            generate_requests=1,
            open_ended_requests=1,
            retries=0,
            allow_disturbed=True,
            precision=None,
            max_minutes=None,
        )
