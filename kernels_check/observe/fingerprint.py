"""A fingerprint of every byte of a tensor, taken where the tensor lies.

On the CPU it is XXH3 of the bytes, 128 bits, which is as fast as memory is read. On another device what is larger than
a few pages is folded there first: 64-bit words are mixed, multiplied with odd weights that belong to their place in the
row, and summed; the sums of the rows are then hashed. One word that differs always shows. More of them, whatever they
have in common (negated, swapped, shifted, doubled), stay hidden with a chance of less than one in a hundred million a
row. ``torch.hash_tensor`` is an exclusive or: it knows no order, and nothing of a negation.

Fingerprints of one kind of device are not those of another: compare what was taken on the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import torch
import xxhash
from torch import Tensor

_WORDS = 4096
"""In a row."""
_ROW_BYTES = _WORDS * 8
NO_MEMORY = "it has no memory: freed, or of a class that cannot be taken apart"
_ROWS = 2048
"""In a block."""
_SHIFT = 29
"""Brings down the highest bits, of which pairs would cancel in a sum of products. It is no distance of two lanes of a
word, such as 8, 16 or 32, at which all elements may have been changed alike, as by a negation."""
_SEED = 20_240_229


class Fingerprinter:
    """Takes fingerprints, and each tensor's only once, however many names it has.

    Args:
        folds: whether what lies on a kind of device is folded before it is read.
    """

    def __init__(self, folds: Callable[[str], bool] = "cpu".__ne__) -> None:
        self._folds = folds
        self._weights: dict[torch.device, Tensor] = {}
        self._taken: dict[object, tuple[Tensor, str]] = {}
        self.bytes = 0
        """Of all memory that was read."""

    def __call__(self, tensor: Tensor) -> str:
        """Fingerprint type, shape and bytes of a dense tensor, in the order of its elements.

        Raises:
            Exception: it cannot be read.
        """
        if not has_memory(tensor):
            raise ValueError(NO_MEMORY)
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in self._taken:
            self._taken[place] = (tensor, self._take(tensor))  # kept alive, so that nothing else comes to lie there
            self.bytes += tensor.numel() * tensor.element_size()
        return self._taken[place][1]

    def _take(self, tensor: Tensor) -> str:
        raw = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        hashed = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        if raw.numel() > 2 * _ROW_BYTES and self._folds(raw.device.type):
            whole = raw.numel() // _ROW_BYTES * _ROW_BYTES
            sums = torch.cat([self._fold(block) for block in _blocks(raw[:whole].view(-1, _ROW_BYTES))])
            _add(hashed, sums.view(torch.uint8))
            raw = raw[whole:]
        _add(hashed, raw)
        return hashed.hexdigest()

    def _fold(self, block: Tensor) -> Tensor:
        words = block.view(torch.int64)
        mixed = words >> _SHIFT
        mixed &= (1 << 64 - _SHIFT) - 1
        mixed ^= words
        mixed *= self._weights_on(block.device)
        return mixed.sum(-1)

    def _weights_on(self, device: torch.device) -> Tensor:
        if device not in self._weights:
            chance = torch.Generator().manual_seed(_SEED)
            self._weights[device] = (torch.randint(-(2**63), 2**63 - 1, (_WORDS,), generator=chance) | 1).to(device)
        return self._weights[device]


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor's elements lie in memory; reading one that was freed ends the process."""
    if not tensor.numel():
        return True
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = int(tensor.storage_offset() + last + 1) * tensor.element_size()
    try:
        storage = tensor.untyped_storage()
        return bool(storage.data_ptr()) and storage.nbytes() >= end
    except RuntimeError:  # a class without any
        return False


def _blocks(rows: Tensor) -> Iterator[Tensor]:
    aligned = rows.storage_offset() % 8 == 0
    for block in rows.split(_ROWS):
        yield block if aligned else block.clone()


def _add(hashed: xxhash.xxh3_128, raw: Tensor) -> None:
    """Not by way of numpy: memory that it has seen can never be resized again, which some trainers do."""
    here = raw.cpu().contiguous()
    if here.numel():
        hashed.update((ctypes.c_char * here.numel()).from_address(here.data_ptr()))
