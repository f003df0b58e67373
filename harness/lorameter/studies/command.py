"""What a worker can be asked to do with a trial: one row a command.

The parent asks by these words, the trial's process refuses any other, and what is read of the machine around a command
follows from its row. The words go over the wire to both sides of an A/B, so another word is another schema.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorameter.records.metrics import Phase
from lorameter.records.record import Measure

Doer = Literal["process", "trial", "profiled trial", "interpreter"]
"""Who carries a command out: the process before it has the trial · the trial · a profiled trial, which does what
any other does as well · a new interpreter, which the executor is asked for."""
RoundKind = Literal["steps", "epochs", "requests", "open_ended", "merged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command; it may take as long as the protocol's `step_timeout_s`."""

    name: str
    """In messages, in failures, and the name of the method that carries it out."""
    label: str
    """What is shown of it."""
    by: Doer = "trial"
    phase: Phase = "train"
    """It is asked only where the plan has this phase; training is in every plan."""
    measure: Measure | None = None
    """It is asked of trials that are there to measure this; None: of all."""
    timed: bool = False
    """Whether its samples are timed, so that nothing else may go on meanwhile."""
    telemetry_phase: Phase | None = None
    """The phase whose watch reads machine and GPU around it; None where nothing is read."""
    ends: Phase | None = None
    """The phase that has ended with it: what its watch could not read is said then."""


_ROWS = (
    Command(name="base", label="preparing the base", by="process"),
    Command(name="parity", label="serving the adapter", by="process"),
    Command(name="prepare", label="starting", by="process"),
    Command(name="build", label="building"),
    Command(name="verify", label="checking what runs"),
    Command(name="warm_up", label="warming up"),
    Command(name="turn", label="timing steps", measure="steps", timed=True, telemetry_phase="train"),
    Command(name="train", label="training on, untimed", measure="steps"),
    Command(name="finish_training", label="held-out loss and memory", ends="train"),
    Command(name="save_adapter", label="saving the adapter", phase="cold", measure="cold"),
    Command(name="begin_generate", label="first call", phase="generate"),
    Command(name="request", label="timing requests", phase="generate", timed=True, telemetry_phase="generate"),
    Command(
        name="open_ended",
        label="timing whole answers",
        phase="generate",
        measure="open_ended",
        timed=True,
        telemetry_phase="generate",
    ),
    Command(name="base_answers", label="answers before training", phase="generate", measure="open_ended"),
    Command(name="end_generate", label="peaks of generation", phase="generate", measure="peaks", ends="generate"),
    Command(name="merge", label="merging the adapter", phase="generate", measure="merged"),
    Command(name="close", label="checking the shared base"),
    Command(name="cold", label="cold start", by="interpreter", phase="cold", measure="cold", timed=True),
    Command(name="memory_breakdown", label="memory breakdown", by="profiled trial"),
    Command(name="profile", label="profiling steps", by="profiled trial", telemetry_phase="train", ends="train"),
    Command(name="peak", label="measuring peak throughput", by="profiled trial"),
    Command(name="activity", label="recording what runs in a step", by="profiled trial"),
    Command(name="profile_requests", label="profiling requests", by="profiled trial", telemetry_phase="generate"),
    Command(name="request_facts", label="tracing a request", by="profiled trial"),
    Command(name="request_activity", label="recording what runs in a request", by="profiled trial"),
)
COMMANDS = {command.name: command for command in _ROWS}
"""By their words; those of any trial in the order in which it is asked."""

ROUNDS: dict[RoundKind, Command] = {
    "steps": COMMANDS["turn"],
    "epochs": COMMANDS["train"],
    "requests": COMMANDS["request"],
    "open_ended": COMMANDS["open_ended"],
    "merged": COMMANDS["request"],
}
"""What a round of each kind asks of every trial in it. In the order in which a group has them: timed turns, untimed
ones for what they leave of the epochs, requests of a fixed length, those that the model ends, those with the adapter
merged."""


def words_of(doer: Doer) -> tuple[str, ...]:
    """The words of the commands that one carries out."""
    return tuple(word for word, command in COMMANDS.items() if command.by == doer)
