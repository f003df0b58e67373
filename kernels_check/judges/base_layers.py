"""How the frozen base weights are really stored, multiplied and left alone.

The storage of a 4-bit weight can be proved from its bytes. N x K weights take ceil(NK/2) bytes; each block of 64 adds
a float32 scale (4.500 bits a weight), which double quantisation turns into a byte and a float32 per 256 blocks (4.127).
A module class or a configuration proves nothing: a skipped layer keeps its float weight under the same model.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.check import Finding, Json, Status, counted, joined, listed
from kernels_check.observation.adapter_layers import LoraLayer, is_adapter, lora_layers
from kernels_check.observation.observe import Observation

HASHED_BYTES = 64 * 2**20
"""How much of the base is hashed; larger bases are sampled in evenly spaced pages."""
_PAGE_BYTES = 4096
_BITS_REMEDY = {
    4: "load with quantization_config=BitsAndBytesConfig(load_in_4bit=True) and keep targets out of its skip list",
    8: "load with quantization_config=BitsAndBytesConfig(load_in_8bit=True) and keep targets out of its skip list",
    16: "load with dtype=torch.bfloat16 and no quantization_config",
    32: "load with dtype=torch.float32 and no quantization_config",
}
_ORIGIN = "that is the dtype the base was loaded in, load it with dtype=torch.bfloat16"
_NESTED_BLOCK = 256
"""Block size of the second quantisation, fixed by bitsandbytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How one base layer keeps its weight."""

    bits: int | None
    quant_type: str | None = None
    double_quant: bool | None = None
    compute_dtype: str | None = None
    bits_per_weight: float | None = None
    """Stored bits divided by weights, scales included."""
    packed_for_cpu: bool = False
    problem: str | None = None
    """Why the bytes do not prove what the layer claims."""
    note: str | None = None


def storage(layer: Any) -> Storage:
    """Read the storage of one base layer from its tensors."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return Storage(bits=None, problem=f"{type(layer).__name__} has no weight tensor this version knows")
    if type(weight).__name__ == "Params4bit":
        return _four_bit(layer, weight)
    if weight.dtype == torch.int8 and hasattr(layer, "state"):
        note = "computes in int8 with a float16 epilogue on CUDA, by dequantising on a CPU"
        return Storage(bits=8, quant_type="int8", double_quant=False, note=note)
    if weight.is_floating_point():
        bits = weight.element_size() * 8
        return Storage(bits=bits, quant_type="none", double_quant=False, compute_dtype=_short(weight.dtype))
    return Storage(bits=None, problem=f"{type(layer).__name__} with {_short(weight.dtype)} weights is not known")


def _four_bit(layer: Any, weight: Any) -> Storage:
    state = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if state is None:
        return Storage(bits=None, problem="Params4bit without quant_state: not quantised")
    weights, stored = math.prod(state.shape), weight.numel() * weight.element_size()
    packed = bool(getattr(state, "packing_format_for_cpu", False))
    nested = bool(state.nested)
    blocks = math.ceil(weights / state.blocksize)
    scales = state.absmax.numel() * state.absmax.element_size()
    expected = blocks * (2 if packed else 1 if nested else 4)
    if nested:
        scales += state.state2.absmax.numel() * state.state2.absmax.element_size()
        expected += math.ceil(blocks / _NESTED_BLOCK) * 4
    problem = None
    if weights != layer.in_features * layer.out_features:
        problem = f"quant_state describes {weights} weights, the layer has {layer.in_features * layer.out_features}"
    elif stored != math.ceil(weights / 2):
        problem = f"{stored} bytes for {weights} weights, 4-bit takes {math.ceil(weights / 2)}"
    elif scales != expected or (nested and state.absmax.dtype != torch.uint8):
        problem = f"{scales} bytes of {_short(state.absmax.dtype)} scales, expected {expected}"
    compute = torch.bfloat16 if packed else layer.compute_dtype
    return Storage(
        bits=None if problem else 4,
        quant_type=state.quant_type,
        double_quant=None if packed else nested,
        compute_dtype=None if compute is None else _short(compute),
        bits_per_weight=8 * (stored + scales) / weights,
        packed_for_cpu=packed,
        problem=problem,
        note=f"backward dequantises to {_short(state.dtype)} first: {_ORIGIN}" if state.dtype != compute else None,
    )


def judge_bits(model: nn.Module, required: Json) -> Finding:
    """Judge ``base.bits`` over every layer that carries an adapter."""
    stored = _stored(model)
    density = [item.bits_per_weight for item in stored.values() if item.bits_per_weight is not None]
    reason = f"{sum(density) / len(density):.3f} bits a weight with scales in {len(density)} layers" if density else ""
    remedy = _BITS_REMEDY.get(required) if isinstance(required, int) else None
    return _over_layers(stored, {name: item.bits for name, item in stored.items()}, required, reason, remedy)


def judge_quant_type(model: nn.Module, required: Json) -> Finding:
    """Judge ``base.quant_type``."""
    stored = _stored(model)
    remedy = f"set bnb_4bit_quant_type={required!r} (the library's default is 'fp4')"
    return _over_layers(stored, {name: item.quant_type for name, item in stored.items()}, required, "", remedy)


def judge_double_quant(model: nn.Module, required: Json) -> Finding:
    """Judge ``base.double_quant``."""
    stored = _stored(model)
    remedy = f"set bnb_4bit_use_double_quant={required} (the library's default is False)"
    return _over_layers(stored, {name: item.double_quant for name, item in stored.items()}, required, "", remedy)


def judge_compute_dtype(model: nn.Module, seen: Observation, required: Json) -> Finding:
    """Judge ``base.compute_dtype``: the layers' dtype after their first forward, confirmed by the 4-bit operators."""
    stored = _stored(model)
    ran = {call.dtype for call in seen.profile.fourbit if call.dtype}
    reason = f"4-bit operators were given {joined(ran)}" if ran else ""
    remedy = f"set bnb_4bit_compute_dtype=torch.{required} (the library's default is torch.float32)"
    dtypes = {name: item.compute_dtype for name, item in stored.items()}
    finding = _over_layers(stored, dtypes, required, reason, remedy)
    notes = sorted({item.note for item in stored.values() if item.note})
    all_four_bit = all(item.bits == 4 for item in stored.values())
    if ran and all_four_bit and not finding.status and joined(ran) != finding.observed:
        # Where the layers and the operators disagree, what ran counts.
        return Finding(observed=joined(ran), reason=f"{finding.reason}, layers claim {finding.observed}")
    return Finding(
        observed=finding.observed,
        reason="; ".join([finding.reason, *notes]),
        status=finding.status,
        present=finding.present,
        satisfies=finding.satisfies,
    )


def judge_gemm_path(model: nn.Module, seen: Observation) -> Finding:
    """Judge ``base.gemm_path`` from what ran inside the 4-bit operators of the forward pass."""
    calls = seen.profile.fourbit
    stored = _stored(model)
    if not calls:
        if any(item.bits == 4 for item in stored.values()):
            return Finding(observed=None, status="unknown", reason="4-bit weights but no known 4-bit operator ran")
        return Finding(observed=None, status="not_applicable", present=False, reason="the base is not 4-bit")
    paths = [call.path for call in calls]
    kernels = {rule: count for rule, count in seen.profile.kernels.items() if rule.startswith(("BNB-GEMM", "BNB-DEQ"))}
    reason = f"forward 4-bit products: {counted(paths)}" + (f"; kernels {kernels}" if kernels else "")
    return Finding(observed=joined(paths), reason=reason, status="unknown" if "unknown" in paths else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """A fingerprint of the base weights' raw bytes."""

    tensors: Mapping[str, tuple[str, str]]
    """dtype and sha256 of every tensor, by name."""
    hashed_bytes: int
    total_bytes: int
    packed: bool
    """Whether any 4-bit weight was in the packed CPU layout."""


def digest(model: nn.Module) -> Digest:
    """Hash the base: parameters that are no adapter's, and the scales of quantised ones."""
    tensors = {name: tensor.detach() for name, tensor in _base_tensors(model)}
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    stride = math.ceil(total / HASHED_BYTES) or 1
    hashes, hashed = {}, 0
    for name, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        if stride > 1 and raw.numel() > _PAGE_BYTES:
            raw = raw[: raw.numel() // _PAGE_BYTES * _PAGE_BYTES].view(-1, _PAGE_BYTES)[::stride].contiguous()
        hashes[name] = (_short(tensor.dtype), hashlib.sha256(raw.cpu().numpy().tobytes()).hexdigest())
        hashed += raw.numel()
    packed = any(storage(layer.base).packed_for_cpu for layer in lora_layers(model))
    return Digest(tensors=hashes, hashed_bytes=hashed, total_bytes=total, packed=packed)


def judge_frozen(model: nn.Module, seen: Observation, before: Digest, after: Digest) -> Finding:
    """Judge ``base.frozen``: nothing trains, receives a gradient, is given to the optimizer, or changes its bytes."""
    base = {name: value for name, value in model.named_parameters() if not is_adapter(name)}
    updated = {identity for optimizer in seen.optimizers for identity in optimizer.parameters}
    faults = []
    for problem, names in (
        ("require gradients", [name for name, value in base.items() if value.requires_grad]),
        ("received a gradient", [name for name in base if name in seen.gradients]),
        ("are given to the optimizer", [name for name, value in base.items() if id(value) in updated]),
    ):
        if names:
            faults.append(f"{len(names)} base parameters {problem}: {listed(names)}")
    part = "all" if after.hashed_bytes == after.total_bytes else f"an even sample of {after.hashed_bytes / 2**20:.2f}"
    what = f"sha256 over {part} of {after.total_bytes / 2**20:.1f} MiB"
    changed, recast = _compare(before, after)
    if changed and before.packed != after.packed:
        reason = "an eval forward repacked Linear4bit weights in place (AVX512 layout): bytes cannot be compared"
        return Finding(observed=None, status="unknown", reason="; ".join([*faults, reason]))
    if changed:
        faults.append(f"{what}: {len(changed)} tensors changed over {seen.calls} steps: {listed(changed)}")
    good = f"{what} unchanged over {seen.calls} steps, no gradient, not optimised"
    # bitsandbytes casts a bias to the compute dtype in the first forward: not trained, but not silent either.
    note = f"; cast once by the forward: {listed(recast)}" if recast else ""
    remedy = "; remedy: requires_grad_(False) on the base, and only the adapter's parameters for the optimizer"
    return Finding(observed=not faults, reason=("; ".join(faults) + remedy if faults else good) + note)


def _compare(before: Digest, after: Digest) -> tuple[list[str], list[str]]:
    """Names of the tensors whose bytes changed, and of those that changed with their dtype."""
    changed: list[str] = []
    recast: list[str] = []
    for name in sorted(before.tensors.keys() | after.tensors.keys()):
        old, new = before.tensors.get(name), after.tensors.get(name)
        if old != new:
            same_type = old is None or new is None or old[0] == new[0]
            (changed if same_type else recast).append(name)
    return changed, recast


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if not is_adapter(name) and not parameter.is_meta:
            yield name, parameter.data
    for name, module in model.named_modules():
        # The scales of LLM.int8 move from the weight to the module in the first forward.
        weight, moved = getattr(module, "weight", None), getattr(getattr(module, "state", None), "SCB", None)
        state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
        for label, scales in (
            ("absmax", getattr(state, "absmax", None)),
            ("nested_absmax", getattr(getattr(state, "state2", None), "absmax", None)),
            ("SCB", getattr(weight, "SCB", None) if moved is None else moved),
        ):
            if isinstance(scales, Tensor):
                yield f"{name}.{label}", scales


def _stored(model: nn.Module) -> dict[str, Storage]:
    layers: list[LoraLayer] = lora_layers(model)
    return {layer.name: storage(layer.base) for layer in layers}


def _over_layers(
    stored: Mapping[str, Storage], values: Mapping[str, Json], required: Json, reason: str, remedy: str | None
) -> Finding:
    """Compare one property over all targeted layers and name the exceptions."""
    if not stored:
        return Finding(observed=None, present=False, reason="no layer carries a LoRA adapter")
    expected = required if required is not None else Counter(values.values()).most_common(1)[0][0]
    distinct = set(values.values())
    observed = distinct.pop() if len(distinct) == 1 else joined(str(value) for value in values.values())
    parts = [f"{sum(value == expected for value in values.values())} of {len(values)} targeted layers: {expected}"]
    parts += [reason] if reason else []
    odd = [f"{name} ({value})" for name, value in values.items() if value != expected and value is not None]
    parts += [f"exceptions: {listed(odd)}"] if odd else []
    unread = [name for name, value in values.items() if value is None]
    problems = [f"{name}: {item.problem}" for name, item in stored.items() if item.problem]
    parts += [f"cannot tell for {listed(problems or unread)}"] if unread else []
    packed = [name for name, item in stored.items() if item.packed_for_cpu]
    if packed:
        parts.append(f"repacked in place for AVX512 by an eval forward, bfloat16 scales: {listed(packed)}")
    parts += [f"remedy: {remedy}"] if odd and required is not None and remedy else []
    status: Status | None = "unknown" if unread and not odd else None
    return Finding(observed=observed, reason="; ".join(parts), status=status, satisfies=not odd and not unread)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
