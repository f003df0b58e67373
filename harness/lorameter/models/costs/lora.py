"""Sizes of an adapter: its linear layers, its parameters, and its optimizer state.

LoRA adds two matrices to a frozen layer, r by inputs and outputs by r (Hu et al. 2021, arXiv 2106.09685, section 4.1);
DoRA adds a magnitude for each output (Liu et al. 2024, arXiv 2402.09353). Sizes do not depend on weight values, and
this module does not need torch. Functions of a model raise `UnknownLayersError` if its type is not in
`lorameter.models.shapes`.
"""

from __future__ import annotations

from collections.abc import Iterable

from lorameter.errors import refused_value
from lorameter.models.shapes import ModelShape, UnknownLayersError, find_family, linear_widths, unknown_layers
from lorameter.studies.variant import ADAMW, ALL_LINEAR, PAGED, LoraVariant, Variant

PAGED_FROM_ELEMENTS = 100_000
"""bitsandbytes pages the state of a tensor from this many elements on (`Optimizer8bit.get_state_buffer`)."""
EIGHT_BIT = "paged_adamw_8bit"
EIGHT_BIT_FROM_ELEMENTS = 4096
"""Smaller tensors keep float32 state in an 8-bit optimizer (its `min_8bit_size`)."""
STEP_BYTES = 4
"""torch stores the step count of each tensor as a float32 (`torch.optim.adam`, `_get_scalar_dtype`); bitsandbytes as a
Python number."""
BLOCK = 256
"""Elements that share a float32 scale in an 8-bit moment (`Optimizer2State.init_state` of bitsandbytes)."""
EMBEDDINGS = ("embed_tokens", "lm_head")
"""Modules outside the blocks that PEFT can adapt, by their names in all known families."""
MOMENT_TABLE_BYTES = 256 * 4
"""The values that an 8-bit moment can have; one table for each of the two moments, shared by all tensors."""


def missing_formula(variant: Variant, shape: ModelShape) -> str | None:
    """Why there is no formula for the memory of a variant on a model, and the remedy; None if there is one."""
    if not isinstance(variant, LoraVariant):
        return f"no formula is known for the method {variant.method_name}; measure it"
    if variant.optimizer not in (*ADAMW, *PAGED) or variant.optimizer_args:
        return f"no formula is known for the state of the optimizer {variant.optimizer}; measure it"
    return unknown_layers(shape)


def as_lora(variant: Variant, shape: ModelShape) -> LoraVariant:
    """The variant as LoRA. Raises `UnknownLayersError` if there is no formula for its memory."""
    if why := missing_formula(variant, shape):
        raise UnknownLayersError(why)
    assert isinstance(variant, LoraVariant)
    return variant


def target_names(variant: LoraVariant, shape: ModelShape) -> tuple[str, ...]:
    """The target modules of a variant, by default PEFT's.

    Raises:
        UsageError: there are none, which PEFT would refuse.
    """
    targets = variant.target_modules or find_family(shape).targets
    if not targets:
        raise refused_value(
            f"variant {variant.name!r}", "target_modules", variant.target_modules,
            f"PEFT has no default for model type {shape.architecture!r}", 'Name layers, or use ("all-linear",).',
        )  # fmt: skip
    return targets


def unknown_targets(variant: LoraVariant, shape: ModelShape) -> tuple[str, ...]:
    """The target modules of a variant that are neither a linear layer of the model nor its embedding or head."""
    known = {ALL_LINEAR, *linear_widths(shape), *EMBEDDINGS}
    return tuple(target for target in variant.target_modules if target.rpartition(".")[2] not in known)


def adapted_widths(variant: Variant, shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Input and output widths of the layers of a block that have an adapter; other targets are left out."""
    targets = target_names(as_lora(variant, shape), shape)
    names = {target.rpartition(".")[2] for target in targets}
    widths = linear_widths(shape).items()
    return {name: width for name, width in widths if ALL_LINEAR in targets or name in names}


def adapter_tensors(variant: Variant, shape: ModelShape) -> list[int]:
    """Elements of each tensor that the adapter adds to the model."""
    block, lora = [], as_lora(variant, shape)
    for inputs, outputs in adapted_widths(variant, shape).values():
        block += [lora.r * inputs, lora.r * outputs, *([outputs] if lora.use_dora else [])]
    return shape.layers * block


def adapter_parameters(variant: Variant, shape: ModelShape) -> int:
    """Parameters that the adapter adds: r (in + out) for each target, with DoRA also a magnitude for each output.
    Trained biases of the base are not part of the adapter."""
    return sum(adapter_tensors(variant, shape))


def optimizer_state_bytes(optimizer: str, trained: Iterable[tuple[int, int]]) -> int:
    """Bytes of all state after a first step, by the rules of torch 2.13 and bitsandbytes 0.50.

    torch's AdamW stores two moments in the parameter's dtype and a step count. bitsandbytes stores moments in float32,
    or in 8 bits with a scale for each block of 256 elements, but in float32 for tensors with less than 4096 elements.

    Args:
        optimizer: the variant's optimizer.
        trained: for each trained tensor, its elements and the bytes of one element.
    """
    tensors = list(trained)
    if optimizer in ("adamw", "adamw_fused"):
        return sum(2 * elements * size + STEP_BYTES for elements, size in tensors)
    tables = optimizer == EIGHT_BIT and any(elements >= EIGHT_BIT_FROM_ELEMENTS for elements, _ in tensors)
    return sum(_moments(optimizer, elements) for elements, _ in tensors) + (2 * MOMENT_TABLE_BYTES if tables else 0)


def paged_state_bytes(optimizer: str, elements: Iterable[int]) -> int:
    """The part of bitsandbytes' state that is paged on a GPU: the moments of large tensors, without the scales of 8-bit
    moments."""
    if not optimizer.startswith("paged"):
        return 0
    size = 2 if optimizer == EIGHT_BIT else 8
    return sum(size * one for one in elements if one >= PAGED_FROM_ELEMENTS)


def _moments(optimizer: str, elements: int) -> int:
    if optimizer == EIGHT_BIT and elements >= EIGHT_BIT_FROM_ELEMENTS:
        return 2 * (elements + 4 * -(-elements // BLOCK))
    return 8 * elements


# --- stored base weights ----------------------------------------------------------------------------------------------


def element_bytes(dtype: str) -> int:
    """Bytes of an element."""
    return 4 if dtype == "float32" else 2


def weight_bytes(inputs: int, outputs: int, variant: Variant) -> int:
    """Bytes of the weights, without quantisation constants."""
    return -(-inputs * outputs * variant.stored_bits // 8)
