"""Fixtures of in-memory runs with known values: a small study with one axis of r and one of alpha."""

import dataclasses
import math
import random
from pathlib import Path

import pytest

from lorameter.records import codec
from lorameter.records.record import Notice, TrialRecord
from lorameter.records.store import Manifest, Run
from lorameter.studies.claim import Claim, ClaimPart
from lorameter.studies.variant import LoraVariant

TURNS = 9
VARIANTS = (
    LoraVariant(name="centre", r=8, lora_alpha=16), LoraVariant(name="r4", r=4, lora_alpha=16),
    LoraVariant(name="r16", r=16, lora_alpha=16), LoraVariant(name="a8", r=8, lora_alpha=8),
    LoraVariant(name="a32", r=8, lora_alpha=32),
)  # fmt: skip


@pytest.fixture
def claim():
    """A function that makes a claim of one part, or of several given as dictionaries."""

    def make(*parts, **first):
        given = parts or (first,)
        made = tuple(ClaimPart(**{"axis": "r", "metric": "step_time_s"} | part) for part in given)
        return Claim(id="c", says="a sentence", original="a number", parts=made)

    return make


@pytest.fixture
def make_run(small_study):
    """A function that makes a run as it would be read back.

    `factors` multiply the times of a variant by name; the noise of a turn is shared by all variants and far larger than
    `noise`, that of a process. `control` multiplies the control's times. `change` changes each record and drops it by
    returning None.
    """

    def make(
        claims, factors=(), *, replicates=6, noise=0.002, control=1.0, change=lambda record: record, status="complete",
        level="shared-base", notices=(), phases=("train", "generate"), select=None, engine=None, provenance=None,
        workloads=(),
    ):  # fmt: skip
        others = tuple(LoraVariant(name=name, r=8, lora_alpha=16) for name in dict(workloads))
        variants = (*VARIANTS, *others)
        study = dataclasses.replace(
            small_study, workloads=dict(workloads), variants=variants, reference="centre", claims=tuple(claims),
            notes=("a note",), replaced={"workload.model": "another"}, engine=engine,
        )  # fmt: skip
        members = [(variant, "variant") for variant in variants if select is None or variant.name in select]
        members.append((VARIANTS[0], "control"))
        records = []
        for replicate in range(replicates):
            rng = random.Random(replicate)
            machine = [0.1 * math.exp(rng.gauss(0, 0.3)) for _ in range(TURNS)]
            for variant, role in members:
                process_noise = random.Random(f"{replicate} {variant.name} {role}").gauss(0, noise)
                factor = (
                    math.exp(process_noise)
                    * dict(factors).get(variant.name, 1.0)
                    * (control if role == "control" else 1.0)
                )
                times = tuple(turn * factor for turn in machine)
                records.append(TrialRecord(
                    trial=f"r{replicate}-{variant.name}{'-control' if role == 'control' else ''}", status="ok",
                    name=variant.name, variant=variant.id, role=role, replicate=replicate, position=len(records),
                    interleaving=level, seed=replicate, started_unix_s=1.0, wall_time_s=1.0,
                    samples={
                        "step_time_s": times, "turn_tokens": (64.0,) * TURNS, "request_time_s": times,
                    },
                    values={"held_out_loss": 2.0 * factor, "trainable_parameters": 1000.0 * variant.r},
                    memory={"adapter_bytes": 4000 * variant.r},
                ))  # fmt: skip
        order = tuple(record.trial for record in records)
        manifest = Manifest(
            run="made", study=codec.to_json(study), phases=phases, interleaving=level, order=order, seed=0,
            created_unix_s=1.0, provenance=provenance or {"device": "cpu"}, fingerprint="f", status=status,
            notices=tuple(Notice(code=code, message="", remedy="") for code in notices),
        )  # fmt: skip
        kept = tuple(changed for record in records if (changed := change(record)) is not None)
        return Run(path=Path("made"), manifest=manifest, records=kept)

    return make
