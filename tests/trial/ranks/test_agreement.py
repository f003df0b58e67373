"""Tests of the comparison of losses: several ranks agree with one rank, or the first differing step is named."""

from __future__ import annotations

import dataclasses

import pytest

from lorameter.studies.variant import LoraVariant
from lorameter.trial.ranks.trial import compare_losses

VARIANT = LoraVariant(name="plain", r=4, dtype="float32")
RIGHT = (4.93485, 4.89980, 4.85847, 4.80926)
WRONG = (4.93485, 4.93347, 4.90823, 4.87422)
"""Measured losses of NF4 under FSDP2: the first forward is right and all others are wrong."""


def test_equal_losses_pass():
    """Additional steps of either side are ignored."""
    check = compare_losses(RIGHT, (*RIGHT, 4.0), VARIANT, 2)
    assert (check.status, check.required) == ("active", True)
    assert "losses of 4 steps" in check.reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_step_that_differs_is_named(dtype):
    """The reason has both losses, in either precision."""
    check = compare_losses(WRONG, RIGHT, dataclasses.replace(VARIANT, dtype=dtype), 2)
    assert check.status == "fallback"
    assert "step 2 has a loss of 4.93347 by 2 ranks and of 4.89980 by one" in check.reason


def test_losses_that_cannot_be_compared_do_not_pass():
    """Too few steps are unknown, NaN is a difference, and with dropout the comparison does not apply."""
    assert compare_losses(RIGHT[:2], RIGHT[:2], VARIANT, 2).status == "unknown"
    assert compare_losses((*RIGHT, float("nan")), (*RIGHT, 4.8), VARIANT, 2).status == "fallback"
    dropped = compare_losses(WRONG, RIGHT, dataclasses.replace(VARIANT, lora_dropout=0.1), 2)
    assert (dropped.status, dropped.required) == ("not_applicable", None)
