"""How the frozen base weights are really stored, multiplied and left alone.

The storage of a 4-bit weight can be proved from its bytes. N x K weights take ceil(NK/2) bytes; each block of 64 adds
a float32 scale (4.500 bits a weight), which double quantisation turns into a byte and a float32 per 256 blocks (4.127).
A module class or a configuration proves nothing: a skipped layer keeps its float weight under the same model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kernels_check.check import (
    FLAG,
    Finding,
    Json,
    JudgedPath,
    Requirement,
    Status,
    join_values,
    name_some,
)

if TYPE_CHECKING:
    from kernels_check.observation.observe import Observation
    from kernels_check.observation.storage import Digest, Storage

_BITS_REMEDY = {
    4: "load with quantization_config=BitsAndBytesConfig(load_in_4bit=True) and keep targets out of its skip list",
    8: "load with quantization_config=BitsAndBytesConfig(load_in_8bit=True) and keep targets out of its skip list",
    16: "load with dtype=torch.bfloat16 and no quantization_config",
    32: "load with dtype=torch.float32 and no quantization_config",
}


def judge_bits(seen: Observation, required: Json) -> Finding:
    """Judge ``base.bits`` over every layer that carries an adapter."""
    stored = seen.storage()
    density = [item.bits_per_weight for item in stored.values() if item.bits_per_weight is not None]
    reason = f"{sum(density) / len(density):.3f} bits a weight with scales in {len(density)} layers" if density else ""
    remedy = _BITS_REMEDY.get(required) if isinstance(required, int) else None
    return _over_layers(stored, {name: item.bits for name, item in stored.items()}, required, reason, remedy)


def judge_quant_type(seen: Observation, required: Json) -> Finding:
    """Judge ``base.quant_type``."""
    stored = seen.storage()
    remedy = f"set bnb_4bit_quant_type={required!r} (the library's default is 'fp4')"
    return _over_layers(stored, {name: item.quant_type for name, item in stored.items()}, required, "", remedy)


def judge_double_quant(seen: Observation, required: Json) -> Finding:
    """Judge ``base.double_quant``."""
    stored = seen.storage()
    remedy = f"set bnb_4bit_use_double_quant={required} (the library's default is False)"
    return _over_layers(stored, {name: item.double_quant for name, item in stored.items()}, required, "", remedy)


def judge_frozen(seen: Observation, required: Json) -> Finding:
    """Judge ``base.frozen``: nothing trains, receives a gradient, is given to the optimizer, or changes its bytes."""
    base, before, after = seen.base_parameters(), seen.before, seen.after
    updated = {identity for optimizer in seen.optimizers for identity in optimizer.parameters}
    faults = []
    for problem, names in (
        ("require gradients", [name for name, value in base.items() if value.requires_grad]),
        ("received a gradient", [name for name in base if name in seen.gradients]),
        ("are given to the optimizer", [name for name, value in base.items() if id(value) in updated]),
    ):
        if names:
            faults.append(f"{len(names)} base parameters {problem}: {name_some(names)}")
    part = "all" if after.hashed_bytes == after.total_bytes else f"an even sample of {after.hashed_bytes / 2**20:.2f}"
    what = f"sha256 over {part} of {after.total_bytes / 2**20:.1f} MiB"
    changed, recast = _compare(before, after)
    if changed and before.packed != after.packed:
        reason = "an eval forward repacked Linear4bit weights in place (AVX512 layout): bytes cannot be compared"
        return Finding(observed=None, status="unknown", reason="; ".join([*faults, reason]))
    if changed:
        faults.append(f"{what}: {len(changed)} tensors changed over {seen.calls} steps: {name_some(changed)}")
    good = f"{what} unchanged over {seen.calls} steps, no gradient, not optimised"
    # bitsandbytes casts a bias to the compute dtype in the first forward: not trained, but not silent either.
    note = f"; cast once by the forward: {name_some(recast)}" if recast else ""
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


def _over_layers(
    stored: Mapping[str, Storage], values: Mapping[str, Json], required: Json, reason: str, remedy: str | None
) -> Finding:
    """Compare one property over all targeted layers and name the exceptions."""
    if not stored:
        return Finding(observed=None, present=False, reason="no layer carries an adapter")
    expected = required if required is not None else Counter(values.values()).most_common(1)[0][0]
    distinct = set(values.values())
    observed = distinct.pop() if len(distinct) == 1 else join_values(str(value) for value in values.values())
    parts = [f"{sum(value == expected for value in values.values())} of {len(values)} targeted layers: {expected}"]
    parts += [reason] if reason else []
    odd = [f"{name} ({value})" for name, value in values.items() if value != expected and value is not None]
    parts += [f"exceptions: {name_some(odd)}"] if odd else []
    unread = [name for name, value in values.items() if value is None]
    problems = [f"{name}: {item.problem}" for name, item in stored.items() if item.problem]
    parts += [f"cannot tell for {name_some(problems or unread)}"] if unread else []
    packed = [name for name, item in stored.items() if item.packed_for_cpu]
    if packed:
        parts.append(f"repacked in place for AVX512 by an eval forward, bfloat16 scales: {name_some(packed)}")
    parts += [f"remedy: {remedy}"] if odd and required is not None and remedy else []
    status: Status | None = "unknown" if unread and not odd else None
    return Finding(observed=observed, reason="; ".join(parts), status=status, satisfies=not odd and not unread)


_BITS = Requirement(kind="bits", choices=(4, 8, 16, 32))
_QUANT_TYPE = Requirement(kind="choice", choices=("nf4", "fp4", "int8", "none"))

PATHS: Mapping[str, JudgedPath] = {
    "base.bits": JudgedPath(requirement=_BITS, judge=judge_bits),
    "base.quant_type": JudgedPath(requirement=_QUANT_TYPE, judge=judge_quant_type),
    "base.double_quant": JudgedPath(requirement=FLAG, judge=judge_double_quant),
    "base.frozen": JudgedPath(requirement=FLAG, judge=judge_frozen),
}
