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
"""Who carries a command out: the process before it has the trial · the trial · one that is taken apart, which does what
any other does as well · a new interpreter, which the executor is asked for."""
RoundKind = Literal["steps", "epochs", "requests", "natural", "merged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command; it may take as long as the protocol's `step_timeout_s`."""

    word: str
    """In messages, in failures, and the name of the method that carries it out."""
    says: str
    """What is shown of it."""
    by: Doer = "trial"
    phase: Phase = "train"
    """It is asked only where the plan has this phase; training is in every plan."""
    measure: Measure | None = None
    """It is asked of trials that are there to measure this; None: of all."""
    timed: bool = False
    """Whether its samples are timed, so that nothing else may go on meanwhile."""
    watched: Phase | None = None
    """The phase whose watch reads machine and card around it; None where nothing is read."""
    ends: Phase | None = None
    """The phase that has ended with it: what its watch could not read is said then."""


_ROWS = (
    Command(word="base", says="preparing the base", by="process"),
    Command(word="parity", says="serving the adapter", by="process"),
    Command(word="prepare", says="starting", by="process"),
    Command(word="build", says="building"),
    Command(word="verify", says="checking what runs"),
    Command(word="warm_up", says="warming up"),
    Command(word="turn", says="timing steps", measure="steps", timed=True, watched="train"),
    Command(word="train", says="training on, untimed", measure="steps"),
    Command(word="finish_training", says="held-out loss and memory", ends="train"),
    Command(word="save_adapter", says="saving the adapter", phase="cold", measure="cold"),
    Command(word="begin_generate", says="first call", phase="generate"),
    Command(word="request", says="timing requests", phase="generate", timed=True, watched="generate"),
    Command(
        word="natural",
        says="timing whole answers",
        phase="generate",
        measure="natural",
        timed=True,
        watched="generate",
    ),
    Command(word="untrained", says="answers before training", phase="generate", measure="natural"),
    Command(word="end_generate", says="peaks of generation", phase="generate", measure="peaks", ends="generate"),
    Command(word="merge", says="merging the adapter", phase="generate", measure="merged"),
    Command(word="close", says="checking the shared base"),
    Command(word="cold", says="cold start", by="interpreter", phase="cold", measure="cold", timed=True),
    Command(word="account", says="counting memory", by="profiled trial"),
    Command(word="profile", says="taking steps apart", by="profiled trial", watched="train", ends="train"),
    Command(word="peak", says="measuring what the device does at best", by="profiled trial"),
    Command(word="activity", says="recording what runs in a step", by="profiled trial"),
    Command(word="apart", says="taking requests apart", by="profiled trial", watched="generate"),
    Command(word="sight", says="looking at a request", by="profiled trial"),
    Command(word="request_activity", says="recording what runs in a request", by="profiled trial"),
)
COMMANDS = {command.word: command for command in _ROWS}
"""By their words; those of any trial in the order in which it is asked."""

ROUNDS: dict[RoundKind, Command] = {
    "steps": COMMANDS["turn"],
    "epochs": COMMANDS["train"],
    "requests": COMMANDS["request"],
    "natural": COMMANDS["natural"],
    "merged": COMMANDS["request"],
}
"""What a round of each kind asks of every trial in it. In the order in which a group has them: timed turns, untimed
ones for what they leave of the epochs, requests of a fixed length, those that the model ends, those with the adapter
merged."""


def words_of(doer: Doer) -> tuple[str, ...]:
    """The words of the commands that one carries out."""
    return tuple(word for word, command in COMMANDS.items() if command.by == doer)
