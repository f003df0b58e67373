"""The path of a product with a 4-bit weight is told by what it calls; others are taken where they are computed."""

import pytest

from kernels_check.observation.operators import BACKWARD_ROOT, COMPILED_REGION, Operator
from kernels_check.observation.products import Product, fourbit_products, plain_products

GEMM, GEMV = "bitsandbytes::gemm_4bit", "bitsandbytes::gemv_4bit"


def chain(*names, dtypes=("c10::Half", "float")):
    """Operators inside one another, the outermost first."""
    made = []
    for name in names:
        one = Operator(name=name, input_dtypes=dtypes, parent=made[-1] if made else None, call=3)
        if made:
            made[-1].add_child(one)
        made.append(one)
    return made


@pytest.mark.parametrize(
    ("names", "on_cuda", "path", "dtype"),
    [
        ((GEMM, "aten::linear"), True, "dequantize", "float16"),
        ((GEMM, "bitsandbytes::dequantize_4bit"), False, "dequantize", "float16"),
        ((GEMM, "aten::empty"), True, "fused", "float16"),
        ((GEMM,), False, "unknown", "float16"),
        ((GEMV,), True, "fused", "float16"),
        ((GEMV,), False, "packed_cpu", "bfloat16"),
    ],
)
def test_the_path_of_a_4_bit_product(names, on_cuda, path, dtype):
    """By what ran inside and where; the packed kernel computes in bfloat16 whatever it is given."""
    (found,) = fourbit_products(chain(*names), on_cuda=on_cuda)
    assert (found.op, found.path, found.dtype, found.call) == (names[0], path, dtype, 3)


def test_a_product_is_taken_where_it_is_computed():
    """The innermost of those inside one another, in the type of its factors and not of what is added to them."""
    assert list(plain_products(chain("aten::linear", "aten::addmm"))) == [
        Product(op="aten::addmm", dtype="float32", call=3)
    ]
    assert [one.dtype for one in plain_products(chain("aten::mm"))] == ["float16"]
    assert [one.op for one in plain_products(chain("aten::linear", "aten::add"))] == ["aten::linear"]


@pytest.mark.parametrize("around", [BACKWARD_ROOT, GEMM])
def test_backward_passes_and_dequantised_weights_are_no_plain_products(around):
    """The one is another pass, the other the inside of a 4-bit product."""
    assert not list(plain_products(chain(around, "aten::mm")))
    assert [one.op for one in plain_products(chain("aten::checkpoint", "aten::mm"))] == ["aten::mm"]


def test_where_a_product_ran_is_noted():
    """In compiled code, and again for the backward pass."""
    (compiled,) = plain_products(chain(f"{COMPILED_REGION}: 0/0", "aten::mm"))
    assert (compiled.compiled, compiled.recomputed) == (True, False)
    (again,) = fourbit_products(chain(BACKWARD_ROOT, GEMM), on_cuda=True)
    assert (again.compiled, again.recomputed) == (False, True)
