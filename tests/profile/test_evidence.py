"""Tests of times that the evidence takes from the operators of a phase, on constructed phases."""

import pytest

from lorameter.profile.evidence import dropout_s, unpacking_s
from lorameter.records.activity import OperatorUse, PhaseActivity


def phase(*uses, **fields):
    operators = tuple(OperatorUse(name=name, category=category, calls=1.0, time_s=s) for name, category, s in uses)
    return PhaseActivity(phase="forward", window_s=1.0, busy_s=0.9, operators=operators, **fields)


FUNCTION, PRODUCT = ("MatMul4Bit", "other", 0.01), ("aten::mm", "matmul", 0.5)
UNPACKED = ("bitsandbytes::dequantize_4bit", "dequantize", 0.1)


@pytest.mark.parametrize(
    ("uses", "seconds"),
    [
        ((UNPACKED, PRODUCT), 0.1),  # a GPU kernel, which calls no operator
        ((UNPACKED, FUNCTION, PRODUCT), 0.11),
        ((FUNCTION, ("bitsandbytes::gemm_4bit", "matmul", 0.4)), 0.0),  # packed weights are not unpacked
        ((PRODUCT,), 0.0),
    ],
)
def test_unpacking_is_with_the_functions_around_it(uses, seconds):
    """Surrounding functions count with the unpacking, and not where nothing is unpacked."""
    assert unpacking_s(phase(*uses)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [({"totals_s": {"aten::dropout": 0.2}}, 0.2), ({"dropout_backward_s": 0.05}, 0.1), ({}, 0.05)],
)
def test_masks_are_drawn_and_multiplied_with_again(fields, seconds):
    """Dropout time is that of its operator with all that it calls, or of kernels by name, plus the backward pass."""
    drawn = ("fused_dropout_kernel_vec", "elementwise", 0.05)
    assert dropout_s(phase(drawn, PRODUCT, **fields)) == pytest.approx(seconds)
