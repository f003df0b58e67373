"""What an instrument recorded of an operator is read, and nothing where it recorded nothing."""

import pytest

from kernels_check.observation.operators import Operator


@pytest.mark.parametrize("index", [0, 1, 2])
def test_an_input_that_was_not_recorded_has_no_shape_and_no_dtype(index):
    """Operators differ in how many inputs they have, and instruments in what they record."""
    operator = Operator("aten::mm", input_shapes=[(2, 3), []], input_dtypes=["c10::BFloat16", ""])
    assert operator.shape(index) == ((2, 3), (), ())[index]
    assert operator.dtype(index) == ("bfloat16", None, None)[index]
    bare = Operator("aten::mm")
    assert (bare.shape(index), bare.dtype(index)) == ((), None)
