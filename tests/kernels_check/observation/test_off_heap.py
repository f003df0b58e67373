"""Copies whose pages go back to the system as soon as nobody holds them."""

import pytest
import torch

from harness.trial.process import give_back_free, resident_now
from kernels_check.observation.off_heap import LEAST_BYTES, copy_of

LARGE = LEAST_BYTES // 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("size", [0, 1, 4 * LARGE])
def test_a_copy_has_what_the_tensor_has_and_is_another(dtype, size):
    """Of every type, empty or large, to the bit; what is written to one is not in the other."""
    tensor = torch.arange(size).remainder(100).to(dtype).reshape(-1, 1)
    copy = copy_of(tensor)
    assert (copy.shape, copy.dtype, copy.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
    assert torch.equal(copy.view(torch.uint8), tensor.view(torch.uint8))
    tensor.view(torch.uint8).fill_(3)
    assert size == 0 or not torch.equal(copy.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2 * LARGE).view(2, -1).t(), torch.ones(LARGE, dtype=torch.complex64).conj(),
        torch.eye(300).to_sparse(), torch.empty(LARGE, device="meta"), torch.zeros(()).expand(2 * LARGE),
    ],
    ids=["transposed", "conjugate", "sparse", "meta", "expanded"],
)  # fmt: skip
def test_what_is_no_row_of_elements_is_copied_as_torch_does(tensor):
    """Strides, marks and layouts are kept."""
    copy, clone = copy_of(tensor), tensor.clone()
    assert (copy.shape, copy.layout, copy.device, copy.is_conj()) == (
        clone.shape,
        clone.layout,
        clone.device,
        clone.is_conj(),
    )
    assert copy.layout != torch.strided or copy.stride() == clone.stride()


def test_nothing_of_it_stays():
    """However small the pieces and whatever the heap holds between them: the resident set is what it was."""
    tensors = [torch.zeros(LARGE + 8) for _ in range(400)]
    give_back_free()
    before, between = resident_now(), []
    copies = []
    for tensor in tensors:
        copies.append(copy_of(tensor))
        between.append(torch.zeros(100))
    assert resident_now() - before > 0.9 * 400 * LEAST_BYTES
    del copies
    assert resident_now() - before < 0.1 * 400 * LEAST_BYTES
