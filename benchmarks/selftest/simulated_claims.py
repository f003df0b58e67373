"""Tests the verdicts on claims in simulated runs of the built-in study of LoRA parameters, whose truth is known.

There are three sets of runs: `null`, where no setting has an effect; `null, at the limit`, the same with tolerances and
margins near zero, so that only the interval prevents a wrong statement; `injected`, where step time rises by 4 % from r
16 to 512, loss falls by 3 % from alpha 16 to 256 and parameters grow with alpha.

The noise is that of a busy machine (docs/method.md). It has three parts: autocorrelated noise that all settings of a
replicate share; heavy tails and bursts of single steps; and a constant for each process, which only replicates average
out. Log ratios of single steps scatter by about 8 %, as in the recording.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import signal
from shared import Share

from lorameter.records import codec
from lorameter.records.record import Role, TrialRecord
from lorameter.records.store import Manifest, Run
from lorameter.studies.study import Study, Target
from lorameter.studies.study_file import load_study
from lorameter.studies.variant import Variant
from lorameter.verdicts.claims import judge_claims

STUDY = "llama2-lora-parameters"
STEP_SD, PROCESS_SD = 0.01, 0.005
"""Scale of the heavy tails of one step, and of the constant of a process."""
BURST_SHARE, BURST_MEDIAN = 0.05, 0.1
"""Share of steps with a lognormal burst, and the median of the burst."""
COURSE_SD, COURSE_MEMORY = 0.012, 0.95
"""Standard deviation of the innovations and coefficient of the AR(1) noise that all settings share; over a replicate
the times also rise by half."""
SEED_SD, LOSS_SD = 0.01, 0.003
"""Standard deviation of the log loss that all settings of a replicate share, and of each setting alone."""
TOKEN_S = 0.02
EFFECTS = ("trend-up", "trend-down", "differs", "highest", "lowest", "best", "largest-effect")
WRONG_STATEMENTS = ((True, "supported"), (False, "refuted"))
"""Wrong verdicts if nothing has an effect: a supported effect, and a refuted equality. The rule `rises` is left out,
since it compares exact counts."""
TRUE_CLAIMS = ("1", "1 train", "2", "4", "5", "6", "8", "9", "12")
FALSE_CLAIMS = ("3", "3 to EOS", "7", "7 to EOS", "10", "10 to EOS", "11")
"""Claims of the injected set that are true, and that are false."""
EXPECTED = dict.fromkeys(TRUE_CLAIMS, "supported") | dict.fromkeys(FALSE_CLAIMS, "refuted")


def simulate_run(study: Study, rng: np.random.Generator, *, injected: bool) -> Run:
    """Simulate one run of all settings and the control."""
    members: list[tuple[Variant, Role]] = [(variant, "variant") for variant in study.variants]
    members.append((study.variant(study.reference), "control"))
    records = [
        record
        for replicate in range(study.protocol.replicates)
        for record in _simulate_replicate(study, members, replicate, rng, injected=injected)
    ]
    manifest = Manifest(
        run="simulated", study=codec.to_json(study), phases=("train", "generate"), interleaving="shared-base",
        order=tuple(record.trial for record in records), seed=0, created_unix_s=0.0, provenance={"device": "cpu"},
        fingerprint="simulated", status="complete",
    )  # fmt: skip
    return Run(path=Path("simulated"), manifest=manifest, records=tuple(records))


def _true_factors(variant: Variant, *, injected: bool) -> tuple[float, float, float]:
    """Return the true factors on step time, loss and trainable parameters."""
    if not injected:
        return 1.0, 1.0, 1.0
    alpha = variant.lora_alpha / 16
    return 1.04 ** (math.log2(variant.r / 16) / 5), 0.97 ** (math.log2(alpha) / 4), alpha


def _simulate_replicate(
    study: Study, members: list[tuple[Variant, Role]], replicate: int, rng: np.random.Generator, *, injected: bool
) -> Iterator[TrialRecord]:
    protocol, count = study.protocol, len(members)
    process = rng.normal(0.0, PROCESS_SD, (count, 1))
    steps = 0.5 * np.exp(_simulate_log_times(rng, count, protocol.turns * protocol.steps_per_turn) + process)
    requests = 0.3 * np.exp(_simulate_log_times(rng, count, protocol.generate_requests) + process)
    typical_tokens = rng.integers(8, study.workload.open_ended_tokens - 3, protocol.generate_requests)
    tokens = (typical_tokens + rng.integers(-3, 4, (count, typical_tokens.size))).astype(float)  # answers differ
    open_ended = TOKEN_S * tokens * np.exp(_simulate_log_times(rng, count, typical_tokens.size) + process)
    losses = np.exp(0.5 + rng.normal(0.0, SEED_SD) + rng.normal(0.0, LOSS_SD, count))
    losses[-1] = losses[[variant.name for variant, _ in members].index(study.reference)]
    for index, (variant, role) in enumerate(members):
        time, loss, parameters = _true_factors(variant, injected=injected)
        loss *= float(losses[index])
        yield TrialRecord(
            trial=f"r{replicate}-{variant.name}{'-control' if role == 'control' else ''}", status="ok",
            name=variant.name, variant=variant.id, role=role, replicate=replicate, position=replicate * count + index,
            interleaving="shared-base", seed=replicate, started_unix_s=0.0, wall_time_s=1.0,
            samples={
                "step_time_s": tuple(time * steps[index]), "timed_loss": (loss,) * protocol.turns,
                "request_time_s": tuple(requests[index]), "open_ended_request_time_s": tuple(open_ended[index]),
                "open_ended_tokens": tuple(tokens[index]),
            },
            values={
                "held_out_loss": loss, "trainable_parameters": 921_600.0 * parameters,
                # Twice the trained loss, so that an effect is the same part of the gain as of the loss.
                "held_out_loss_initial": 2 * math.exp(0.5),
            },
        )  # fmt: skip


def _simulate_log_times(rng: np.random.Generator, count: int, turns: int) -> NDArray[np.float64]:
    """Simulate the log times of settings that do the same work and take turns in shuffled order: settings × turns."""
    moments, burn_in = turns * count, 100
    course = signal.lfilter([1.0], [1.0, -COURSE_MEMORY], rng.normal(0.0, COURSE_SD, moments + burn_in))[burn_in:]
    shared = (course + np.linspace(0.0, math.log(1.5), moments)).reshape(turns, count)
    places = rng.permuted(np.tile(np.arange(count), (turns, 1)), axis=1)
    burst = (rng.random((turns, count)) < BURST_SHARE) * rng.lognormal(math.log(BURST_MEDIAN), 1.0, (turns, count))
    own = STEP_SD * rng.standard_t(3, (turns, count)) + burst
    return np.asarray((np.take_along_axis(shared, places, axis=1) + own).T)


def without_tolerance(study: Study) -> Study:
    """Return the study with tolerances and margins so small that no effect is within them."""
    claims = [
        dataclasses.replace(
            claim, parts=tuple(dataclasses.replace(part, tolerance=0.0, margin=1e-9) for part in claim.parts)
        )
        for claim in study.claims
    ]
    return dataclasses.replace(study, claims=tuple(claims))


def compute_shares(draws: int) -> Iterator[Share]:
    """Yield how often a run has a wrong verdict, how often its control fails, and how often each claim gets the
    expected verdict."""
    study = load_study(STUDY, target=Target(kind="cpu", dtype="bfloat16", why="simulated"))
    sets = {"null": study, "null, at the limit": without_tolerance(study), "injected": study}
    for seed, (name, simulated) in enumerate(sets.items(), start=1):
        rng, injected = np.random.default_rng([4, seed]), name == "injected"
        wrong, invalid, expected = 0, 0, Counter[str]()
        for _ in range(draws):
            report = judge_claims(simulate_run(simulated, rng, injected=injected))
            invalid += not report.valid
            expected.update(claim.id for claim in report.claims if claim.verdict == EXPECTED[claim.id])
            if injected:
                opposite = {"supported": "refuted", "refuted": "supported"}
                wrong += any(claim.verdict == opposite[EXPECTED[claim.id]] for claim in report.claims)
            else:
                parts = [part for claim in report.claims for part in claim.parts if part.rule != "rises"]
                wrong += any((part.rule in EFFECTS, part.verdict) in WRONG_STATEMENTS for part in parts)
        yield Share(f"claims, {name}: a verdict is wrong", wrong, draws, maximum=0.05)
        yield Share(f"claims, {name}: a control fails", invalid, draws, maximum=0.1)  # two families of controls
    for claim in study.claims:
        verdict = EXPECTED[claim.id]
        minimum = 0.8 if verdict == "supported" else None
        yield Share(f"claims, injected: {claim.id} is {verdict} ({claim.says})", expected[claim.id], draws, minimum)
