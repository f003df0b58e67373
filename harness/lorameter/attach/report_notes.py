"""What a reader of a followed training must know of how its numbers were had, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorameter.attach.observer import Source, TrainingInfo
from lorameter.attach.step_samples import MOST_TIMED
from lorameter.records.record import Notice
from lorameter.records.units import format_bytes

SEEN_BY = {
    "trainer": "steps are the Trainer's: from the end of one to the end of the next, evaluation and saving apart",
    "loop": "steps are those that the loop names",
    "optimizer": "steps lie between two updates of the optimizer; the first update is before the first step",
}
FORWARD = "forward lasts from the wait for data, or the last update or backward pass, until backward begins"
NO_TOKENS = {
    "trainer": "no tokens are known: the Trainer's batches hold no token ids",
    "loop": "no tokens are known: the loop's batches hold no token ids",
    "optimizer": "no tokens are known: no DataLoader of torch yielded batches with token ids",
}


def say_missing(source: Source, samples: Mapping[str, Any]) -> tuple[str, ...]:
    """How forward passes were timed, and that no tokens were seen."""
    forward = (FORWARD,) if source != "trainer" and "forward_time_s" in samples else ()
    return forward if "turn_tokens" in samples or not samples else (*forward, NO_TOKENS[source])


def say_seen(checks: Sequence[Mapping[str, Any]] | None) -> str:
    """What the watched step was seen to run, whatever was required of it."""
    if checks is None:
        return "no step was watched"
    found = [f"{one['path']} {one['observed']}" for one in checks if one["observed"] is not None]
    return (
        f"seen in a step after the warm-up: {', '.join(found)}" if found else "a step was watched, and nothing was seen"
    )


def say_peaks(memory: Mapping[str, int]) -> str:
    """The peak of each phase in words, where there is more than training."""
    where = "device_peak_allocated" if "device_peak_allocated_train_bytes" in memory else "host_peak"
    words = {"train": "training", "evaluate": "evaluating", "save": "saving"}
    found = [
        f"{word} {format_bytes(memory[name])}"
        for phase, word in words.items()
        if (name := f"{where}_{phase}_bytes") in memory
    ]
    return f"peak memory while {', '.join(found)} ({where.split('_')[0]})" if len(found) > 1 else ""


def second_training(training: TrainingInfo) -> Notice:
    """A second training of one process is not measured."""
    return Notice(
        code="second-training",
        message=f"a second training began in the same process (seen by its {training.source}); the first one is what "
        "was measured.",
        remedy="Measure each training in a process of its own.",
    )


def not_kept(steps: int) -> Notice:
    """Of a long training not all steps are kept."""
    return Notice(
        code="timed-steps-truncated",
        message=f"the training had {steps} steps; its first {MOST_TIMED} timed ones are kept.",
        remedy="Nothing is wrong; later steps are in the script's own log.",
    )
