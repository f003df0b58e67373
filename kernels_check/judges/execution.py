"""How the step was executed: recomputation, TF32, compilation, train or eval mode, fused kernels of other libraries.

Each of these has a flag that may be wrong. Gradient checkpointing stays "on" in eval mode and recomputes nothing; a
compiled model that hit its recompile limit runs eagerly without a warning; fused kernels that are enabled after the
model was built, or for an unsupported architecture, are bound in 0 of 28 layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
    join_clauses,
    join_values,
    name_some,
    undecided,
)

if TYPE_CHECKING:
    from kernels_check.observe.execution import BlockRecomputed, FusedKernelSite
    from kernels_check.observe.observation import Observation


def judge_checkpointing(observation: Observation, required: Json) -> PathObservation:
    """Judge ``checkpointing``: every block that receives a gradient is recomputed, for each of its calls."""
    judged = _measure_recomputation(observation)
    if isinstance(judged, PathObservation):
        return judged
    share, is_recomputed, reason = judged
    finding = PathObservation(observed=is_recomputed, reason=reason, present=is_recomputed)
    if required is not True or share >= 1.0 or not (is_recomputed or observation.checkpointing_enabled):
        return finding
    modes = "train" if any(observation.modes.values()) else "eval"
    cause = f"the flag is on but nothing recomputes in {modes} mode; transformers does so in train mode only"
    if is_recomputed:
        cause = "only a part is recomputed: look for a layer whose gradient_checkpointing is off, or for a context_fn"
    return replace(finding, status="fallback", reason=f"{reason}; {cause}")


def judge_checkpointed_layers(observation: Observation, required: Json) -> PathObservation:
    """Judge ``checkpointing.layers``, a minimum: the share of recomputed blocks."""
    judged = _measure_recomputation(observation)
    return judged if isinstance(judged, PathObservation) else at_least(judged[0], required, judged[2])


def _measure_recomputation(observation: Observation) -> PathObservation | tuple[float, bool, str]:
    """The share of the blocks that are recomputed, whether any is, and the reason."""
    compiled = observation.compiled_blocks.compiled if observation.profile.compiled_regions else ()
    blocks, idle = observation.recomputed_blocks, observation.blocks_without_gradient
    by_calls = [block for block in blocks if block.name not in compiled or block.recomputed_calls]
    hidden = len(set(compiled).difference(block.name for block in by_calls))
    again, shown = _measure_compiled_recomputation(observation)
    if not blocks and not hidden:
        if not idle:
            return _judge_unobserved(observation, "no layer call was seen in the step")
        return 0.0, False, f"no gradient reaches the {len(idle)} blocks that ran, so there is nothing to recompute"
    if hidden and again is None:
        return undecided(shown, present=False)
    complete = [block for block in by_calls if block.is_complete]
    share = (len(complete) + hidden * (again or 0.0)) / (len(by_calls) + hidden)
    is_recomputed = any(block.recomputed_calls for block in by_calls) or bool(hidden and again)
    missing = [_describe_incomplete(block) for block in by_calls if not block.is_complete] if is_recomputed else []
    partly = [
        f"{block.recomputed_modules} of {block.modules} modules of {block.name}"
        for block in complete
        if block.recomputed_modules < block.modules
    ]
    without = f", without {name_some(missing)}" if missing else ""
    reason = join_clauses(
        f"{len(complete)} of {len(by_calls)} blocks computed again in the backward pass{without}",
        f"called again: {name_some(partly)}" if partly else "",
        f"{len(idle)} further blocks receive no gradient and store no activations" if idle else "",
        shown if hidden else "",
    )
    return share, is_recomputed, reason


def _judge_unobserved(observation: Observation, reason: str) -> PathObservation:
    """The result without a module call: absent if the step did not use the model (but, say, a copy), else unknown."""
    return absent(reason) if observation.untouched else undecided(reason, present=False)


def _describe_incomplete(block: BlockRecomputed) -> str:
    if block.recomputed_calls < block.calls:
        return (
            f"{block.name} ({block.recomputed_calls} of {block.calls} calls)" if block.recomputed_calls else block.name
        )
    return f"{block.name} without {name_some(block.kept)}"


def _measure_compiled_recomputation(observation: Observation) -> tuple[float | None, str]:
    """For blocks in compiled code, which calls no hooks: the share of attention that ran again; None if unknown."""
    calls = [call for call in observation.profile.attention if call.direction == "forward" and call.compiled]
    first = sum(not call.recomputed for call in calls)
    if not first:
        return None, "the blocks ran in compiled code, which calls no hook, and no attention in it was seen"
    share = min(1.0, (len(calls) - first) / first)
    if not share and observation.checkpointing_enabled:
        return None, "the blocks ran in compiled code, which may keep the attention and recompute the rest"
    return share, f"in compiled code, by its attention: {len(calls)} forward calls for {first} layers"


def judge_tf32(observation: Observation, required: Json) -> PathObservation:
    """Judge ``tf32`` by kernels on CUDA, else by the flag."""
    import torch

    if not torch.cuda.is_available():
        return PathObservation(
            observed=False, present=False, reason=f"no CUDA device: TF32 cannot run ({_tf32_flag()})"
        )
    kernels = observation.profile.kernels
    if not kernels:
        return undecided(f"no kernel recorded; {_tf32_flag()}", present=False)
    tensor_cores, plain = kernels.get("GEMM-TF32", 0), kernels.get("GEMM-FP32-SIMT", 0)
    reason = f"{tensor_cores} TF32 and {plain} plain float32 GEMM launches; {_tf32_flag()}"
    if not tensor_cores and not plain:
        reason += "; no float32 GEMM that the rules know, which a bfloat16 step need not contain"
    return PathObservation(observed=tensor_cores > 0, reason=reason, present=tensor_cores > 0)


def _tf32_flag() -> str:
    import torch

    try:
        return f"torch.backends.cuda.matmul.fp32_precision={torch.backends.cuda.matmul.fp32_precision!r}"
    except (AttributeError, RuntimeError) as error:  # torch raises if the old and new settings are mixed
        return f"flag unreadable: {error}"


def judge_compile(observation: Observation, required: Json) -> PathObservation:
    """Judge ``compile``: all blocks ran in compiled code; graph breaks and recompilations are only reported."""
    regions, compilations, blocks = (
        observation.profile.compiled_regions,
        observation.compilations,
        observation.compiled_blocks,
    )
    reason = _describe_regions(observation)
    if _is_unreadable(observation):
        return undecided(f"{reason}; {compilations}")
    whole = bool(blocks.compiled) and not blocks.partly and not blocks.eager
    observed: Json = whole or ("in part" if blocks.compiled or blocks.partly else False)
    if whole and compilations.breaks:
        observed = f"in pieces: {name_some(compilations.breaks, '; ')}"
    eagerly = "" if whole else _why_eager(observation)
    return PathObservation(
        observed=observed,
        reason=join_clauses(reason + eagerly, str(compilations) if regions or not compilations.empty else ""),
        present=whole or bool(blocks.regions or eagerly),
        satisfies=whole if required is True else not blocks.regions,
    )


def judge_compiled_share(observation: Observation, required: Json) -> PathObservation:
    """Judge ``compile.share``, a minimum: the share of the blocks that ran in compiled code."""
    blocks = observation.compiled_blocks
    reason = _describe_regions(observation)
    if _is_unreadable(observation):
        return undecided(f"{reason}; {observation.compilations}", present=False)
    if not blocks.ran:
        return _judge_unobserved(observation, f"{reason}; no block of the model was seen to run")
    share = len(blocks.compiled) / blocks.ran
    return at_least(share, required, reason + (_why_eager(observation) if share < 1.0 else ""))


def _describe_regions(observation: Observation) -> str:
    """The regions that were entered, and the blocks that ran in them."""
    regions, lookups, blocks = (
        observation.profile.compiled_regions,
        observation.profile.compiler_lookups,
        observation.compiled_blocks,
    )
    reason = f"{regions} compiled regions entered, {lookups} compiler cache look-ups"
    if not regions:
        return reason
    known = blocks.compiled or blocks.partly  # then the regions may be parts of the module that holds the blocks
    example = "" if known else ", for example of a loss"
    return join_clauses(
        reason,
        f"{len(blocks.compiled)} of {blocks.ran} blocks ran in compiled code",
        f"eager in part: {name_some(blocks.partly)}" if blocks.partly else "",
        f"eager: {name_some(blocks.eager)}" if blocks.eager and known else "",
        f"{blocks.helpers} regions outside of its blocks{example}" if blocks.helpers else "",
    )


def _is_unreadable(observation: Observation) -> bool:
    """Whether code was compiled but the compiler's record of it cannot be read."""
    return bool(observation.profile.compiled_regions) and observation.compilations.unreadable is not None


def _why_eager(observation: Observation) -> str:
    """Why code under torch.compile ran eagerly; empty if none did."""
    regions, lookups, compilations = (
        observation.profile.compiled_regions,
        observation.profile.compiler_lookups,
        observation.compilations,
    )
    if not lookups or (regions and (lookups <= regions or not compilations.refused)):
        return ""
    return (
        f": {'part of ' if regions else ''}the code ran eagerly, because the recompile limit was reached or "
        "compilation is disabled; pad to few lengths, mark the sizes dynamic, or raise "
        f"torch._dynamo.config.recompile_limit{'' if regions else f'; {compilations}'}"
    )


def judge_mode(observation: Observation, required: Json) -> PathObservation:
    """Judge ``mode``: the mode of the modules while the step ran."""
    names = {True: "train", False: "eval", None: "now train, now eval"}
    modes = [names[training] for training in observation.modes.values()]
    expected = required if required is not None else max(set(modes), key=modes.count)
    others = [name or "the model itself" for name, training in observation.modes.items() if names[training] != expected]
    return PathObservation(
        observed=modes[0] if len(set(modes)) == 1 and modes[0] in ("train", "eval") else "mixed",
        reason=join_clauses(
            f"modules: {count_values(modes)}",
            f"not in {expected} mode: {name_some(others)}" if others else "",
            f"call model.{expected}() before the step" if others and required is not None else "",
        ),
    )


_RULES = {"liger_kernel": "LIGER", "unsloth": "UNSLOTH", "unsloth_zoo": "UNSLOTH"}
"""The rule that recognises the kernels of a library, see ``rules``."""
_NOT_BOUND = "no fused kernel of a library is bound: apply it before the model is built, or to the model itself"


def judge_fused(observation: Observation, required: Json) -> PathObservation:
    """Judge ``fused.kernels``: kinds joined by ``+``; each kind must have been called at all of its sites."""
    sites = observation.fused_kernel_sites
    by_kind = {
        kind: [site for site in sites if site.kind == kind] for kind in dict.fromkeys(site.kind for site in sites)
    }
    required_kinds = [kind.strip() for kind in required.split("+")] if isinstance(required, str) else []
    missing = [kind for kind in required_kinds if kind not in by_kind]
    whole = [kind for kind, of_kind in by_kind.items() if all(_is_called(site, observation) for site in of_kind)]
    counted = ", ".join(_describe_sites(kind, of_kind, observation) for kind, of_kind in by_kind.items())
    bound = [site for site in sites if site.library is not None]
    silent = sorted({site.library or "" for site in bound if _has_kernels(site, observation) is False})
    compiled = bool(observation.profile.compiled_regions)
    idle = [site for site in bound if not site.called and (not required_kinds or site.kind in required_kinds)]
    hidden = [site.name for site in idle if site.hidden or compiled]
    unconfirmed = "judged by the bound functions and their calls; no kernel was recorded to confirm them"
    reason = join_clauses(
        counted or "no place for a fused kernel is known in the model",
        f"the model has no place for {name_some(missing)}; it has {name_some(by_kind)}" if missing else "",
        "" if bound or not required_kinds else _NOT_BOUND,
        f"no kernel of {name_some(silent)} was launched in the profile" if silent else "",
        unconfirmed if bound and not observation.profile.kernels else "",
        f"their calls in compiled code cannot be seen: {name_some(hidden)}" if hidden else "",
    )
    if hidden:
        return undecided(reason)
    return PathObservation(
        observed=join_values(whole),
        reason=reason,
        satisfies=bool(required_kinds) and all(kind in whole for kind in required_kinds),
        present=any(_is_called(site, observation) for site in sites),
    )


def _is_called(site: FusedKernelSite, observation: Observation) -> bool:
    return site.library is not None and site.called and _has_kernels(site, observation) is not False


def _has_kernels(site: FusedKernelSite, observation: Observation) -> bool | None:
    """Whether the profile has a kernel of the library; None if no kernel was recorded or no rule recognises them."""
    rule = _RULES.get(site.library or "")
    return None if rule is None or not observation.profile.kernels else observation.profile.kernels.get(rule, 0) > 0


def _describe_sites(kind: str, sites: Sequence[FusedKernelSite], observation: Observation) -> str:
    """The number of sites with a fused kernel, and the number of those that were called."""
    libraries = [site.library for site in sites if site.library is not None]
    ran = sum(_is_called(site, observation) for site in sites)
    by = f" of {join_values(libraries)}" if libraries else ""
    idle = f", bound in {len(libraries)}" if ran != len(libraries) else ""
    return f"{kind} {ran} of {len(sites)}{by}{idle}"


PATHS: Mapping[str, JudgedPath] = {
    "checkpointing": JudgedPath(requirement=FLAG, judge=judge_checkpointing, by_operators=True),
    "checkpointing.layers": JudgedPath(requirement=SHARE, judge=judge_checkpointed_layers, by_operators=True),
    "tf32": JudgedPath(requirement=FLAG, judge=judge_tf32, by_operators=True, by_modules=False),
    "compile": JudgedPath(requirement=FLAG, judge=judge_compile, by_operators=True),
    "compile.share": JudgedPath(requirement=SHARE, judge=judge_compiled_share, by_operators=True),
    "mode": JudgedPath(requirement=Requirement(kind="choice", choices=("train", "eval")), judge=judge_mode),
    "fused.kernels": JudgedPath(requirement=Requirement(kind="text"), judge=judge_fused, by_operators=True),
}
