"""How the step was executed: recomputation, TF32, compilation, train or eval mode.

Each of these has a flag that lies. Gradient checkpointing stays "on" in eval mode and recomputes nothing; a compiled
model that hit its recompile limit runs eagerly without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kernels_check.check import FLAG, Finding, Json, JudgedPath, Requirement, count_values, name_some
from kernels_check.observation.compilations import Compilations

if TYPE_CHECKING:
    from kernels_check.observation.observe import Observation


def judge_checkpointing(seen: Observation, required: Json) -> Finding:
    """Judge ``checkpointing``: forward work found inside the backward pass."""
    forward = [call for call in seen.profile.attention if call.direction == "forward"]
    backward = len(seen.profile.attention) - len(forward)
    first = sum(not call.recomputed for call in forward)
    called = {layer.name for layer in seen.lora_layers() if seen.modules.ran(layer.name)}
    repeated = {name for name in called if seen.modules.recomputed(name)}
    if not first and not called:
        return Finding(observed=None, status="unknown", present=False, reason="no layer call was seen in the step")
    ratio = len(forward) / first if first else 1.0
    reason = (
        f"attention: {len(forward)} forward calls for {first} layers ({ratio:.2f} times), {backward} backward; "
        f"{len(repeated)} of {len(called)} adapter layers called again in the backward pass"
    )
    if ratio == 1.0 and repeated:
        reason += "; a selective policy keeps the attention and recomputes the rest"
    complete = ratio >= 2.0 or (ratio == 1.0 and bool(called) and repeated == called)
    happened = ratio > 1.0 or bool(repeated)
    if required is True and not complete and (happened or _flagged(seen.model)):
        modes = "eval" if not any(seen.modes.values()) else "train"
        if happened:
            cause = "only part of the layers recompute: look for a layer whose gradient_checkpointing is off"
        else:
            cause = f"the flag is on but nothing recomputes in {modes} mode; transformers does so in train mode only"
        return Finding(observed=happened, status="fallback", reason=f"{reason}; {cause}", present=happened)
    return Finding(observed=happened, reason=reason, present=happened)


def _flagged(model: Any) -> bool:
    # transformers renamed the flag, and reading the old name warns.
    name = "is_activation_checkpointing"
    return bool(getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing", False))


def judge_tf32(seen: Observation, required: Json) -> Finding:
    """Judge ``tf32``: kernels where CUDA ran, else what the flag allows."""
    import torch

    if not torch.cuda.is_available():
        return Finding(observed=False, present=False, reason=f"no CUDA device: TF32 cannot run ({_tf32_flag()})")
    kernels = seen.profile.kernels
    tensor_cores, plain = kernels.get("GEMM-TF32", 0), kernels.get("GEMM-FP32-SIMT", 0)
    reason = f"{tensor_cores} TF32 and {plain} plain float32 GEMM launches; {_tf32_flag()}"
    if not kernels:
        return Finding(observed=None, status="unknown", present=False, reason=f"no kernel recorded; {_tf32_flag()}")
    if not tensor_cores and not plain:
        reason += "; no float32 GEMM that the rules know, which a bfloat16 step need not contain"
    return Finding(observed=tensor_cores > 0, reason=reason, present=tensor_cores > 0)


def _tf32_flag() -> str:
    import torch

    try:
        return f"torch.backends.cuda.matmul.fp32_precision={torch.backends.cuda.matmul.fp32_precision!r}"
    except (AttributeError, RuntimeError) as error:  # old and new switches refuse to be mixed
        return f"flag unreadable: {error}"


def judge_compile(seen: Observation, required: Json) -> Finding:
    """Judge ``compile``: regions entered in the watched step; breaks and recompiles are named and fail nothing."""
    regions, lookups, past = seen.profile.compiled_regions, seen.profile.compiler_lookups, seen.compilations
    reason = f"{regions} compiled regions entered, {lookups} compiler cache look-ups"
    if lookups and (not regions or (lookups > regions and (past.refused or not past.complete))):
        reason += (
            f": {'part of ' if regions else ''}the code ran eagerly, because the recompile limit was reached or "
            "compilation is disabled; pad to few lengths, mark the sizes dynamic, or raise "
            f"torch._dynamo.config.recompile_limit; {past}"
        )
        return Finding(observed="in part" if regions else False, reason=reason)
    if regions or past != Compilations():
        reason += f"; {past}"
    if regions and past.unreadable is not None:
        return Finding(observed=None, status="unknown", reason=reason)
    observed: Json = f"in pieces: {name_some(past.breaks, '; ')}" if regions and past.breaks else regions > 0
    return Finding(observed=observed, reason=reason, present=regions > 0, satisfies=(regions > 0) is required)


def judge_mode(seen: Observation, required: Json) -> Finding:
    """Judge ``mode`` as the modules had it while the step ran."""
    names = {True: "train", False: "eval", None: "now train, now eval"}
    modes = [names[training] for training in seen.modes.values()]
    observed = modes[0] if len(set(modes)) == 1 and modes[0] in ("train", "eval") else "mixed"
    wanted = required if required is not None else max(set(modes), key=modes.count)
    odd = [name or "the model itself" for name, training in seen.modes.items() if names[training] != wanted]
    reason = f"modules: {count_values(modes)}" + (f"; not in {wanted} mode: {name_some(odd)}" if odd else "")
    reason += f"; call model.{wanted}() before the step" if odd and required is not None else ""
    return Finding(observed=observed, reason=reason)


PATHS: Mapping[str, JudgedPath] = {
    "checkpointing": JudgedPath(requirement=FLAG, judge=judge_checkpointing, rests_on=("attention",)),
    "tf32": JudgedPath(requirement=FLAG, judge=judge_tf32, rests_on=("kernels",)),
    "compile": JudgedPath(requirement=FLAG, judge=judge_compile),
    "mode": JudgedPath(requirement=Requirement(kind="choice", choices=("train", "eval")), judge=judge_mode),
}
