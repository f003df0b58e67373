"""From constructed operators of a step to the facts that are judged."""

import pytest

from kernels_check.observation.events import compiler_seen, reduce_operators
from kernels_check.observation.operators import BACKWARD_ROOT, COMPILED_REGION, COMPILER_LOOKUP, Operator

FLASH = "aten::_scaled_dot_product_flash_attention"
GEMM = "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>()"


def within(parent, name, call=None, shape=()):
    """An operator inside another, which is told of it."""
    child = Operator(name, input_shapes=[shape], parent=Operator(parent), call=call)
    child.parent.add_child(child)
    return child


@pytest.mark.parametrize(
    ("name", "computes"),
    [
        ("aten::mm", True),
        ("bitsandbytes::gemm_4bit", True),
        (FLASH, True),
        ("aten::add", False),
        ("aten::_softmax", False),
    ],
)
def test_what_computes_outside_of_compiled_code_ran_eagerly(name, computes):
    """Products, 4-bit products and attention, in the call of a module, in the forward pass."""
    assert compiler_seen([Operator(name, call=3)]).eager == (frozenset({3}) if computes else frozenset())
    assert compiler_seen([Operator(name)]).eager == frozenset()
    assert compiler_seen([within(f"{COMPILED_REGION}: 0", name, 3)]).eager == frozenset()
    assert compiler_seen([within(f"{BACKWARD_ROOT}: MmBackward0", name, 3)]).eager == frozenset()


def test_regions_are_entered_in_the_forward_pass_and_looked_up():
    """Those of the backward pass are counted and were entered in no module."""
    region, back = Operator(f"{COMPILED_REGION}: 0", call=2), within(f"{BACKWARD_ROOT}: X", f"{COMPILED_REGION}: 1", 5)
    seen = compiler_seen([region, back, Operator(COMPILER_LOOKUP), Operator("aten::mm", call=2)])
    assert (seen.entered, seen.regions, seen.lookups) == ((2,), 2, 1)


@pytest.mark.parametrize(
    ("name", "shape", "mixes"),
    [
        ("aten::bmm", (2, 3, 3), True),
        ("aten::baddbmm", (2, 3, 3), True),
        ("aten::mm", (2, 3, 3), False),
        ("aten::_softmax", (2, 4, 3, 3), True),
        ("aten::_softmax", (2, 3, 3), True),
        ("aten::_softmax", (6, 3), False),
    ],
)
def test_what_may_mix_tokens_is_a_batched_product_or_a_softmax_over_them(name, shape, mixes):
    """That of a router is over two dimensions; what runs in the backward pass says nothing of the forward."""
    operator = Operator(name, input_shapes=[shape], call=4)
    assert reduce_operators([operator]).mixing == (frozenset({4}) if mixes else frozenset())
    assert reduce_operators([Operator(name, input_shapes=[shape])]).mixing == frozenset()
    assert reduce_operators([within(f"{BACKWARD_ROOT}: X", name, 4, shape)]).mixing == frozenset()


def test_kernels_are_counted_by_their_rule_and_by_their_name_where_none_knows_them():
    """Each launch."""
    profile = reduce_operators([], kernels=[GEMM, GEMM, "my_kernel"])
    assert sum(profile.kernels.values()) == 2
    assert len(profile.kernels) == 1
    assert profile.unclassified == {"my_kernel": 1}


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({}, "packed_cpu"),
        ({"on_cuda": True}, "fused"),
        ({"kernels": [GEMM]}, "fused"),
        ({"kernels": ["my_kernel"]}, "fused"),
    ],
)
def test_kernels_tell_that_a_step_ran_on_a_gpu(given, path):
    """Whether any rule knows them or not; without them the caller says so."""
    profile = reduce_operators([Operator("bitsandbytes::gemv_4bit", input_dtypes=["float"])], **given)
    assert [product.path for product in profile.fourbit] == [path]
