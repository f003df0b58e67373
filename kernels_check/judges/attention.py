"""Which attention backend ran, in which precision, and with which mask.

``config._attn_implementation`` is a request. PyTorch's SDPA picks a backend for each call from its input tensors and
falls back silently, so the verdict is based on the inner operators of the watched step, each attributed to the layer
that called it: every call of every attention layer must have run the required backend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kernels_check.check import (
    DTYPE,
    Json,
    JudgedPath,
    PathObservation,
    Requirement,
    absent,
    count_values,
    format_count,
    join_clauses,
    join_values,
    name_some,
    undecided,
)

if TYPE_CHECKING:
    from torch import nn

    from kernels_check.observe.layers import AttentionLayers
    from kernels_check.observe.observation import Observation
    from kernels_check.observe.operators import AttentionCall
    from kernels_check.observe.profile import StepProfile


FUSED_ATTENTION = frozenset(
    {"flash", "efficient", "cudnn", "flash_attention_2", "flash_attention_3", "flash_attention_4"}
)
"""Backends that never write the score matrix to memory; the requirement ``fused`` accepts them."""
LARGEST_FLASH_HEAD = 256
"""Largest head size that CUDA's flash kernels support (``sdp_utils.cpp``, ``check_head_dim_size_flash``)."""
_FLOAT32_REMEDY = (
    "run under torch.autocast, or keep norms and embeddings in bfloat16 (prepare_model_for_kbit_training casts them)"
)
_WITH_A_MASK = "cuDNN takes it on Hopper and B200, memory-efficient elsewhere"
"""The backend that torch 2.11 and later choose on CUDA if flash refuses a mask; cuDNN from 9.15.1 on
(``sdp_utils.cpp``)."""
_MASK_REMEDY = "pass no attention_mask where nothing is padded, and pack records with use_cache=False"
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


def _accepted_backends(required: Json) -> frozenset[Json]:
    """The backends that meet a requirement."""
    return FUSED_ATTENTION if required == "fused" else frozenset({required})


def judge_backend(observation: Observation, required: Json) -> PathObservation:
    """Judge ``attention.backend``."""
    layers = observation.attention_layers
    forward = layers.calls
    if not forward:
        return _judge_attention_elsewhere(layers) or judge_kernels(observation.profile, required)
    backward = [call for call in observation.profile.attention if call.direction == "backward"]
    accepted = _accepted_backends(required)
    wrong = [call for call in forward if call.backend not in accepted]
    good = [
        name
        for name, calls in layers.forward.items()
        if name not in (*layers.unknown, *layers.partial, *layers.unused)
        and (required is None or all(call.backend in accepted for call in calls))
    ]
    unrecognised = ["unrecognised"] if layers.unknown or layers.partial else []
    unrecognised += ["unused"] if layers.unused else []
    incomplete, faulty = _describe_gap(layers), bool(wrong or layers.unused)
    clauses = [
        f"forward: {count_values(call.backend for call in forward)}",
        f"backward: {count_values(call.backend for call in backward) or 'none'}",
        _describe_layers(layers, good, required),
        f"operators {', '.join(sorted({call.op for call in forward}))}",
    ]
    if required is not None and wrong:
        others = [name for name in layers.forward if name not in good]
        clauses += [f"not as required in {name_some(others)}"] if others else []
        clauses.append(f"likely cause: {likely_cause(observation.model, wrong)}")
    if layers.unused:
        clauses.append(
            f"its result is not used in {len(layers.unused)} of {len(layers.names)} layers, which train without a "
            f"gradient through it: {name_some(layers.unused)}"
        )
    clauses += [incomplete, _describe_unjudged(layers)]
    if _cpu_flash(forward):
        largest = max(call.head_size or 0 for call in forward)
        if any(call.mask for call in forward):
            clauses.append(f"on CUDA flash would refuse the explicit mask: {_WITH_A_MASK}")
        if largest > LARGEST_FLASH_HEAD:
            clauses.append(
                f"on CUDA flash would refuse the head size {largest} (it takes up to {LARGEST_FLASH_HEAD}), and cuDNN "
                "too: memory-efficient would run, or math where it refuses as well"
            )
    return PathObservation(
        observed=join_values([*(call.backend for call in forward), *unrecognised]),
        reason=join_clauses(*clauses),
        status="unknown" if incomplete and not faulty and (layers.doubtful or _has_unassigned_calls(layers)) else None,
        satisfies=not faulty and not incomplete,
    )


def judge_dtype(observation: Observation, required: Json) -> PathObservation:
    """Judge ``attention.dtype``: the dtype of the inner operator's inputs, after any autocast."""
    forward = observation.attention_layers.calls
    dtypes = [call.dtype for call in forward if call.dtype]
    reason = f"input types of the inner operator: {count_values(dtypes) or 'none that is known'}"
    if "float32" in dtypes:
        reason += "; flash and cuDNN of CUDA refuse float32"
        grouped = any(call.grouped for call in forward) and not any(call.mask for call in forward)
        reason += ", memory-efficient the grouped key/value heads, so that math would run" if grouped else ""
        reason += f"; where bfloat16 was meant, {_FLOAT32_REMEDY}"
    return _judge_calls(observation.attention_layers, dtypes, len(forward) - len(dtypes), required, reason)


def judge_mask(observation: Observation, required: Json) -> PathObservation:
    """Judge ``attention.mask``."""
    forward = observation.attention_layers.calls
    masks = [_mask(call) for call in forward]
    reason = f"masks of the inner operator: {count_values(masks)}"
    if "explicit" in masks:
        reason += f"; {_MASK_REMEDY}"
        if _cpu_flash(forward):
            reason += f"; the CPU's flash accepts an explicit mask, CUDA's would refuse it: {_WITH_A_MASK}"
    return _judge_calls(observation.attention_layers, masks, masks.count("unknown"), required, reason)


def _judge_calls(
    layers: AttentionLayers, values: list[str], unclear: int, required: Json, reason: str
) -> PathObservation:
    """One property over all calls: unknown if some call does not show it, unless another call already differs."""
    if not layers.calls:
        return _judge_attention_elsewhere(layers) or undecided(
            "no attention operator in the profiled step", present=False
        )
    missing = _describe_gap(layers)
    differs = required is not None and any(value not in (required, "unknown") for value in values)
    return PathObservation(
        observed=join_values(values),
        status="unknown" if (unclear or missing) and not differs else None,
        reason=join_clauses(
            reason,
            f"unknown for {format_count(unclear, 'call')}" if unclear else "",
            missing,
            _describe_unjudged(layers),
        ),
    )


def _describe_layers(layers: AttentionLayers, good: list[str], required: Json) -> str:
    """The number of layers that meet the requirement, among the layers known by name."""
    if not layers.names:
        return f"compiled, so that calls cannot be assigned to {_expected(layers)} attention layers"
    compiled = f", with {format_count(len(layers.compiled), 'call')} in compiled code" if layers.compiled else ""
    as_required = " as required" if required is not None else ""
    return f"{len(good)} of {len(layers.names)} attention layers{as_required}{compiled}"


def _expected(layers: AttentionLayers) -> str:
    return "an unknown number of" if layers.expected is None else str(layers.expected)


def _describe_gap(layers: AttentionLayers) -> str:
    """Why the known calls cannot be all of the model's attention; empty if they can."""
    if layers.unknown:
        return (
            f"{format_count(sum(layers.unknown.values()), 'call')} of {len(layers.unknown)} of {len(layers.names)} "
            f"layers ran no attention that is recognised: {name_some(layers.unknown)}"
        )
    if layers.partial:
        shares = (
            f"{name} ({features} of {input_features} features)"
            for name, (features, input_features) in layers.partial.items()
        )
        return (
            f"in {len(layers.partial)} of {len(layers.names)} layers only some of the heads ran an attention that is "
            f"recognised: {name_some(shares)}"
        )
    counts = *layers.entries, *layers.regions
    if not counts and all(call.recomputed for call in layers.calls):
        return "no call of the forward pass was seen, only recomputed ones"
    if any(count != layers.expected for count in counts):
        return (
            f"{join_values(map(str, counts))} calls in an entry into compiled code do not match "
            f"{_expected(layers)} attention layers"
        )
    return ""


def _has_unassigned_calls(layers: AttentionLayers) -> bool:
    """Whether all calls may be present but not assigned to layers, in regions separated by graph breaks."""
    if layers.unknown or not layers.expected or not layers.regions:
        return False
    return all(count == layers.expected for count in layers.entries) and sum(layers.regions) % layers.expected == 0


def _describe_unjudged(layers: AttentionLayers) -> str:
    """A description of attention that is not judged because it is outside the model's training."""
    groups = (
        (f"{format_count(len(layers.without_training), 'call')} without gradients", layers.without_training, ""),
        (f"{len(layers.failed)} in passes that failed", layers.failed, ""),
        (f"{len(layers.elsewhere)} outside the model", layers.elsewhere, ", as of another model or a copy"),
    )
    parts = [f"{text} ({count_values(one.backend for one in calls)}){more}" for text, calls, more in groups if calls]
    return f"not judged: {' and '.join(parts)}" if parts else ""


def _judge_attention_elsewhere(layers: AttentionLayers) -> PathObservation | None:
    """The result if all attention of the step ran outside the model's training; None if no attention ran."""
    unjudged = _describe_unjudged(layers)
    return absent(f"no attention of the model itself was seen; {unjudged}") if unjudged else None


def _mask(call: AttentionCall) -> str:
    if call.mask:
        return "explicit"
    if call.causal:
        return "causal"
    return "unknown" if call.causal is None or call.mask is None else "none"


def _cpu_flash(forward: list[AttentionCall]) -> bool:
    return any(call.op.endswith("_for_cpu") for call in forward)


def judge_kernels(profile: StepProfile, required: Json) -> PathObservation:
    """Judge by kernel names alone: no operator is recorded under CUDA-graph replay."""
    kernels = Counter[str]()
    for rule, launches in profile.kernels.items():
        if rule in KERNEL_BACKENDS:
            kernels[KERNEL_BACKENDS[rule]] += launches
    if not kernels:
        compiled = " (a compiled step may hide it)" if profile.compiled_regions else ""
        return undecided(
            f"neither an attention operator nor an attention kernel in the profiled step{compiled}", present=False
        )
    return PathObservation(
        observed=join_values(kernels),
        satisfies=set(kernels) <= _accepted_backends(required),
        reason=f"no operator recorded, kernel launches: {', '.join(f'{n} {name}' for name, n in kernels.items())}",
    )


def likely_cause(model: nn.Module, wrong: list[AttentionCall]) -> str:
    """Name the inputs for which SDPA cannot use its fast backends (the conditions of torch 2.13)."""
    import torch

    config: Any = next((part.config for part in model.modules() if hasattr(part, "config")), None)
    implementation = getattr(config, "_attn_implementation", None)
    if all(call.backend == "eager" for call in wrong):
        if implementation in (None, "eager"):
            return f"the model was built with attn_implementation={implementation!r}: load it with 'sdpa'"
        return (
            f"the model was built with attn_implementation={implementation!r}, but these layers do not call SDPA: "
            "through a setting of their own, or like torch's nn.MultiheadAttention unless it is called with "
            "need_weights=False"
        )
    dtypes = {call.dtype for call in wrong}
    grouped = any(call.grouped for call in wrong)
    causes = {
        "attention dropout is on (the CPU's flash refuses any, cuDNN most): set attention_dropout=0 in the model's "
        "configuration": any(call.dropout for call in wrong),
        f"an explicit mask (CUDA's flash refuses it; {_WITH_A_MASK}): {_MASK_REMEDY}": any(call.mask for call in wrong),
        "dtype float64 (no fused CUDA kernel)": "float64" in dtypes,
        "dtype float32 (CUDA's flash and cuDNN refuse it"
        + (", and memory-efficient refuses the grouped key/value heads" if grouped else "")
        + f"): {_FLOAT32_REMEDY}": "float32" in dtypes and torch.cuda.is_available(),
        f"head size above {LARGEST_FLASH_HEAD} (flash and cuDNN refuse it)": any(
            (call.head_size or 0) > LARGEST_FLASH_HEAD for call in wrong
        ),
    }
    return ", ".join(cause for cause, found in causes.items() if found) or (
        "nothing in the inputs forbids it: look for torch.nn.attention.sdpa_kernel, torch.backends.cuda.enable_*_sdp, "
        f"or an attn_implementation other than the requested ({implementation!r} here)"
    )


_BACKEND = Requirement(
    kind="choice",
    choices=("fused", *sorted(FUSED_ATTENTION), "flex", "math", "eager"),
)
_MASK = Requirement(kind="choice", choices=("none", "causal", "explicit"))

PATHS: Mapping[str, JudgedPath] = {
    "attention.backend": JudgedPath(requirement=_BACKEND, judge=judge_backend, by_operators=True),
    "attention.dtype": JudgedPath(requirement=DTYPE, judge=judge_dtype, by_operators=True),
    "attention.mask": JudgedPath(requirement=_MASK, judge=judge_mask, by_operators=True),
}


def judge_request(model: nn.Module, profile: StepProfile, required: Json) -> PathObservation:
    """Judge the attention of one request by its operators, or by its kernels if it called none.

    Args:
        model: the model that answered; its configuration names the implementation that it was built with.
        profile: profile of the request alone.
        required: a value of ``attention.backend``, as for a training step; None if nothing is required.
    """
    required = "fused" if required in FUSED_ATTENTION else required
    forward = [call for call in profile.attention if call.direction == "forward"]
    if not forward:
        return judge_kernels(profile, required)
    wrong = [call for call in forward if call.backend not in _accepted_backends(required)]
    masked = sum(bool(call.mask) for call in forward)
    return PathObservation(
        observed=join_values(call.backend for call in forward),
        reason=join_clauses(
            f"forward: {count_values(call.backend for call in forward)}",
            f"{masked} with an explicit mask" if masked else "",
            f"likely cause: {likely_cause(model, wrong)}" if required is not None and wrong else "",
        ),
        satisfies=not wrong,
    )
