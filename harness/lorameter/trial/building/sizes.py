"""What a variant adds to a base, counted and not measured: parameters, adapter, gradients, optimizer state.

None of it depends on a weight's value, so the adapter is attached, by PEFT and as a trial attaches it, to a base
without storage (torch's meta device): every shape and type is the real one, of a model of any size on any machine, and
of any type that PEFT can adapt. Bytes are those that `lorameter.trial.memory.resident_bytes` finds after a
step; what an allocator or a pager rounds up is not in them.
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
    """What one variant trains, and what that takes."""

    variant: str
    trainable_parameters: int
    """PEFT's own count."""
    base_parameters: int
    """Of the model without the adapter, tied ones once, quantised ones as if they were not."""
    adapter_bytes: int
    """Everything that trains, in the type that it trains in."""
    gradient_bytes: int
    optimizer_state_bytes: int
    saved_bytes: int
    """Of the file adapter_model.safetensors."""

    @property
    def share(self) -> float:
        """Trainable parameters as a fraction of the base's."""
        return self.trainable_parameters / self.base_parameters


def sizes_of_study(study: Study) -> tuple[Sizes, ...]:
    """Each variant of a study on its model's true shape; the weights are neither needed nor looked for.

    Raises:
        UsageError: no such model, its configuration cannot be had, PEFT finds nothing to adapt in it, or biases of a
            quantised base would train.
    """
    model = study.workload.model.removeprefix(catalogue.RANDOM_PREFIX)
    source = catalogue.resolve(f"{catalogue.RANDOM_PREFIX}{model}")
    return tuple(sizes_of(variant, source) for variant in study.built)


def sizes_of(variant: Variant, source: ModelSource) -> Sizes:
    """One variant on a model's true shape. Raises as `sizes_of_study` does."""
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
    # What PEFT saves of an adapter that rewrote the base holds the initial adapter too: twice the rank.
    saved = model
    if isinstance(variant, LoraVariant) and variant.rewrites_base:
        saved = _attached(dataclasses.replace(variant, r=2 * variant.r), source)
    size = sum(parameter.nbytes for parameter in trained)
    return Sizes(
        variant=variant.name,
        trainable_parameters=trainable,
        base_parameters=everything - adapter,
        adapter_bytes=size,
        gradient_bytes=size,  # a gradient has the type of its parameter
        optimizer_state_bytes=optimizer_state_bytes(
            variant.optimizer, [(parameter.numel(), parameter.element_size()) for parameter in trained]
        ),
        saved_bytes=_file_bytes(peft_methods.saved_tensors(saved)),
    )


def _attached(variant: Variant, source: ModelSource) -> Any:
    """The PEFT model of a variant without storage, less what changes no size: an initialisation's values, how the base
    is kept while it trains."""
    plain = dataclasses.replace(variant, prepare_for_kbit=False, gradient_checkpointing=False)
    if isinstance(plain, LoraVariant):
        plain = dataclasses.replace(plain, init_lora_weights="default")
    with torch.device("meta"):
        base = empty_model(source, variant)
        try:
            return peft_methods.attach(base, plain)
        except ValueError as error:  # PEFT's own word for layers that it does not find, or cannot adapt like this
            raise impossible(
                f"sizes: variant {variant.name!r}", "target_modules", variant.setting("target_modules"),
                f"PEFT cannot adapt {source.label} ({error})", "Name other layers, or another model.",
            ) from None  # fmt: skip


def _file_bytes(state: Mapping[str, torch.Tensor]) -> int:
    """Size of a safetensors file: a length of 8 bytes, a JSON header filled up to a multiple of 8, the data.

    Tensors come in the order that the library writes: wide types first, then by name (format of safetensors, version
    1; the order decides how many digits the offsets have).
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
