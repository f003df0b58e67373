"""Bytes of a frozen linear layer as it is stored: the weights, and the constants of their quantisation."""

from __future__ import annotations

from lorameter.studies.variant import Variant

QUANTIZATION_BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4-bit types (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""
NESTED_BLOCK = 256
"""Scales that share a float32 scale under double quantisation (same section)."""
CODEBOOK_BYTES = 16 * 4
"""The values that 4 bits stand for; each layer has a table of its own."""
NESTED_BYTES = 256 * 4 + 4
"""Under double quantisation: the values that a scale of 8 bits stands for, and the mean of the scales."""


def width(dtype: str) -> int:
    """Bytes of an element."""
    return 4 if dtype == "float32" else 2


def weight_bytes(inputs: int, outputs: int, variant: Variant) -> int:
    """The weights alone."""
    weights = inputs * outputs
    if variant.quantization == "none":
        return weights * width(variant.dtype)
    return weights if variant.quantization == "int8" else -(-weights // 2)


def constant_bytes(inputs: int, outputs: int, variant: Variant, *, repacked: bool = False) -> int:
    """The constants: a float32 for each output in 8 bits; in 4 bits a table, and a scale for each block.

    `repacked` is bitsandbytes' CPU layout of 4-bit weights, with one bfloat16 scale a block and no double quantisation
    (`_convert_weight_packed_for_cpu` of bitsandbytes 0.50).
    """
    if variant.quantization == "none":
        return 0
    if variant.quantization == "int8":
        return 4 * outputs
    blocks = -(-inputs * outputs // QUANTIZATION_BLOCK)
    if variant.double_quant and not repacked:
        return CODEBOOK_BYTES + blocks + 4 * -(-blocks // NESTED_BLOCK) + NESTED_BYTES
    return CODEBOOK_BYTES + (2 if repacked else 4) * blocks
