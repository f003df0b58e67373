"""How the step was executed: recomputation, TF32, compilation, train or eval mode, fused kernels of other libraries.

Each of these has a flag that may be wrong. Gradient checkpointing stays "on" in eval mode and recomputes nothing; a
compiled model that hit its recompile limit runs eagerly without a warning; fused kernels that are enabled after the
model was built, or for an unsupported architecture, are bound in 0 of 28 layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kernels_check.check import (
    FLAG,
    SHARE,
    Json,
    JudgedPath,
    PathObservation,
    Requirement,
    absent,
    at_least,
    count_values,
    join_values,
    name_some,
    undecided,
)

if TYPE_CHECKING:
    from kernels_check.observe.execution import BlockRecomputed, FusedKernelSite
    from kernels_check.observe.observation import Observation


def judge_checkpointing(seen: Observation, required: Json) -> PathObservation:
    """Judge ``checkpointing``: every block that receives a gradient is recomputed, for each of its calls."""
    judged = _recomputed(seen)
    if isinstance(judged, PathObservation):
        return judged
    share, is_recomputed, reason = judged
    if required is True and share < 1.0 and (is_recomputed or seen.checkpointing_enabled):
        modes = "eval" if not any(seen.modes.values()) else "train"
        if is_recomputed:
            cause = "only part of the layers recompute: look for a layer whose gradient_checkpointing is off"
        else:
            cause = f"the flag is on but nothing recomputes in {modes} mode; transformers does so in train mode only"
        return PathObservation(
            observed=is_recomputed, status="fallback", reason=f"{reason}; {cause}", present=is_recomputed
        )
    return PathObservation(observed=is_recomputed, reason=reason, present=is_recomputed)


def judge_checkpointed_layers(seen: Observation, required: Json) -> PathObservation:
    """Judge ``checkpointing.layers``, a minimum: the share of recomputed blocks."""
    judged = _recomputed(seen)
    if isinstance(judged, PathObservation):
        return judged
    share, _, reason = judged
    return at_least(share, required, reason)


def _recomputed(seen: Observation) -> PathObservation | tuple[float, bool, str]:
    """The share of the blocks that are recomputed, whether any is, and the reason."""
    compiled = seen.compiled_blocks.compiled if seen.profile.compiled_regions else ()
    blocks = seen.recomputed_blocks
    by_calls = [block for block in blocks if block.name not in compiled or block.again]
    hidden = len(set(compiled).difference(block.name for block in by_calls))
    again, shown = _compiled_again(seen)
    if not blocks and not hidden:
        idle = seen.blocks_without_gradient
        if not idle:
            return _unseen(seen, "no layer call was seen in the step")
        return 0.0, False, f"no gradient comes back to the {len(idle)} blocks that ran: nothing is to be recomputed"
    if hidden and again is None:
        return undecided(shown, present=False)
    whole = [block for block in by_calls if block.whole]
    total = len(by_calls) + hidden
    share = (len(whole) + hidden * (again or 0.0)) / total
    is_recomputed = any(block.again for block in by_calls) or bool(hidden and again)
    reason = f"{len(whole)} of {len(by_calls)} blocks computed again in the backward pass"
    missing = [_missing(block) for block in by_calls if not block.whole]
    reason += f", without {name_some(missing)}" if missing and is_recomputed else ""
    partly = [block for block in whole if block.repeated < block.modules]
    if partly:
        reason += "; called again: " + name_some(
            f"{block.repeated} of {block.modules} modules of {block.name}" for block in partly
        )
    idle = seen.blocks_without_gradient
    reason += f"; {len(idle)} further blocks take no gradient, so that nothing is kept for them" if idle else ""
    reason += f"; {shown}" if hidden else ""
    return share, is_recomputed, reason


def _unseen(seen: Observation, reason: str) -> PathObservation:
    """The result without a module call: absent if the step did not use the model (but, say, a copy), else unknown."""
    return absent(reason) if seen.untouched else undecided(reason, present=False)


def _missing(block: BlockRecomputed) -> str:
    if block.again < block.calls:
        return f"{block.name} ({block.again} of {block.calls} calls)" if block.again else block.name
    return f"{block.name} without {name_some(block.kept)}"


def _compiled_again(seen: Observation) -> tuple[float | None, str]:
    """For blocks in compiled code, which calls no hooks: the share of attention that ran again; None if unknown."""
    calls = [call for call in seen.profile.attention if call.direction == "forward" and call.compiled]
    first = sum(not call.recomputed for call in calls)
    if not first:
        return None, "the blocks ran in compiled code, which calls no hook, and no attention in it was seen"
    share = min(1.0, (len(calls) - first) / first)
    if not share and seen.checkpointing_enabled:
        return None, "the blocks ran in compiled code, which may keep the attention and recompute the rest"
    return share, f"in compiled code, by its attention: {len(calls)} forward calls for {first} layers"


def judge_tf32(seen: Observation, required: Json) -> PathObservation:
    """Judge ``tf32`` by kernels on CUDA, else by the flag."""
    import torch

    if not torch.cuda.is_available():
        return PathObservation(
            observed=False, present=False, reason=f"no CUDA device: TF32 cannot run ({_tf32_flag()})"
        )
    kernels = seen.profile.kernels
    tensor_cores, plain = kernels.get("GEMM-TF32", 0), kernels.get("GEMM-FP32-SIMT", 0)
    reason = f"{tensor_cores} TF32 and {plain} plain float32 GEMM launches; {_tf32_flag()}"
    if not kernels:
        return PathObservation(
            observed=None, status="unknown", present=False, reason=f"no kernel recorded; {_tf32_flag()}"
        )
    if not tensor_cores and not plain:
        reason += "; no float32 GEMM that the rules know, which a bfloat16 step need not contain"
    return PathObservation(observed=tensor_cores > 0, reason=reason, present=tensor_cores > 0)


def _tf32_flag() -> str:
    import torch

    try:
        return f"torch.backends.cuda.matmul.fp32_precision={torch.backends.cuda.matmul.fp32_precision!r}"
    except (AttributeError, RuntimeError) as error:  # torch raises if the old and new settings are mixed
        return f"flag unreadable: {error}"


def judge_compile(seen: Observation, required: Json) -> PathObservation:
    """Judge ``compile``: all blocks ran in compiled code; graph breaks and recompilations are only reported."""
    regions, past = seen.profile.compiled_regions, seen.compilations
    blocks = seen.compiled_blocks
    reason = _entered(seen)
    if _unreadable(seen):
        return undecided(f"{reason}; {past}")
    whole = bool(blocks.compiled) and not blocks.partly and not blocks.eager
    observed: Json = whole or ("in part" if blocks.compiled or blocks.partly else False)
    eagerly = "" if whole else _why_eager(seen)
    present = whole or bool(blocks.regions or eagerly)
    reason += eagerly
    if regions or not past.empty:
        reason += f"; {past}"
    if whole and past.breaks:
        observed = f"in pieces: {name_some(past.breaks, '; ')}"
    satisfies = whole if required is True else not blocks.regions
    return PathObservation(observed=observed, reason=reason, present=present, satisfies=satisfies)


def judge_compiled_share(seen: Observation, required: Json) -> PathObservation:
    """Judge ``compile.share``, a minimum: the share of the blocks that ran in compiled code."""
    blocks = seen.compiled_blocks
    reason = _entered(seen)
    if _unreadable(seen):
        return undecided(f"{reason}; {seen.compilations}", present=False)
    if not blocks.ran:
        return _unseen(seen, f"{reason}; no block of the model was seen to run")
    share = len(blocks.compiled) / blocks.ran
    return at_least(share, required, reason + (_why_eager(seen) if share < 1.0 else ""))


def _entered(seen: Observation) -> str:
    """The regions that were entered, and the blocks that ran in them."""
    regions, lookups, blocks = seen.profile.compiled_regions, seen.profile.compiler_lookups, seen.compiled_blocks
    reason = f"{regions} compiled regions entered, {lookups} compiler cache look-ups"
    if not regions:
        return reason
    reason += f"; {len(blocks.compiled)} of {blocks.ran} blocks ran in compiled code"
    reason += f"; eager in part: {name_some(blocks.partly)}" if blocks.partly else ""
    reason += f"; eager: {name_some(blocks.eager)}" if blocks.eager and (blocks.compiled or blocks.partly) else ""
    if blocks.helpers:
        known = blocks.compiled or blocks.partly  # these regions may be parts of the module that holds the blocks
        reason += f"; {blocks.helpers} regions outside of its blocks{'' if known else ', as of a loss'}"
    return reason


def _unreadable(seen: Observation) -> bool:
    """Whether code was compiled but the compiler's record of it cannot be read."""
    return bool(seen.profile.compiled_regions) and seen.compilations.unreadable is not None


def _why_eager(seen: Observation) -> str:
    """Why code under torch.compile ran eagerly; empty if none did."""
    regions, lookups, past = seen.profile.compiled_regions, seen.profile.compiler_lookups, seen.compilations
    if not lookups or (regions and (lookups <= regions or not past.refused)):
        return ""
    return (
        f": {'part of ' if regions else ''}the code ran eagerly, because the recompile limit was reached or "
        "compilation is disabled; pad to few lengths, mark the sizes dynamic, or raise "
        f"torch._dynamo.config.recompile_limit{'' if regions else f'; {past}'}"
    )


def judge_mode(seen: Observation, required: Json) -> PathObservation:
    """Judge ``mode``: the mode of the modules while the step ran."""
    names = {True: "train", False: "eval", None: "now train, now eval"}
    modes = [names[training] for training in seen.modes.values()]
    observed = modes[0] if len(set(modes)) == 1 and modes[0] in ("train", "eval") else "mixed"
    wanted = required if required is not None else max(set(modes), key=modes.count)
    odd = [name or "the model itself" for name, training in seen.modes.items() if names[training] != wanted]
    reason = f"modules: {count_values(modes)}" + (f"; not in {wanted} mode: {name_some(odd)}" if odd else "")
    reason += f"; call model.{wanted}() before the step" if odd and required is not None else ""
    return PathObservation(observed=observed, reason=reason)


_RULES = {"liger_kernel": "LIGER", "unsloth": "UNSLOTH", "unsloth_zoo": "UNSLOTH"}
"""The rule that recognises the kernels of a library, see ``rules``."""
_NOTHING = "nothing of a library of fused kernels is bound: apply it before the model is built, or to the model itself"


def judge_fused(seen: Observation, required: Json) -> PathObservation:
    """Judge ``fused.kernels``: kinds joined by ``+``; each kind must have been called at all of its sites."""
    places = seen.fused_kernel_sites
    kinds = list(dict.fromkeys(place.kind for place in places))
    wanted = [kind.strip() for kind in required.split("+")] if isinstance(required, str) else []
    missing = [kind for kind in wanted if kind not in kinds]
    counts = {kind: [place for place in places if place.kind == kind] for kind in kinds}
    whole = [kind for kind in kinds if all(_ran(place, seen) for place in counts[kind])]
    counted = ", ".join(_counted(kind, counts[kind], seen) for kind in kinds) or "no place for any is known"
    parts = [counted]
    parts += [f"the model has no place of {name_some(missing)}; it has {name_some(kinds)}"] if missing else []
    bound = [place for place in places if place.library is not None]
    parts += [] if bound or not wanted else [_NOTHING]
    silent = sorted({place.library or "" for place in bound if _launched(place, seen) is False})
    parts += [f"no kernel of {name_some(silent)} was launched in the profile"] if silent else []
    if bound and not seen.profile.kernels:
        parts.append("judged by what is bound and called, no kernel was recorded to confirm it")
    compiled = bool(seen.profile.compiled_regions)
    idle = [place for place in bound if not place.called and (not wanted or place.kind in wanted)]
    hidden = [place.name for place in idle if place.hidden or compiled]
    if hidden:
        parts.append(f"their calls in compiled code cannot be seen: {name_some(hidden)}")
        return undecided("; ".join(parts))
    satisfied = bool(wanted) and not missing and all(kind in whole for kind in wanted)
    present = any(_ran(place, seen) for place in places)
    return PathObservation(observed=join_values(whole), reason="; ".join(parts), satisfies=satisfied, present=present)


def _ran(place: FusedKernelSite, seen: Observation) -> bool:
    return place.library is not None and place.called and _launched(place, seen) is not False


def _launched(place: FusedKernelSite, seen: Observation) -> bool | None:
    """Whether the profile has a kernel of the library; None if no kernel was recorded or no rule recognises them."""
    rule = _RULES.get(place.library or "")
    return None if rule is None or not seen.profile.kernels else seen.profile.kernels.get(rule, 0) > 0


def _counted(kind: str, places: Sequence[FusedKernelSite], seen: Observation) -> str:
    """The number of sites with a fused kernel, and the number of those that were called."""
    bound = [place for place in places if place.library is not None]
    ran = sum(_ran(place, seen) for place in places)
    libraries = join_values(place.library for place in bound if place.library is not None)
    own = f" of {libraries}" if libraries else ""
    idle = f", bound in {len(bound)}" if ran != len(bound) else ""
    return f"{kind} {ran} of {len(places)}{own}{idle}"


PATHS: Mapping[str, JudgedPath] = {
    "checkpointing": JudgedPath(requirement=FLAG, judge=judge_checkpointing, by_operators=True),
    "checkpointing.layers": JudgedPath(requirement=SHARE, judge=judge_checkpointed_layers, by_operators=True),
    "tf32": JudgedPath(requirement=FLAG, judge=judge_tf32, by_operators=True, by_modules=False),
    "compile": JudgedPath(requirement=FLAG, judge=judge_compile, by_operators=True),
    "compile.share": JudgedPath(requirement=SHARE, judge=judge_compiled_share, by_operators=True),
    "mode": JudgedPath(requirement=Requirement(kind="choice", choices=("train", "eval")), judge=judge_mode),
    "fused.kernels": JudgedPath(requirement=Requirement(kind="text"), judge=judge_fused, by_operators=True),
}
