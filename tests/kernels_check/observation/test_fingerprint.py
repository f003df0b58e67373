"""Every byte counts, wherever it lies; what was changed alike everywhere does not cancel."""

import pytest
import torch

from kernels_check.observation.fingerprint import Fingerprinter

COLUMNS = 8192
CHANGES = {
    "negated": lambda value: -value,
    "every second negated": lambda value: torch.where(torch.arange(COLUMNS) % 2 == 0, -value, value),
    "doubled": lambda value: value * 2,
    "rows reversed": lambda value: value.flip(0),
    "two rows swapped": lambda value: value[[1, 0, *range(2, len(value))]],
    "rolled by one": lambda value: value.roll(1, 1),
    "neighbours swapped": lambda value: value[:, torch.arange(COLUMNS) ^ 1],
    "words swapped": lambda value: value[:, torch.arange(COLUMNS) ^ 4],
    "a row of zeros": lambda value: value.index_fill(0, torch.tensor([7]), 0),
    "another shape": lambda value: value.reshape(-1, COLUMNS // 2),
}


@pytest.fixture(params=[False, True], ids=["read", "folded"])
def take(request):
    """A fingerprint in each of the ways: as on the CPU, and as on another device."""
    return lambda tensor: Fingerprinter(folds=lambda device: request.param)(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_follows_a_rule_is_seen(change, dtype, take):
    """As an exclusive or of the words, or a plain sum, would not see most of these."""
    value = (torch.randn(20, COLUMNS, generator=torch.Generator().manual_seed(1)) * 20).to(dtype)
    changed = CHANGES[change](value).contiguous()
    assert take(changed) != take(value)


@pytest.mark.parametrize("place", [0, 1, 32_767, 32_768, 98_303, 98_304, 98_308])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_bit_is_seen_anywhere(place, bit, take):
    """In the first row and the last, and in what is left over after whole rows."""
    value = torch.randint(256, (3 * 32_768 + 5,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    before = take(value)
    value[place] ^= 1 << bit
    assert take(value) != before


def test_the_elements_are_read_in_their_order(take):
    """Not as they lie in memory, nor by where their memory begins."""
    value = torch.randn(300, 400)
    assert take(value.t()) == take(value.t().contiguous())
    raw = torch.randint(256, (100_003,), dtype=torch.uint8)
    assert take(raw[1:]) == take(raw[1:].clone())
    assert take(value) != take(value.double())


@pytest.mark.parametrize("value", [torch.zeros(0), torch.tensor(1.5), torch.ones(3, dtype=torch.complex64).conj()])
def test_odd_tensors_have_one(value, take):
    """Empty, without a dimension, conjugated in name only."""
    assert take(value) == take(value.clone())


def test_shared_memory_is_read_once():
    """Under however many names."""
    take = Fingerprinter()
    value = torch.randn(100)
    assert take(value) == take(value.view(100))
    assert take.bytes == 400


def test_freed_memory_is_not_read(take):
    """As a sharded parameter's whole is between two forwards."""
    value = torch.ones(10)
    value.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="freed"):
        take(value)
