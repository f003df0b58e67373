"""Builds the trainable model of a variant (base with adapter, optimizer, schedule), and counts its sizes.

The module only translates names for PEFT, bitsandbytes and torch. Seeds are set only here: before the adapter is
attached (its A matrices are random) and before the first step (dropout).

Sizes do not depend on weight values, so PEFT attaches the adapter to a base on torch's meta device: shapes and dtypes
are exact, for a model of any size on any machine, and of any type that PEFT can adapt. Bytes are those of
`lorameter.trial.memory.resident_bytes` after a step, without the rounding of an allocator or a pager.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import numpy as np
import torch
from transformers import get_scheduler
from transformers.integrations.liger import apply_liger_kernel

from kernels_check.check import Check
from kernels_check.observe.digest import Fingerprinter
from lorameter.errors import UsageError, refused_value
from lorameter.models import catalogue
from lorameter.models.catalogue import ModelSource
from lorameter.models.costs.lora import optimizer_state_bytes, paged_state_bytes
from lorameter.records import codec
from lorameter.records.record import PartialRecord, judge_required
from lorameter.studies.request import TrialRequest
from lorameter.studies.study import Study
from lorameter.studies.variant import ADAMW, PAGED, FullVariant, LoraVariant, PeftVariant, Variant
from lorameter.trial.building import peft_methods
from lorameter.trial.building.base_cache import open_base
from lorameter.trial.building.base_model import empty_model
from lorameter.trial.building.peft_methods import (
    activate,
    adapted_layers,
    attach,
    attach_second,
    find_update_hook,
    make_optimizer,
    start_prefix,
    unmixable_layers,
)
from lorameter.trial.data.stream import Batch, TokenStream


@dataclass(frozen=True, slots=True)
class TrainableModel:
    """The PEFT model, the callable that runs its forward pass (compiled or distributed), optimizer and schedule."""

    model: Any
    forward: Any
    optimizer: torch.optim.Optimizer
    schedule: Any
    adapter: str
    """Name of the adapter that trains; the model may also hold adapters of other trials."""
    after_update: Callable[[int], None] | None = None
    """Called after each update with the number of the step, from 1; None if the method needs no call."""

    @property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """The parameters that train while this trial's adapter is active."""
        return tuple(p for p in self.model.parameters() if p.requires_grad)


DATA_BATCHES = 8
"""Batches for a data-dependent initialisation."""
_SEED_STRIDE = 1_000_003
"""Difference between the seeds of two ranks; larger than the replicates of any run."""


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build(
    request: TrialRequest,
    *,
    steps: int,
    shared: SharedBase,
    distribute: Callable[[Any], Any] | None = None,
    rank: int = 0,
) -> TrainableModel:
    """Load the base if this process has none yet, attach the adapter, and make the optimizer.

    Args:
        request: variant, workload, device and seed.
        steps: optimizer steps of the learning-rate schedule.
        shared: the base of this process, which may have adapters of other trials.
        distribute: wraps the model for training on several ranks; returns the callable of its forward pass.
        rank: rank of this process; each rank draws its own dropout.
    """
    variant = request.variant
    set_precision(variant)
    model = shared.model
    adapter = "default" if model is None else f"adapter{len(model.peft_config)}"
    if model is None:
        base, shared.is_converted = open_base(request)
        if variant.liger_kernel:
            apply_liger_kernel(base, None)  # before the adapter: it patches the forwards of the model's own classes
        seed_everything(request.seed)
        model = shared.model = attach(base, variant, adapter, batches=lambda: _batches(request), steps=steps)
    else:
        seed_everything(request.seed)
        attach_second(model, variant, adapter)
        activate(model, adapter)
    if request.workload.adapters > 1 and (unmixable := unmixable_layers(model)):
        raise UsageError(
            f"workload: adapters = {request.workload.adapters}: PEFT cannot mix adapters in a batch if it adapts a "
            f"parameter of {unmixable[0]}. Remove that layer from target_modules, or remove adapters."
        )
    if isinstance(variant, PeftVariant) and variant.prefix_text:
        start_prefix(model, request.workload.model, variant.prefix_text)
    if request.slowdown_rows:
        inject_work(model, request.slowdown_rows)
    model.train()
    forward = model if distribute is None else distribute(model)  # before the optimizer: shards are other parameters
    optimizer = make_optimizer(model, variant)
    schedule = get_scheduler(
        variant.schedule, optimizer, num_warmup_steps=round(variant.warmup_ratio * steps), num_training_steps=steps
    )
    if variant.compile:
        for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
            os.environ[variable] = str(Path(request.scratch) / name)  # a filled cache would make this trial look faster
        forward = torch.compile(model)
    seed_everything(request.seed + 1 + rank * _SEED_STRIDE)
    return TrainableModel(model, forward, optimizer, schedule, adapter, find_update_hook(model))


def _batches(request: TrialRequest) -> list[Batch]:
    """The inputs of the first steps, for a data-dependent initialisation."""
    stream = TokenStream(Path(request.tokens_path), request.workload, request.variant, request.device)
    batches = [stream.take() for _ in range(DATA_BATCHES)]
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]


def set_precision(variant: Variant) -> None:
    """Allow or forbid TF32 tensor cores for float32 products."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if variant.tf32 else "ieee"


# --- shared base ------------------------------------------------------------------------------------------------------


T = TypeVar("T")


class SharedBase:
    """The base of one process, loaded by the first trial that is built. Several trials attach their adapters to it.

    The base is frozen, so trials can share it: each has its own adapter, optimizer and random state, and is active
    during its turns only. To make results bit-equal to those of an isolated trial, an adapter is attached under its own
    seed, and the random state of a trial is restored at its next turn. Adapters are switched outside every timed
    window.

    Adapters that change the base cannot share it (see `lorameter.run.build_plan`): the digest of the base must be the
    same at the end.
    """

    def __init__(self) -> None:
        self.model: Any = None
        """The PEFT model with the adapters of all trials; None before the first trial is built."""
        self.is_converted = False
        """Whether this process read, converted and quantised it."""
        self._digest = ""
        self._found: dict[str, Any] = {}

    def once(self, name: str, find: Callable[[], T]) -> T:
        """The result of `find`, computed by the first trial that calls this: a property of the shared base."""
        if name not in self._found:
            self._found[name] = find()
        return cast(T, self._found[name])

    def remember(self) -> None:
        """Compute the digest of the base, which must not change from now on; later calls do nothing."""
        self._digest = self._digest or base_digest(self.model)

    def unchanged(self) -> bool:
        """Whether the base still has the digest of `remember`; computed once, after all trials have ended."""
        return self.once("unchanged", lambda: self._digest == base_digest(self.model))


def base_digest(model: Any) -> str:
    """Hash all bytes of every parameter that belongs to no adapter; 4-bit weights must be in their stored layout.
    Parameters on a GPU are read there."""
    own, take = peft_methods.own_parameters(model), Fingerprinter()
    return " ".join(take(parameter.data) for name, parameter in model.named_parameters() if name not in own)


# --- injected slow-down -----------------------------------------------------------------------------------------------


WIDTH = 64
"""Inner size of the product: 16 KiB in float32, which stays in the L1 cache."""


def inject_work(model: torch.nn.Module, rows: int) -> None:
    """Add a product of (rows, 64) and (64, 64), on the model's device, to every adapted layer's forward pass: a
    slow-down of known cause, which a protocol should detect.

    The result of the float32 product is discarded, so losses do not change. As in a real regression, a layer's forward
    pass runs one more kernel, unlike with a `sleep`. The factors are narrow: one as wide as the layer would be read
    from memory each time, so small slow-downs would be impossible.
    """
    device = next(model.parameters()).device
    factors = torch.ones(rows, WIDTH, device=device), torch.ones(WIDTH, WIDTH, device=device)

    def multiply(module: Any, inputs: Any) -> None:
        with torch.no_grad():
            torch.mm(*factors)

    for layer in adapted_layers(model).values():
        layer.register_forward_pre_hook(multiply)


# --- requirements -----------------------------------------------------------------------------------------------------


def judge_checks(fragment: PartialRecord, checks: Sequence[Check], request: TrialRequest) -> PartialRecord:
    """Add checks to a fragment; it becomes invalid if a required path is not active."""
    added = msgspec.structs.replace(fragment, checks=(*fragment.checks, *map(codec.to_json, checks)))
    required: dict[str, Any] = {check.path: check.required for check in checks if check.required is not None}
    return judge_required(added, required, name=request.variant.name, allow_fallback=request.allow_fallback)


BACKENDS = {"sdpa": "fused", "eager": "eager", "flash_attention_2": "flash_attention_2", "flex_attention": "flex"}
"""The attention backend that kernels_check observes, by the setting `attention` of a variant."""


def build_requirements(
    variant: Variant, trained_shapes: tuple[int, ...], *, packed: bool, on_linear: bool = True
) -> dict[str, Any]:
    """Requirements for kernels_check that follow from a variant, by path: quantization = "nf4" requires nf4. A study
    can add more.

    Args:
        variant: the variant as in the study.
        trained_shapes: elements of each trained tensor; they decide which share of the state bitsandbytes pages.
        packed: whether the workload packs records, which must then be isolated from each other.
        on_linear: whether linear layers have the adapter; their storage is then checked, else that of the whole base.
    """
    bits = {"none": 32 if variant.dtype == "float32" else 16, "int8": 8}.get(variant.quantization, 4)
    full, linear_4bit = isinstance(variant, FullVariant), variant.is_4bit and on_linear
    optimizer = peft_methods.find_optimizer(variant)  # a class, or a function of PEFT, which chooses the class itself
    share = 0.0
    if variant.optimizer in PAGED:
        paged = paged_state_bytes(variant.optimizer, trained_shapes)
        share = paged / optimizer_state_bytes(variant.optimizer, [(elements, 4) for elements in trained_shapes])
    required: dict[str, Any] = {
        "attention.backend": BACKENDS[variant.attention],
        # PEFT's preparation casts the norms to float32, which makes queries and keys float32 unless autocast converts
        # them.
        "attention.dtype": variant.autocast or ("float32" if variant.prepare_for_kbit else variant.dtype),
        "base.bits": bits if on_linear else None,
        "base.quant_type": variant.quantization if on_linear else None,
        "base.double_quant": variant.double_quant if linear_4bit else None,
        "base.compute_dtype": variant.compute_dtype if linear_4bit else None,
        "base.bytes_in_4bit": 0.01 if variant.is_4bit and not on_linear else None,
        "base.frozen": None if variant.trains_base else True,  # biases of the base may be meant to train
        "base.learning": True if full else None,
        "peft.attached": None if full else True,
        "peft.learning": None if full else True,
        "peft.dropout": float(variant.lora_dropout) if isinstance(variant, LoraVariant) else None,
        "peft.dtype": variant.adapter_dtype,
        "optimizer.class": (
            f"{optimizer.__module__.partition('.')[0]}.optim.{optimizer.__name__}"
            if isinstance(optimizer, type)
            else None
        ),
        "optimizer.fused": variant.optimizer == "adamw_fused" or None,
        # If all tensors are too small to be paged, a notice is given (`lorameter.run.feasibility`).
        "optimizer.paged_share": max(0.01, share - 0.02) if share else None,
        "tf32": (variant.tf32 and variant.multiplies_float32) or None,
        "compile": variant.compile or None,
        # Liger replaces these in every supported architecture, and the rotary embedding in some.
        "fused.kernels": "rms_norm+mlp+loss" if variant.liger_kernel else None,
        "packing.isolated": packed or None,
        "checkpointing": variant.gradient_checkpointing,
        "mode": "train",
    }
    return {path: value for path, value in required.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Parameters that one variant trains, and their bytes."""

    variant: str
    trainable_parameters: int
    """PEFT's own count; for full fine-tuning, all parameters."""
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
    return tuple(count_sizes(variant, source) for variant in study.built)


def count_sizes(variant: Variant, source: ModelSource) -> Sizes:
    """The sizes of one variant for a model's true shape. Raises as `sizes_of_study` does."""
    if variant.optimizer not in (*ADAMW, *PAGED) or variant.optimizer_args:
        why = "no formula is known for the size of its state"
        raise refused_value(f"sizes: variant {variant.name!r}", "optimizer", variant.optimizer, why, "Measure it.")
    model = _attached(variant, source)
    numbers = (sum(parameter.numel() for parameter in model.parameters()),) * 2  # if it is no model of PEFT
    trainable, everything = getattr(model, "get_nb_trainable_parameters", lambda: numbers)()
    adapter = sum(parameter.numel() for parameter in peft_methods.own_parameters(model).values())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if isinstance(variant, LoraVariant) and trainable != adapter and variant.quantization != "none":
        raise refused_value(
            f"sizes: variant {variant.name!r}", "bias", variant.bias,
            "bitsandbytes casts a bias to the type of its input in the first step, so its bytes are not known before",
            'Use bias = "none", or quantization = "none".',
        )  # fmt: skip
    # PEFT also saves the initial adapter if it changed the base: twice the rank.
    if isinstance(variant, LoraVariant) and variant.rewrites_base:
        model = _attached(dataclasses.replace(variant, r=2 * variant.r), source)
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
        saved_bytes=safetensors_bytes(peft_methods.saved_tensors(model)),
    )


_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def safetensors_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Size of the safetensors file (format version 1) of these tensors: the header with its length, padded to a
    multiple of 8 bytes, and the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):  # the order of the library
        begin, end = end, end + tensors[name].nbytes
        kind, shape = _TYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    written = 8 + len(json.dumps(header, separators=(",", ":")))
    return written + -written % 8 + end


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
            raise refused_value(
                f"sizes: variant {variant.name!r}", "target_modules", variant.setting("target_modules"),
                f"PEFT cannot adapt {source.label} ({error})", "Name other layers, or another model.",
            ) from None  # fmt: skip
