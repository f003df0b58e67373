"""Runs of a study that nobody measured: its settings and protocol, noise of a known kind, effects of a known size.

What a noisy machine does (docs/method.md), a part of its own each: a course that all settings of a replicate share and
that moves from step to step, settings standing at neighbouring moments in random order; heavy tails (Student's t with 3
degrees of freedom) and bursts of single steps; and a constant of each process and setting, which no turn takes out and
only replicates average. Together log ratios of single steps scatter as in the recorded noise (reports/proof/noise.txt),
about 8 %. Losses carry the seed, which all settings of a replicate share, and a scatter of each setting; the control
repeats the reference's, as it does to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import signal

from harness.records import codec
from harness.records.record import Role, TrialRecord
from harness.records.store import Manifest, Run
from harness.studies.study import Study
from harness.studies.variant import Variant

STEP_SD = 0.01
"""Scale of the heavy tails of one step or request; the standard deviation is 1.7 times that."""
PROCESS_SD = 0.005
"""Of the constant of a process and setting."""
BURSTS, BURST = 0.05, 0.1
"""Share of steps that a burst hits, and its median; it is lognormal, so the mean is half again as much."""
WANDER, MEMORY = 0.012, 0.95
"""The course: innovation and memory of an AR(1) between moments, beside a slow-down by half over the replicate."""
SEED_SD, LOSS_SD = 0.01, 0.003
"""Of a loss: what the seed does to all settings, and to one of them."""
TOKEN_S = 0.02

Effect = Callable[[Variant], float]
"""What a setting truly does to a quantity, as a factor."""


def _none(_: Variant) -> float:
    return 1.0


@dataclass(frozen=True)
class Truth:
    """What is true in a simulated run, by quantity."""

    times: Effect = _none
    """On step times."""
    losses: Effect = _none
    parameters: Effect = _none
    claims: Mapping[str, str] = field(default_factory=dict)
    """By claim, the verdict that is right; none of it where nothing is said."""


def simulated_run(study: Study, truth: Truth, rng: np.random.Generator) -> Run:
    """One run of all settings and the control, taking turns on one base, in the replicates that the study asks for."""
    members: list[tuple[Variant, Role]] = [(variant, "variant") for variant in study.variants]
    members.append((study.variant(study.reference), "control"))
    records = [
        record
        for replicate in range(study.protocol.replicates)
        for record in _replicate(study, truth, members, replicate, rng)
    ]
    manifest = Manifest(
        run="simulated",
        study=codec.to_json(study),
        phases=("train", "generate"),
        interleaving="shared-base",
        order=tuple(record.trial for record in records),
        seed=0,
        created_unix_s=0.0,
        provenance={"device": "cpu"},
        fingerprint="simulated",
        status="complete",
    )
    return Run(path=Path("simulated"), manifest=manifest, records=tuple(records))


def _replicate(
    study: Study, truth: Truth, members: list[tuple[Variant, Role]], replicate: int, rng: np.random.Generator
) -> list[TrialRecord]:
    protocol, count = study.protocol, len(members)
    process = rng.normal(0.0, PROCESS_SD, (count, 1))
    steps = 0.5 * np.exp(course(rng, count, protocol.turns * protocol.steps_per_turn) + process)
    requests = 0.3 * np.exp(course(rng, count, protocol.generate_requests) + process)
    # A prompt asks for a length, and each setting answers it in its own words.
    asked = rng.integers(8, study.workload.natural_tokens - 3, protocol.generate_requests)
    tokens = (asked + rng.integers(-3, 4, (count, asked.size))).astype(float)
    natural = TOKEN_S * tokens * np.exp(course(rng, count, asked.size) + process)
    losses = np.exp(0.5 + rng.normal(0.0, SEED_SD) + rng.normal(0.0, LOSS_SD, count))
    losses[-1] = losses[[variant.name for variant, _ in members].index(study.reference)]
    return [
        TrialRecord(
            trial=f"r{replicate}-{variant.name}{'-control' if role == 'control' else ''}",
            status="ok",
            name=variant.name,
            variant=variant.id,
            role=role,
            replicate=replicate,
            position=replicate * count + index,
            interleaving="shared-base",
            seed=replicate,
            started_unix_s=0.0,
            wall_time_s=1.0,
            samples={
                "step_time_s": tuple(truth.times(variant) * steps[index]),
                "train_loss": (float(truth.losses(variant) * losses[index]),) * protocol.turns,
                "request_time_s": tuple(requests[index]),
                "natural_request_time_s": tuple(natural[index]),
                "natural_tokens": tuple(tokens[index]),
            },
            values={
                "held_out_loss": float(truth.losses(variant) * losses[index]),
                "trainable_parameters": 921_600.0 * truth.parameters(variant),
            },
        )
        for index, (variant, role) in enumerate(members)
    ]


def course(rng: np.random.Generator, count: int, turns: int) -> NDArray[np.float64]:
    """Log times of so many settings that do the same and take turns: settings × turns."""
    moments, settle = turns * count, 100
    wander = signal.lfilter([1.0], [1.0, -MEMORY], rng.normal(0.0, WANDER, moments + settle))[settle:]
    shared = (wander + np.linspace(0.0, math.log(1.5), moments)).reshape(turns, count)
    places = rng.permuted(np.tile(np.arange(count), (turns, 1)), axis=1)
    burst = (rng.random((turns, count)) < BURSTS) * rng.lognormal(math.log(BURST), 1.0, (turns, count))
    own = STEP_SD * rng.standard_t(3, (turns, count)) + burst
    return np.asarray((np.take_along_axis(shared, places, axis=1) + own).T)
