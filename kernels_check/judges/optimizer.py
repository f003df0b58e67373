"""Which optimizer stepped, by which implementation, and where its state lives.

``is_paged`` on a bitsandbytes optimizer is a wish: tensors below 1e5 elements, and every tensor on a CPU, are not paged
while the flag stays true. Only the state tensors themselves tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from kernels_check.check import FLAG, SHARE, Finding, Json, JudgedPath, Requirement, join_values

if TYPE_CHECKING:
    from kernels_check.observation.observe import Observation
    from kernels_check.observation.optimizers import OptimizerSeen

_NO_OPTIMIZER = Finding(observed=None, present=False, reason="no torch.optim.Optimizer stepped in the watched calls")

_FUSED_LOST = (
    "asked for and lost: load_state_dict() brings back the switch of the groups that were saved, "
    "set group['fused'] = True after it"
)


def judge_class(seen: Observation, required: Json) -> Finding:
    """Judge ``optimizer.class`` by the rule of ``is_class``."""
    if not seen.optimizers:
        return _NO_OPTIMIZER
    observed = join_values(optimizer.classes[0] for optimizer in seen.optimizers)
    matches = all(is_class(optimizer.classes, str(required)) for optimizer in seen.optimizers)
    reason = f"{observed} stepped {seen.optimizer_steps} times in {seen.calls} calls"
    return Finding(observed=observed, reason=reason, satisfies=matches)


def is_class(classes: tuple[str, ...], required: str) -> bool:
    """Decide whether an optimizer, given by the qualified names of its class and its bases, is the required one.

    The most derived class that comes from the required name's top-level package counts, and it must agree in the last
    component: ``torch.optim.AdamW`` is met by ``torch.optim.adamw.AdamW`` and by a class of one's own derived from it.
    Deeper bases do not count: torch derives AdamW from Adam, and an AdamW is no proof of an Adam.
    """
    package = required.partition(".")[0]
    own = next((name for name in classes if name.partition(".")[0] == package), None)
    if own is None:
        return False
    return own == required or own.rpartition(".")[2] == required.rpartition(".")[2]


def judge_fused(seen: Observation, required: Json) -> Finding:
    """Judge ``optimizer.fused``: torch's single-kernel update, against one kernel per operation or per tensor."""
    if not seen.optimizers:
        return _NO_OPTIMIZER
    operators = seen.profile.optimizer_ops
    observed = _implementation(operators)
    wished = join_values(str(optimizer.fused_requested) for optimizer in seen.optimizers)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(operators.items())) or "no update operator"
    reason = f"{counts} in one step; optimizers were built with fused={wished}"
    if observed == "bitsandbytes":
        reason += "; bitsandbytes has kernels of its own"
        return Finding(observed=observed, status="not_applicable", reason=reason)
    if not operators and seen.profile.compiled_regions:
        return Finding(observed=None, status="unknown", reason=f"{reason}; the update may be compiled")
    if required is True and observed != "fused":
        asked = any(seen_by.fused_requested for seen_by in seen.optimizers)
        reason += f"; {_FUSED_LOST if asked else 'build it with fused=True'}"
    return Finding(observed=observed, reason=reason, satisfies=(observed == "fused") == required)


def _implementation(operators: Iterable[str]) -> str:
    names = list(operators)
    for prefix, implementation in (
        ("bitsandbytes::", "bitsandbytes"),
        ("aten::_fused_", "fused"),
        ("aten::_foreach_", "foreach"),  # the fused update counts its steps with a foreach too: tested after it
    ):
        if any(name.startswith(prefix) for name in names):
            return implementation
    return "loop"


def judge_paged_share(seen: Observation, required: Json) -> Finding:
    """Judge ``optimizer.paged_share``, a minimum, by bytes of state."""
    if not seen.optimizers:
        return _NO_OPTIMIZER
    total = sum(optimizer.state_bytes for optimizer in seen.optimizers)
    paged = sum(optimizer.paged_bytes for optimizer in seen.optimizers)
    share = paged / total if total else 0.0
    reason = f"{paged} of {total} bytes of optimizer state are paged"
    if any(_paging_refused(optimizer) for optimizer in seen.optimizers):
        reason += "; Paged optimizers are not supported on CPU: bitsandbytes keeps is_paged=True and pages nothing"
    elif paged < total and any(optimizer.claims_paged for optimizer in seen.optimizers):
        reason += "; state of tensors below 100000 elements is never paged"
    minimum = float(required) if isinstance(required, int | float) else 0.0
    return Finding(observed=round(share, 6), reason=reason, satisfies=share >= minimum, present=paged > 0)


def _paging_refused(optimizer: OptimizerSeen) -> bool:
    return optimizer.claims_paged and optimizer.on_cpu


PATHS: Mapping[str, JudgedPath] = {
    "optimizer.class": JudgedPath(requirement=Requirement(kind="text"), judge=judge_class),
    "optimizer.fused": JudgedPath(requirement=FLAG, judge=judge_fused, rests_on=("update",)),
    "optimizer.paged_share": JudgedPath(requirement=SHARE, judge=judge_paged_share),
}
