"""Counts the parameters that a variant adds to a base, and the bytes of adapter, gradients and optimizer state.

Sizes do not depend on weight values, so PEFT attaches the adapter to a base on torch's meta device: shapes and dtypes
are exact, for a model of any size on any machine, and of any type that PEFT can adapt. Bytes are those of
`lorameter.trial.memory.resident_bytes` after a step, without the rounding of an allocator or a pager.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lorameter.errors import impossible
from lorameter.models import catalogue
from lorameter.models.catalogue import ModelSource
from lorameter.models.costs.lora import optimizer_state_bytes
from lorameter.studies.study import Study
from lorameter.studies.variant import ADAMW, PAGED, LoraVariant, Variant
from lorameter.trial.building import peft_methods
from lorameter.trial.building.base_model import empty_model

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Parameters that one variant trains, and their bytes."""

    variant: str
    trainable_parameters: int
    """PEFT's own count."""
    base_parameters: int
    """Parameters of the model without the adapter; tied ones count once, quantised ones as if unquantised."""
    adapter_bytes: int
    """Bytes of all parameters that train, in their own dtypes."""
    gradient_bytes: int
    optimizer_state_bytes: int
    saved_bytes: int
    """Size of the file adapter_model.safetensors."""

    @property
    def share(self) -> float:
        """Trainable parameters as a fraction of the base's."""
        return self.trainable_parameters / self.base_parameters


def sizes_of_study(study: Study) -> tuple[Sizes, ...]:
    """The sizes of each variant of a study for its model's true shape; the weights are not needed.

    Raises:
        UsageError: the model is unknown, its configuration cannot be loaded, PEFT can adapt no layer, or biases of a
            quantised base would train.
    """
    model = study.workload.model.removeprefix(catalogue.RANDOM_PREFIX)
    source = catalogue.resolve(f"{catalogue.RANDOM_PREFIX}{model}")
    return tuple(sizes_of(variant, source) for variant in study.built)


def sizes_of(variant: Variant, source: ModelSource) -> Sizes:
    """The sizes of one variant for a model's true shape. Raises as `sizes_of_study` does."""
    if variant.optimizer not in (*ADAMW, *PAGED) or variant.optimizer_args:
        why = "no formula is known for the size of its state"
        raise impossible(f"sizes: variant {variant.name!r}", "optimizer", variant.optimizer, why, "Measure it.")
    model = _attached(variant, source)
    trainable, everything = model.get_nb_trainable_parameters()
    adapter = sum(parameter.numel() for parameter in peft_methods.own_parameters(model).values())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if isinstance(variant, LoraVariant) and trainable != adapter and variant.quantization != "none":
        raise impossible(
            f"sizes: variant {variant.name!r}", "bias", variant.bias,
            "bitsandbytes casts a bias to the type of its input in the first step, so its bytes are not known before",
            'Use bias = "none", or quantization = "none".',
        )  # fmt: skip
    # PEFT also saves the initial adapter if it changed the base: twice the rank.
    saved = model
    if isinstance(variant, LoraVariant) and variant.rewrites_base:
        saved = _attached(dataclasses.replace(variant, r=2 * variant.r), source)
    size = sum(parameter.nbytes for parameter in trained)
    return Sizes(
        variant=variant.name,
        trainable_parameters=trainable,
        base_parameters=everything - adapter,
        adapter_bytes=size,
        gradient_bytes=size,  # a gradient has the dtype of its parameter
        optimizer_state_bytes=optimizer_state_bytes(
            variant.optimizer, [(parameter.numel(), parameter.element_size()) for parameter in trained]
        ),
        saved_bytes=_file_bytes(peft_methods.saved_tensors(saved)),
    )


def _attached(variant: Variant, source: ModelSource) -> Any:
    """The PEFT model of a variant without storage, and without options that do not affect sizes."""
    plain = dataclasses.replace(variant, prepare_for_kbit=False, gradient_checkpointing=False)
    if isinstance(plain, LoraVariant):
        plain = dataclasses.replace(plain, init_lora_weights="default")
    with torch.device("meta"):
        base = empty_model(source, variant)
        try:
            return peft_methods.attach(base, plain)
        except ValueError as error:  # PEFT does not find the layers, or cannot adapt them
            raise impossible(
                f"sizes: variant {variant.name!r}", "target_modules", variant.setting("target_modules"),
                f"PEFT cannot adapt {source.label} ({error})", "Name other layers, or another model.",
            ) from None  # fmt: skip


def _file_bytes(state: Mapping[str, torch.Tensor]) -> int:
    """Size of a safetensors file: a length of 8 bytes, a JSON header padded to a multiple of 8, the data.

    Tensors are in the library's order: wide dtypes first, then by name (format of safetensors, version 1; the order
    decides how many digits the offsets have).
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-length // 8) * 8 + offset
