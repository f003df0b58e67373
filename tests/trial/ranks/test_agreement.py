"""Losses of several ranks are those of one, or the step is named at which they part."""

from __future__ import annotations

import dataclasses

import pytest

from lorameter.studies.variant import LoraVariant
from lorameter.trial.ranks.trial import EXACT, ROUNDED, compare_losses, tolerance_of

VARIANT = LoraVariant(name="plain", r=4, dtype="float32")
RIGHT = (4.93485, 4.89980, 4.85847, 4.80926)
WRONG = (4.93485, 4.93347, 4.90823, 4.87422)
"""NF4 under FSDP2 as it was measured, the first forward right and all others wrong."""


def test_equal_losses_pass_and_say_how_near_they_are():
    """More steps of either do not count."""
    check = compare_losses(RIGHT, (*RIGHT, 4.0), VARIANT, 2)
    assert (check["status"], check["required"]) == ("active", True)
    assert "losses of 4 steps" in check["reason"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_step_that_parts_is_named(dtype):
    """In either precision, with both losses."""
    check = compare_losses(WRONG, RIGHT, dataclasses.replace(VARIANT, dtype=dtype), 2)
    assert check["status"] == "fallback"
    assert "step 2 has a loss of 4.93347 by 2 ranks and of 4.89980 by one" in check["reason"]


def test_what_cannot_be_compared_passes_nothing():
    """Too few steps are unknown, a loss that is none is no equal one, and dropout is drawn by each rank for itself."""
    assert compare_losses(RIGHT[:2], RIGHT[:2], VARIANT, 2)["status"] == "unknown"
    assert compare_losses((*RIGHT, float("nan")), (*RIGHT, 4.8), VARIANT, 2)["status"] == "fallback"
    dropped = compare_losses(WRONG, RIGHT, dataclasses.replace(VARIANT, lora_dropout=0.1), 2)
    assert (dropped["status"], dropped["required"]) == ("not_applicable", None)


def test_tolerances_follow_from_what_computes():
    """16 bits anywhere are rounded."""
    assert tolerance_of(VARIANT) == EXACT
    assert tolerance_of(dataclasses.replace(VARIANT, dtype="bfloat16")) == ROUNDED
    nf4 = dataclasses.replace(VARIANT, quantization="nf4", compute_dtype="bfloat16")
    assert tolerance_of(nf4) == ROUNDED
