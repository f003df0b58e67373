"""How the frozen base weights were multiplied: in which precision, and 4-bit ones by which path.

What a layer says of itself is a wish: autocast decides over the dtype of a weight, and a wrapper may pass the layer by.
So each product is attributed to the layer that called it, and every call of every layer must have had one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kernels_check.check import (
    DTYPE,
    Json,
    JudgedPath,
    PathObservation,
    Requirement,
    count_values,
    join_values,
    name_some,
)

if TYPE_CHECKING:
    from kernels_check.observe.layers import LayerProducts
    from kernels_check.observe.observation import Observation


def judge_compute_dtype(seen: Observation, required: Json) -> PathObservation:
    """Judge ``base.compute_dtype`` over every layer that carries an adapter, by its products."""
    stored = seen.storage()
    if not stored:
        return PathObservation(observed=None, present=False, reason="no layer carries an adapter over a base layer")
    ran = seen.base_products()
    values = {name: join_values(ran.dtypes(name)) for name in stored}
    expected = required if required is not None else _most_common(values)
    good = [name for name, value in values.items() if value is not None and value == expected]
    reason = f"{len(good)} of {len(values)} targeted layers: {expected}, by the products that they called"
    odd = [f"{name} ({value})" for name, value in values.items() if value not in (None, expected)]
    reason += f"; exceptions: {name_some(odd)}" if odd else ""
    unclear = [name for name, value in values.items() if value is None]
    reason += f"; unknown for {name_some(unclear)}: no product of theirs was seen" if unclear else ""
    claims = {item.compute_dtype for name, item in stored.items() if item.compute_dtype not in (None, values[name])}
    reason += f"; layers claim {join_values(str(claim) for claim in claims)}" if claims else ""
    if odd and required is not None and any(item.bits == 4 for item in stored.values()):
        reason += f"; remedy: set bnb_4bit_compute_dtype=torch.{required} (the library's default is torch.float32)"
    reason = "; ".join([reason, *sorted({item.note for item in stored.values() if item.note})])
    observed = join_values(part for value in values.values() if value is not None for part in value.split("+"))
    return PathObservation(
        observed=observed,
        reason=reason,
        status="unknown" if unclear and not odd else None,
        satisfies=not odd and not unclear,
    )


def judge_gemm_path(seen: Observation, required: Json) -> PathObservation:
    """Judge ``base.gemm_path`` from what ran inside the 4-bit operators of the forward pass."""
    layers = seen.fourbit_products()
    calls = layers.all
    if not calls:
        if layers.names or seen.census().bytes_of[4]:  # compiled layers call no hook, and have no name
            return PathObservation(
                observed=None, status="unknown", reason="4-bit weights but no known 4-bit operator ran"
            )
        return PathObservation(observed=None, status="not_applicable", present=False, reason="the base is not 4-bit")
    paths = [str(call.path) for call in calls]
    kernels = {rule: count for rule, count in seen.profile.kernels.items() if rule.startswith(("BNB-GEMM", "BNB-DEQ"))}
    reason = f"forward 4-bit products: {count_values(paths)}" + (f"; kernels {kernels}" if kernels else "")
    passed_by = _passed_by(layers)
    if passed_by:
        total = len(layers.names)
        reason += f"; {total - len(passed_by)} of {total} 4-bit layers, without one ran: {name_some(passed_by)}"
    astray = required is not None and any(path not in (required, "unknown") for path in paths)
    return PathObservation(
        observed=join_values([*paths, *(["bypassed"] if passed_by else [])]),
        reason=reason,
        status="unknown" if "unknown" in paths and not astray and not passed_by else None,
    )


def _passed_by(layers: LayerProducts) -> list[str]:
    return [*layers.without, *layers.passed_by]


def _most_common(values: dict[str, str | None]) -> str | None:
    known = [value for value in values.values() if value is not None]
    return max(known, key=known.count) if known else None


_GEMM_PATH = Requirement(kind="choice", choices=("dequantize", "fused", "packed_cpu"))

PATHS: Mapping[str, JudgedPath] = {
    "base.compute_dtype": JudgedPath(requirement=DTYPE, judge=judge_compute_dtype, by_operators=True),
    "base.gemm_path": JudgedPath(requirement=_GEMM_PATH, judge=judge_gemm_path, by_operators=True),
}
