"""The JSON document of `parity`: as types, like those of `documents`, and made of what was found."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lorameter.records import codec

if TYPE_CHECKING:
    from lorameter.parity.facts import Parity
    from lorameter.parity.judgement import Judgement, Likeness


class PartOfWhole(msgspec.Struct, forbid_unknown_fields=True):
    """So many of so many, with the 95 % interval of the share, a fraction."""

    count: int
    of: int
    low: float
    high: float


class MeanOf(msgspec.Struct, forbid_unknown_fields=True):
    """A mean over answers, or over sequences, with its 95 % interval; null of a single one."""

    value: float
    low: float | None
    high: float | None


class WayOf(msgspec.Struct, forbid_unknown_fields=True):
    """One way of serving the adapter, compared with the reference."""

    way: str
    quantization: str
    """Of its base."""
    dtype: str
    """Of the base weights that are not quantised."""
    adapter: bool
    """false: the base without the adapter, a control."""
    merged: bool
    dequantised: bool
    """Whether the base's quantised weights were turned back into `dtype` first."""
    verdict: str
    """same: no answer differs; noise: some do, no more than the reference's from its own; differ; or failed."""
    answers: PartOfWhole | None
    """Answers that differ in a token; this and what follows is null of a way that failed."""
    first_difference: float | None
    """Place of the first token that differs, from 1, the median; null where none differs."""
    tokens: PartOfWhole | None
    """Positions of the reference's answers at which the likeliest token differs."""
    kl_mean_nats: MeanOf | None
    kl_max_nats: float | None
    difference_mean: MeanOf | None
    """Of the logits, absolute."""
    difference_max: float | None
    cosine_mean: MeanOf | None
    cosine_min: float | None
    held_out_loss: MeanOf | None
    loss_difference: MeanOf | None
    """From the reference's, in nats; above 0 is worse."""
    within_floor: bool
    """Whether it is no further from the reference than the reference from itself."""
    failure: str
    """Empty of a way that answered."""


class ParityOf(msgspec.Struct, forbid_unknown_fields=True):
    """`parity VARIANT --json`."""

    schema: int
    path: str
    study: str
    variant: str
    model: str
    device: str
    adapter: str
    """Folder of the adapter that was given; empty where it was trained."""
    training_steps: int | None
    """null of an adapter that was given."""
    reference: str
    """The way that all others are compared with."""
    reference_loss: float
    distinct_answers: int
    """Different answers of the reference; 1 of many prompts makes these hardly more than one."""
    ways: list[WayOf]
    """Beside the two controls: the reference asked again, and the base without the adapter."""
    trouble: str
    """Why no verdict can be relied on; empty where one can."""
    valid: bool
    """Whether every way answered and the controls allow a verdict."""


def parity_document(parity: Parity, judgement: Judgement, folder: Path) -> dict[str, Any]:
    """All but its schema."""
    controls = (judgement.floor, judgement.without)
    known = {one.way: one for one in (*judgement.likenesses, *controls) if one is not None}
    return {
        "path": str(folder),
        "study": parity.study,
        "variant": parity.variant.name,
        "model": parity.workload.model,
        "device": parity.device_name,
        "adapter": parity.adapter,
        "training_steps": None if parity.record is None else round(parity.record.values["training_steps"]),
        "reference": parity.reference.way,
        "reference_loss": sum(parity.reference.losses) / len(parity.reference.losses),
        "distinct_answers": judgement.distinct,
        "ways": [
            {
                **_found(known.get(way.name)),
                "way": way.name,
                "quantization": way.variant.quantization,
                "dtype": way.variant.dtype,
                "adapter": way.adapter,
                "merged": way.merged,
                "dequantised": way.dequantised,
                "failure": judgement.failures.get(way.name, ""),
            }
            for way in parity.ways[1:]
        ],
        "trouble": judgement.trouble,
        "valid": judgement.whole,
    }


def _found(one: Likeness | None) -> dict[str, Any]:
    """What was found of a way, by the names that it has there; of one that failed nothing."""
    from lorameter.parity.judgement import Likeness

    known = {} if one is None else codec.to_json(one) | {"verdict": one.verdict}
    names = [field.name for field in dataclasses.fields(Likeness) if field.name != "way"]
    return {"verdict": "failed", **dict.fromkeys(names), "within_floor": False, **known}


DOCUMENTS: tuple[type[msgspec.Struct], ...] = (ParityOf,)
PARTS: tuple[type[msgspec.Struct], ...] = (WayOf, PartOfWhole, MeanOf)
