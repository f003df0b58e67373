"""What a measurement declares. The plan, the budget, the forecast, the trial and the report follow from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lorameter.records.record import Interleaving, TrialRecord
from lorameter.records.units import Unit

if TYPE_CHECKING:
    from lorameter.studies.protocol import Protocol
    from lorameter.studies.study import Study
    from lorameter.studies.workload import Workload

Samples = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialPhase:
    """A phase of a trial: the table in which its metrics are reported."""

    name: str
    title: str
    words: str
    """Its name within a sentence."""


TRAIN = TrialPhase(name="train", title="Training", words="training")
GENERATE = TrialPhase(name="generate", title="Warm generation", words="generation")
COLD = TrialPhase(name="cold", title="Cold start, a new interpreter to its first completion", words="cold start")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A named quantity."""

    name: str
    title: str
    unit: Unit
    phase: str = ""
    """The phase in whose table it is; empty for the phase of its measurement."""
    higher_is_better: bool = False
    """Orients ratios so that above 1 is always worse."""
    derive: Callable[[TrialRecord], Samples] | None = None
    """Derives its samples from a record, () if it has none; None if a record stores them under the metric's name."""
    compare: Literal["ratio", "difference"] = "ratio"
    """Whether two values are compared by their ratio, for which both must be above zero, or by their difference in the
    metric's unit. Peaks of memory are compared by their maxima, and losses by the gain, whatever this says."""
    tolerance: float = 0.01
    """Smallest worsening worth an alarm: a fraction; of a difference, in the metric's unit."""
    margin: float = 0.05
    """Two values within it count as equal: a fraction; of a difference, in the metric's unit."""
    is_loss: bool = False
    """Whether it depends on the number of training steps."""
    untrained: str = ""
    """Of a loss, the value of a record that has the same loss before training, if it is measured."""
    column: Literal["", "always", "one workload", "own workloads"] = ""
    """Whether it is a column of its phase's table, in addition to the primary metric: never · always · if all variants
    share a workload · if some have their own. Losses over different tokens are not shown together, and the tokens a
    second of the timed steps depend on the records in them."""
    of_trial: Literal["median", "mean"] = "median"
    """How a trial's value is derived from its steps: a rate is the total of all steps over their total time."""
    per_token: bool = False
    """Whether it compares steps with different numbers of real tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialTimes:
    """Seconds of the parts of a trial, known in advance; 0 if unknown."""

    load_s: float = 0.0
    """Time to prepare its model, which is prepared once and then mapped."""
    step_s: float = 0.0
    evaluate_s: float = 0.0
    """Time for the loss of all held-out records."""
    request_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work(TrialTimes):
    """A command that a trial will execute, with the times from which its cost follows."""

    steps: int = 0
    """Steps of the command."""
    rounds: int = 0
    """Rounds of the measurement before the command."""
    workload: Workload
    protocol: Protocol


def cost_of_first_requests(work: Work) -> float:
    """Expected seconds of the first request and the discarded ones after it."""
    return (1 + work.protocol.generate_warmup) * work.request_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command; it may take as long as the protocol's `step_timeout_s`."""

    name: str
    """Its name in messages and failures, and of the function that executes it."""
    label: str
    """Its text in a progress display."""
    needed_by: Callable[[Measurement], bool] | None = None
    """It is sent to trials with a measurement for which this is true; None: to those with its own measurement."""
    telemetry_phase: str | None = None
    """The phase whose telemetry of machine and GPU is read around it; None for no telemetry."""
    ends: str | None = None
    """The phase that ends with it; a notice then names the telemetry that could not be read."""
    cost: Callable[[Work], float] = lambda work: 0.0
    """Its expected seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One measurement of a trial.

    A group of trials executes `begin` in parallel and untimed, then the rounds, in which one process at a time executes
    `round`, then `end`.
    """

    name: str
    """Its name in records, plans and manifests."""
    title: str
    """Its name in a report, in the plural."""
    phase: TrialPhase
    implementation: str
    """The module with a function for each command, which gets the trial and returns a `PartialRecord`."""
    applies: Callable[[Study], bool] = lambda study: True
    """Whether a study asks for it, if its phase is measured."""
    isolated_at: frozenset[Interleaving] = frozenset()
    """Levels of interleaving at which a separate, isolated trial measures it."""
    needs_adapter: bool = False
    """Whether it reads the saved adapter after training."""
    needs_requests: bool = False
    """Whether the trial must have answered its first requests (the first command of `requests`)."""
    in_new_process: bool = False
    """Whether it is measured in new processes, after those of the trials have ended."""
    drop_rank: int | None = None
    """Its place in the order in which measurements are dropped if the time limit is short; None: never dropped."""
    begin: tuple[Command, ...] = ()
    round: Command | None = None
    rounds: str = ""
    """The field of the protocol with the number of rounds. Measurements with the same field share the order of turns in
    each round."""
    end: tuple[Command, ...] = ()
    metrics: tuple[Metric, ...] = ()
    """In display order. The first metric of a phase represents it in the ratio column and in pytest-benchmark."""
    memory: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By phase: kinds of memory whose peaks represent it; the first measured kind is shown."""

    @property
    def commands(self) -> tuple[Command, ...]:
        """All commands in order."""
        return (*self.begin, *([self.round] if self.round else []), *self.end)

    def cost_s(self, work: Work, rounds: int) -> float:
        """Expected seconds of this many rounds in one trial, with what precedes and follows them."""
        work = dataclasses.replace(work, rounds=rounds)
        untimed = sum(command.cost(work) for command in (*self.begin, *self.end))
        return untimed + rounds * (self.round.cost(work) if self.round else 0.0)
