"""Attention is told from constructed operators: what is fused by its name, what is written out by its shapes."""

import pytest

from kernels_check.observation.attention_calls import attention_calls
from kernels_check.observation.operators import BACKWARD_ROOT, Operator

B, H, Q, K, D = 2, 4, 5, 6, 8
FLASH = "aten::_scaled_dot_product_flash_attention"
SCORES = (B, H, Q, K)
FLAT = (B * H, Q, K)
QUERY, KEY = (B * H, Q, D), (B * H, D, K)
BFLOAT16, FLOAT = "c10::BFloat16", "float"


def op(name, *shapes, dtype=BFLOAT16, **more):
    return Operator(f"aten::{name}", input_shapes=shapes, input_dtypes=[dtype] * len(shapes), call=0, **more)


def before(dtype=BFLOAT16):
    return op("bmm", QUERY, KEY, dtype=dtype)


def after(dtype=BFLOAT16):
    return op("bmm", FLAT, (B * H, K, D), dtype=dtype)


def softmax(shape=SCORES, **more):
    return op("_softmax", shape, dtype=FLOAT, **more)


def found(*operators):
    return list(attention_calls(operators))


@pytest.mark.parametrize(
    ("around", "dtype"),
    [
        (([before()], []), "bfloat16"),
        (([], [after()]), "bfloat16"),
        (([before()], [after(FLOAT)]), "bfloat16"),
        (([], []), None),
    ],
)
def test_the_precision_is_that_of_the_product_that_is_there(around, dtype):
    """Of the one before the softmax, which was cast; of the one after it where the first is written out."""
    (call,) = found(*around[0], softmax(), *around[1])
    assert (call.backend, call.direction, call.dtype) == ("eager", "forward", dtype)


@pytest.mark.parametrize(
    ("operators", "count"),
    [
        ([before(), softmax(FLAT), after()], 1),
        ([before(), softmax(FLAT)], 0),
        ([softmax(FLAT), after()], 0),
        ([before(), softmax(FLAT), op("mul", FLAT, FLAT)], 0),
        ([before(), softmax(FLAT), op("bmm", (B * H, Q, D), (B * H, D, D))], 0),
        ([op("bmm", QUERY, (B * H, D, D)), softmax(FLAT), after()], 0),
        ([op("bmm", (B * H, Q + 1, D), KEY), softmax(FLAT), after()], 0),
        ([op("baddbmm", FLAT, QUERY, KEY), softmax(FLAT), after()], 1),
    ],
)
def test_three_dimensions_are_scores_between_the_products_of_attention(operators, count):
    """A softmax that makes no scores of a product, or whose weights go into none, may be a router's."""
    assert len(found(*operators)) == count


@pytest.mark.parametrize(("shape", "directions"), [(SCORES, ["backward"]), (FLAT, [])])
def test_a_backward_pass_alone_is_told_by_four_dimensions(shape, directions):
    """With the forward pass it is told by the same shape."""
    back = op("_softmax_backward_data", shape, shape, parent=Operator(f"{BACKWARD_ROOT}: SoftmaxBackward0"))
    assert [call.direction for call in found(back)] == directions
    assert [call.direction for call in found(before(), softmax(shape), after(), back)] == ["forward", "backward"]


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_forward_in_the_backward_pass_is_a_recomputation(recomputed):
    """The backward call itself is none."""
    parent = Operator(f"{BACKWARD_ROOT}: CheckpointBackward") if recomputed else None
    back = op("_softmax_backward_data", SCORES, SCORES, parent=Operator(f"{BACKWARD_ROOT}: SoftmaxBackward0"))
    calls = found(softmax(parent=parent), back)
    told = {call.direction: call.recomputed for call in calls}
    assert told == {"forward": recomputed, "backward": False}


@pytest.mark.parametrize(
    ("name", "shapes", "masked"),
    [
        ("baddbmm", (FLAT, QUERY, KEY), True),
        ("baddbmm", ((Q, K), QUERY, KEY), True),
        ("baddbmm", ((K,), QUERY, KEY), False),
        ("baddbmm", ((B * H, Q, 1), QUERY, KEY), False),
        ("baddbmm", ((), QUERY, KEY), False),
        ("baddbmm", ((B * H, Q + 1, K), (B * H, Q + 1, D), KEY), False),
        ("tril", (SCORES,), True),
        ("index_put_", (SCORES, (), (Q, K)), True),
        ("index_put_", ((B, H, Q, 9), (), SCORES), False),
        ("add", (SCORES, (B, 1, Q, K)), True),
        ("add", (SCORES, (K,)), False),
        ("add", (SCORES, ()), False),
        ("add", ((B, Q, D), (B, Q, D)), False),
    ],
)
def test_what_differs_from_key_to_key_and_is_laid_over_the_scores_masks_them(name, shapes, masked):
    """By every operator that does; a scale, a bias of each query and what is laid over other tensors are no mask."""
    (call,) = found(op(name, *shapes), softmax())
    assert call.mask is masked


def test_the_product_over_other_keys_masks_nothing():
    """Of a single key a bias of each query looks the same, so the product has to be that of the scores."""
    shapes = (B * H, Q, 1), QUERY, (B * H, D, K)
    (call,) = found(op("baddbmm", *shapes), softmax((B, H, Q, 1)))
    assert call.mask is False
    (call,) = found(op("baddbmm", (B * H, Q, 1), QUERY, (B * H, D, 1)), softmax((B, H, Q, 1)))
    assert call.mask is True


@pytest.mark.parametrize("outer", ["softmax", "_safe_softmax", "_scaled_dot_product_attention_math"])
def test_what_runs_inside_another_is_no_call_of_its_own(outer):
    """The inner half of a softmax, or the softmax of a known implementation."""
    parent = op(outer, SCORES, SCORES, SCORES)
    inner = softmax(parent=parent)
    assert [call.op for call in found(parent, inner)] == [parent.name]


@pytest.mark.parametrize(
    ("name", "shapes", "grouped", "size"),
    [
        (FLASH, [(B, 8, Q, 64), (B, 2, Q, 64)], True, 64),
        (FLASH, [(B, 8, Q, 64), (B, 8, Q, 64)], False, 64),
        (FLASH, [(8, Q, 64), (2, Q, 64)], None, 64),
        (FLASH, [(B, 8, Q, 64)], None, 64),
        (FLASH, [], None, None),
        (FLASH, [(), ()], None, None),
        ("flash_attn::_flash_attn_forward", [(B, Q, 8, 64), (B, Q, 2, 64)], None, 64),
    ],
)
def test_heads_are_read_where_the_shapes_say_them(name, shapes, grouped, size):
    """Those of torch keep them in the second of four dimensions; other libraries may not."""
    (call,) = found(Operator(name, input_shapes=shapes, input_dtypes=[BFLOAT16] * len(shapes)))
    assert (call.grouped, call.head_size) == (grouped, size)


def test_what_was_not_recorded_of_an_argument_is_not_known():
    """A causal mask and a dropout are read at their places in the operator's schema."""
    values = [None, None, None, 0.25, True]
    (call,) = found(Operator(FLASH, concrete_inputs=values))
    assert (call.causal, call.dropout) == (True, 0.25)
    (call,) = found(Operator(FLASH, concrete_inputs=values[:4]))
    assert (call.causal, call.dropout) == (None, 0.25)
    (call,) = found(Operator(FLASH))
    assert (call.causal, call.dropout, call.mask, call.dtype) == (None, None, False, None)


@pytest.mark.parametrize(("dtype", "masked"), [(FLOAT, True), ("", False)])
def test_a_mask_is_a_tensor_in_its_place(dtype, masked):
    """Of an operator that takes one."""
    dtypes = [FLOAT, FLOAT, FLOAT, dtype]
    (call,) = found(Operator("aten::_scaled_dot_product_efficient_attention", input_dtypes=dtypes))
    assert call.mask is masked
