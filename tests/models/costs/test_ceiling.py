"""Tests of shares of a peak: arithmetic, interval, formula and source."""

from __future__ import annotations

import dataclasses

import pytest

from lorameter.models.costs.ceiling import TimeSpan, ceiling_of, product_rate, utilisation
from lorameter.models.costs.flops import computed_tokens, row_tokens, six_n, training_flops
from lorameter.models.costs.peaks import Peak
from lorameter.models.shapes import ModelShape
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload

SHAPE = ModelShape(
    hidden_size=64, intermediate_size=128, layers=2, heads=2, kv_heads=1, head_dim=32, vocab_size=100, context=64,
    tied=False, architecture="llama",
)  # fmt: skip
VARIANT = LoraVariant(r=4, target_modules=("q_proj", "v_proj"), gradient_checkpointing=True)
WORKLOAD = Workload(sequence_length=32, batch_size=2)
USEFUL, COMPUTED = row_tokens(VARIANT, WORKLOAD), computed_tokens(VARIANT, WORKLOAD)
PEAK = Peak(device="Test GPU", rate="bfloat16", per_s=1e10, source="Test GPU datasheet")
STEP = TimeSpan(value=0.01, low=0.008, high=0.0125)


def test_a_share_with_its_interval():
    """The upper end of the time gives the lower end of the share."""
    found = utilisation("MFU", 50_000_000, STEP, PEAK, "products")
    assert found.value == pytest.approx(0.5)
    assert (found.low, found.high) == (pytest.approx(0.4), pytest.approx(0.625))
    assert str(found) == (
        "MFU 50.0% [40.0%, 62.5%] = products (5e+07 FLOP) / (0.01 s × peak), "
        "peak 10 bfloat16 GFLOP/s of Test GPU (Test GPU datasheet)"
    )


def test_three_figures_of_one_step():
    """MFU counts the FLOPs that the model needs, HFU the computed ones, and 6N those of training all weights."""
    ceiling = ceiling_of(SHAPE, VARIANT, STEP, PEAK, useful=USEFUL, computed=COMPUTED)
    assert ceiling.mfu.value == pytest.approx(training_flops(SHAPE, VARIANT, USEFUL).model / 1e8)
    assert ceiling.hfu.value == pytest.approx(training_flops(SHAPE, VARIANT, COMPUTED).hardware / 1e8)
    assert ceiling.six_n.value == pytest.approx(six_n(SHAPE, USEFUL) / 1e8)
    assert ceiling.mfu.low < ceiling.mfu.value < ceiling.mfu.high
    assert "which LoRA does not compute" in str(ceiling.six_n)


def test_recomputation_does_not_count_for_mfu():
    """Recomputation counts for HFU only."""
    plain = dataclasses.replace(VARIANT, gradient_checkpointing=False)
    with_it, without = (
        ceiling_of(SHAPE, variant, STEP, PEAK, useful=USEFUL, computed=COMPUTED) for variant in (VARIANT, plain)
    )
    assert with_it.mfu == without.mfu
    assert with_it.hfu.value > without.hfu.value


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, "bfloat16"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "float32", "tf32": True}, "tf32"),
        ({"dtype": "float32", "autocast": "float16"}, "float16"),
        ({"quantization": "nf4", "compute_dtype": "float16"}, "float16"),
        ({"quantization": "nf4", "compute_dtype": "float32", "tf32": True}, "tf32"),
    ],
)
def test_the_type_that_a_step_multiplies_in(options, rate):
    """The rate is that of the frozen layers: the compute dtype of 4-bit layers, autocast's dtype, or the weights'
    dtype."""
    assert product_rate(LoraVariant(**options)) == rate


@pytest.mark.parametrize(("rate", "words"), [("memory", "data in a cache"), ("bfloat16", "which is no bound here")])
def test_a_share_above_the_peak_is_explained(rate, words):
    """The text says so, also for a share without an interval."""
    peak = Peak(device="Test CPU", rate=rate, per_s=100.0, source="measured")
    text = str(utilisation("use", 100, TimeSpan(value=0.5, low=None, high=None), peak, "work"))
    assert "200.0% [no interval]" in text
    assert "above 100 %" in text
    assert words in text
