"""Timed steps, the untimed rest of the training, and its results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorameter.records.record import PartialRecord
from lorameter.trial.building import peft_methods
from lorameter.trial.memory import resident_bytes

if TYPE_CHECKING:
    from lorameter.trial.trial import Trial


def turn(trial: Trial, steps: int) -> PartialRecord:
    """Run `steps` timed steps, at least one."""
    stream = trial.stream
    real, padded = stream.real_tokens, stream.padded_tokens
    accumulated = trial.request.variant.gradient_accumulation
    # One reading per turn, in its last step, so that no timed step follows it.
    laps = [*(trial.take_step() for _ in range(steps - 1)), trial.take_step(trial.telemetry.look)]
    losses = [loss for loss, _ in laps]
    samples = {
        "step_time_s": tuple(lap.time_s for _, lap in laps),
        "step_cpu_time_s": tuple(lap.cpu_time_s for _, lap in laps),
        "timed_loss": tuple(losses),
        "turn_sequences": (float(steps * trial.request.workload.batch_size * accumulated),),
        "turn_tokens": (float(stream.real_tokens - real),),
        "turn_padded_tokens": (float(stream.padded_tokens - padded),),
    }
    return trial.judged(PartialRecord(samples=samples), losses)


def train(trial: Trial, steps: int) -> PartialRecord:
    """Run `steps` untimed steps of the planned epochs, or the remaining ones."""
    losses = [trial.take_step()[0] for _ in range(min(steps, trial.total_steps - trial.steps_taken))]
    return trial.judged(PartialRecord(samples={"remaining_loss": tuple(losses)}), losses)


def finish_training(trial: Trial, steps: int | None = None) -> PartialRecord:
    """Measure peaks of training, run the remaining steps, and measure exact bytes by kind and the held-out loss.

    The length of a warm-up depends on noise. Losses are compared between variants, so every trial ends after the
    same number of steps on the same tokens: those of the longest warm-up, or of the planned epochs; or after
    `steps`, if the time limit ends the training earlier.
    """
    trainee, step = trial.trainee, trial.step
    memory = trial.gauge.peaks("train") if trial.alone else {}
    last = trial.total_steps if steps is None else min(steps, trial.total_steps)
    left = train(trial, last - trial.steps_taken) if trial.timed else PartialRecord()
    losses = list(left.samples.get("remaining_loss", ()))
    values = {"trainable_parameters": float(sum(p.numel() for p in trainee.parameters))}
    if trial.alone:
        # Gradients exist only between the backward pass and the update, so they are recomputed for counting.
        step.loss(trial.stream.take()).backward()
        memory |= resident_bytes(trainee.model, trainee.optimizer)
        trainee.optimizer.zero_grad(set_to_none=True)
    if trial.timed:
        values |= {"training_steps": float(trial.steps_taken), "held_out_loss": step.held_out_loss()}
        values |= {"training_steps_planned": float(trial.total_steps)} if last != trial.total_steps else {}
        losses.append(values["held_out_loss"])
    return trial.judged(PartialRecord(values=values, memory=memory, samples=left.samples), losses)


def save_adapter(trial: Trial) -> PartialRecord:
    """Save the trained adapter for a new interpreter."""
    peft_methods.save(trial.trainee.model, Path(trial.request.scratch) / "adapter", initial=trial.initial)
    return PartialRecord()
