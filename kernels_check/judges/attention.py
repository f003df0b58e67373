"""Which attention really ran, in which precision, under which mask.

``config._attn_implementation`` is a request. PyTorch's SDPA picks a backend per call from the tensors it is given and
falls back in silence, so the verdict rests on the inner operators of the profiled step, counted per direction and
compared with the number of attention layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from kernels_check.check import DTYPE, Finding, Json, JudgedPath, Requirement, count_values, join_values, name_some

if TYPE_CHECKING:
    from torch import nn

    from kernels_check.observation.events import AttentionCall
    from kernels_check.observation.observe import Observation

FUSED_ATTENTION = frozenset({"flash", "efficient", "cudnn", "flash_attention_2"})
"""Backends that never write the score matrix to memory; what the requirement ``fused`` stands for."""
LARGEST_FLASH_HEAD = 256
"""Head size up to which CUDA's flash runs (``sdp_utils.cpp``, ``check_head_dim_size_flash``)."""
_FLOAT32_REMEDY = (
    "run under torch.autocast, or keep norms and embeddings in bfloat16 (prepare_model_for_kbit_training casts them)"
)
_MASK_REMEDY = "pass no attention_mask where nothing is padded, and pack records with use_cache=False"
_ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
KERNEL_BACKENDS = {
    "ATT-CUDNN": "cudnn",
    "ATT-FA4": "flash_attention_4",
    "ATT-FA3": "flash_attention_3",
    "ATT-SDPA-FLASH": "flash",
    "ATT-FA2": "flash_attention_2",
    "ATT-FA2-VENDORED": "flash_attention_2",
    "ATT-EFFICIENT": "efficient",
    "ATT-FLEX": "flex",
}


def attention_layers(model: nn.Module) -> int | None:
    """Number of softmax-attention layers the model's configuration announces; None where it has none."""
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    config = text() if callable(text) else config
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return sum(kind in _ATTENTION_LAYERS for kind in kinds)
    count = getattr(config, "num_hidden_layers", None)
    return count if isinstance(count, int) else None


def judge_backend(seen: Observation, required: Json) -> Finding:
    """Judge ``attention.backend``."""
    calls = seen.profile.attention
    if not calls:
        return _from_kernels(seen, required)
    forward = [call for call in calls if call.direction == "forward"]
    backward = [call for call in calls if call.direction == "backward"]
    first = [call for call in forward if not call.recomputed]
    layers = attention_layers(seen.model)
    observed = join_values(call.backend for call in forward)
    reason = (
        f"forward: {count_values(call.backend for call in forward) or 'none'}; "
        f"backward: {count_values(call.backend for call in backward) or 'none'}; "
        f"{'unknown number of' if layers is None else layers} attention layers; "
        f"operators {', '.join(sorted({call.op for call in forward}))}"
    )
    accepted = FUSED_ATTENTION if required == "fused" else {required}
    astray = [call for call in forward if call.backend not in accepted]
    complete = bool(first) and (layers is None or len(first) % max(layers, 1) == 0)
    if required is not None and astray:
        where = _layers_astray(first, accepted, layers) if complete else ""
        reason += f"{where}; likely cause: {_cause(seen.model, astray)}"
    elif not complete:
        reason += f"; {len(first)} calls cannot come from {layers} layers alone: some ran an attention not recognised"
    if _cpu_flash(forward) and any(call.mask for call in forward):
        reason += "; on CUDA flash would refuse the explicit mask"
    largest = max((call.head_size or 0 for call in forward), default=0)
    if _cpu_flash(forward) and largest > LARGEST_FLASH_HEAD:
        reason += (
            f"; on CUDA flash would refuse the head size {largest} (it takes up to {LARGEST_FLASH_HEAD}), and cuDNN "
            "too: memory-efficient would run, or math where it refuses as well"
        )
    return Finding(observed=observed, reason=reason, satisfies=not astray and complete, present=bool(forward))


def judge_dtype(seen: Observation, required: Json) -> Finding:
    """Judge ``attention.dtype``: what the inner operator was given, after any autocast."""
    forward = [call for call in seen.profile.attention if call.direction == "forward" and call.dtype]
    if not forward:
        return _unseen()
    dtypes = count_values(str(call.dtype) for call in forward)
    reason = f"input types of the inner operator: {dtypes}"
    if any(call.dtype == "float32" for call in forward):
        reason += "; flash and cuDNN of CUDA refuse float32"
        grouped = any(call.grouped for call in forward) and not any(call.mask for call in forward)
        reason += ", memory-efficient the grouped key/value heads, so that math would run" if grouped else ""
        reason += f"; where bfloat16 was meant, {_FLOAT32_REMEDY}"
    return Finding(observed=join_values(str(call.dtype) for call in forward), reason=reason)


def judge_mask(seen: Observation, required: Json) -> Finding:
    """Judge ``attention.mask``."""
    forward = [call for call in seen.profile.attention if call.direction == "forward"]
    if not forward:
        return _unseen()
    masks = [_mask(call) for call in forward]
    reason = f"masks of the inner operator: {count_values(masks)}"
    if "unknown" in masks:
        return Finding(observed=join_values(masks), status="unknown", reason=f"{reason}; the operator does not tell")
    if "explicit" in masks:
        reason += f"; {_MASK_REMEDY}"
    if _cpu_flash(forward) and "explicit" in masks:
        reason += "; the CPU's flash accepts an explicit mask, CUDA's would refuse it and another backend run instead"
    return Finding(observed=join_values(masks), reason=reason)


def _mask(call: AttentionCall) -> str:
    if call.mask:
        return "explicit"
    if call.causal is None or call.mask is None:
        return "causal" if call.causal else "unknown"
    return "causal" if call.causal else "none"


def _cpu_flash(forward: list[AttentionCall]) -> bool:
    return any(call.op.endswith("_for_cpu") for call in forward)


def _unseen() -> Finding:
    return Finding(observed=None, status="unknown", present=False, reason="no attention operator in the profiled step")


def _from_kernels(seen: Observation, required: Json) -> Finding:
    """Judge by kernel names alone: no operator is recorded under CUDA-graph replay."""
    kernels = Counter[str]()
    for rule, launches in seen.profile.kernels.items():
        if rule in KERNEL_BACKENDS:
            kernels[KERNEL_BACKENDS[rule]] += launches
    if not kernels:
        compiled = " (a compiled step may hide it)" if seen.profile.compiled_regions else ""
        return Finding(
            observed=None,
            status="unknown",
            present=False,
            reason=f"neither an attention operator nor an attention kernel in the profiled step{compiled}",
        )
    accepted = FUSED_ATTENTION if required == "fused" else {required}
    return Finding(
        observed=join_values(kernels),
        satisfies=set(kernels) <= accepted,
        reason=f"no operator recorded, kernel launches: {', '.join(f'{n} {name}' for name, n in kernels.items())}",
    )


def _layers_astray(first: list[AttentionCall], accepted: Collection[Json], layers: int | None) -> str:
    """Name the layers by the order of their calls, unless some were written out, which are listed after the others."""
    kinds = {call.backend == "eager" for call in first}
    if not layers or len(kinds) != 1:
        return ""
    odd = sorted({index % layers for index, call in enumerate(first) if call.backend not in accepted})
    return f"; not as required in layers {name_some(map(str, odd))}" if odd else ""


def _cause(model: nn.Module, astray: list[AttentionCall]) -> str:
    """Name what in the inputs makes SDPA leave its fast backends (the refusals of torch 2.13)."""
    import torch

    config: Any = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if all(call.backend == "eager" for call in astray):
        return f"the model was built with attn_implementation={implementation!r}: load it with 'sdpa'"
    causes = []
    if any(call.dropout for call in astray):
        causes.append(
            "attention dropout is on (the CPU's flash refuses any, cuDNN most): set attention_dropout=0 in the "
            "model's configuration"
        )
    if any(call.mask for call in astray):
        causes.append(f"an explicit mask (CUDA's flash refuses it): {_MASK_REMEDY}")
    if any(call.dtype == "float64" for call in astray):
        causes.append("dtype float64 (no fused CUDA kernel)")
    if any(call.dtype == "float32" for call in astray) and torch.cuda.is_available():
        grouped = any(call.grouped for call in astray)
        causes.append(
            "dtype float32 (CUDA's flash and cuDNN refuse it"
            + (", and memory-efficient refuses the grouped key/value heads)" if grouped else ")")
            + f": {_FLOAT32_REMEDY}"
        )
    if any((call.head_size or 0) > LARGEST_FLASH_HEAD for call in astray):
        causes.append(f"head size above {LARGEST_FLASH_HEAD} (flash and cuDNN refuse it)")
    nothing_seen = (
        "nothing in the inputs forbids it: look for torch.nn.attention.sdpa_kernel, torch.backends.cuda.enable_*_sdp, "
        f"or an attn_implementation other than the requested ({implementation!r} here)"
    )
    return ", ".join(causes) or nothing_seen


_BACKEND = Requirement(
    kind="choice",
    choices=("flash", "efficient", "cudnn", "math", "eager", "flash_attention_2", "flex", "fused"),
)
_MASK = Requirement(kind="choice", choices=("none", "causal", "explicit"))

PATHS: Mapping[str, JudgedPath] = {
    "attention.backend": JudgedPath(requirement=_BACKEND, judge=judge_backend, rests_on=("attention",)),
    "attention.dtype": JudgedPath(requirement=DTYPE, judge=judge_dtype, rests_on=("attention",)),
    "attention.mask": JudgedPath(requirement=_MASK, judge=judge_mask, rests_on=("attention",)),
}
