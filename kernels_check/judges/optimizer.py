"""Which optimizer stepped, by which implementation, and where its state lives.

``is_paged`` on a bitsandbytes optimizer is a wish: tensors below 1e5 elements, and every tensor on a CPU, are not paged
while the flag stays true. Only the state tensors themselves show it.
"""

from __future__ import annotations

from collections import Counter
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
    format_count,
    join_values,
    name_some,
    undecided,
)

if TYPE_CHECKING:
    from kernels_check.observe.observation import Observation
    from kernels_check.observe.profile import GroupSeen, OptimizerSeen

_UNSEEN = "unseen"

_FUSED_LOST = (
    "asked for and lost: load_state_dict() brings back the switch of the groups that were saved, "
    "set group['fused'] = True after it"
)


def judge_class(seen: Observation, required: Json) -> PathObservation:
    """Judge ``optimizer.class`` by the rule of ``is_class``."""
    if not seen.optimizers:
        return _no_optimizer(seen)
    observed = join_values(optimizer.classes[0] for optimizer in seen.optimizers)
    matches = all(is_class(optimizer.classes, str(required)) for optimizer in seen.optimizers)
    reason = f"{observed} stepped {format_count(seen.optimizer_steps, 'time')} in {format_count(seen.calls, 'call')}"
    return PathObservation(observed=observed, reason=reason, satisfies=matches)


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


def judge_fused(seen: Observation, required: Json) -> PathObservation:
    """Judge ``optimizer.fused``: torch's single-kernel update of every parameter that had a gradient."""
    if not seen.optimizers:
        return _no_optimizer(seen)
    updated = seen.updated_by_kind
    kinds = sum(updated, Counter[str]())
    total, fused, unseen = kinds.total(), kinds["fused"], kinds[_UNSEEN]
    operators = Counter(seen.update_operators)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(operators.items())) or "no update operator"
    wished = join_values(str(optimizer.fused_requested) for optimizer in seen.optimizers)
    reason = f"{fused} of {total} parameters updated by fused kernels; {counts} in one step; "
    reason += f"optimizers were built with fused={wished}"
    if not total or unseen == total:
        return undecided(f"{reason}; {_why_unseen(seen, total)}")
    observed = join_values(kind for kind in kinds if kind != _UNSEEN)
    if unseen:
        reason += f"; of {unseen} parameters no update was seen"
    if kinds["bitsandbytes"] and kinds["bitsandbytes"] + fused == total:
        reason += "; bitsandbytes has kernels of its own"
        return PathObservation(observed=observed, status="not_applicable", reason=reason)
    others = [group for group, counted in zip(seen.updated, updated, strict=True) if counted.total() > counted["fused"]]
    if fused and others:
        reason += f"; not by fused kernels: {name_some(f'group {one.index} of {one.optimizer}' for one in others)}"
    if required is True and fused < total:
        reason += f"; {_remedy(others)}"
    decided = fused if required is False else total - fused - unseen
    if unseen and not decided:
        return PathObservation(observed=observed, status="unknown", reason=reason)
    return PathObservation(
        observed=observed, reason=reason, satisfies=(fused == total) if required is True else not fused
    )


def _remedy(groups: Sequence[GroupSeen]) -> str:
    without = sorted({group.optimizer for group in groups if not group.has_fused})
    if without:
        return f"{', '.join(without)} has no fused version: choose torch's AdamW, Adam, SGD or Adagrad with fused=True"
    return _FUSED_LOST if any(group.built_with for group in groups) else "build it with fused=True"


def _why_unseen(seen: Observation, total: int) -> str:
    """Why no operator of an update was seen, although an optimizer stepped."""
    if not seen.updated:
        return "no optimizer stepped in the watched call"
    if not total:
        return "no parameter had a gradient, so that there was nothing to update"
    if seen.profile.compiled_regions:
        return "the update may be compiled"
    names = join_values(group.optimizer for group in seen.updated)
    return f"{names} wrote no parameter by an operator: it calls kernels of its own, or updates in another way"


def _who_stepped(seen: Observation) -> str:
    """What stepped, where no optimizer that holds parameters of the model did."""
    if not seen.other_optimizers:
        return f"no torch.optim.Optimizer stepped in {format_count(seen.calls, 'call')}"
    names = join_values(seen.other_optimizers)
    return f"{names} stepped and holds no parameter of the model, but those of another, or a copy of master weights"


def _no_optimizer(seen: Observation) -> PathObservation:
    """Nothing stepped that could be judged; what may have updated the model all the same makes it unknown."""
    reason = _who_stepped(seen)
    if seen.changed:
        reason += (
            f"; {format_count(len(seen.changed), 'parameter')} changed all the same: by an optimizer of another kind?"
        )
    elif not seen.other_optimizers or seen.untouched:
        return absent(reason)
    return undecided(reason, present=False)


def judge_paged_share(seen: Observation, required: Json) -> PathObservation:
    """Judge ``optimizer.paged_share``, a minimum, by bytes of state."""
    if not seen.optimizers:
        return _no_optimizer(seen)
    total = sum(optimizer.state_bytes for optimizer in seen.optimizers)
    paged = sum(optimizer.paged_bytes for optimizer in seen.optimizers)
    share = paged / total if total else 0.0
    reason = f"{paged} of {total} bytes of optimizer state are paged"
    if any(_paging_refused(optimizer) for optimizer in seen.optimizers):
        reason += "; Paged optimizers are not supported on CPU: bitsandbytes keeps is_paged=True and pages nothing"
    elif paged < total and any(optimizer.claims_paged for optimizer in seen.optimizers):
        reason += "; state of tensors below 100000 elements is never paged"
    return at_least(share, required, reason)


def _paging_refused(optimizer: OptimizerSeen) -> bool:
    return optimizer.claims_paged and optimizer.on_cpu


PATHS: Mapping[str, JudgedPath] = {
    "optimizer.class": JudgedPath(
        requirement=Requirement(kind="class"), judge=judge_class, by_modules=False, takes_update=True
    ),
    "optimizer.fused": JudgedPath(
        requirement=FLAG, judge=judge_fused, by_operators=True, by_modules=False, takes_update=True
    ),
    "optimizer.paged_share": JudgedPath(
        requirement=SHARE, judge=judge_paged_share, by_modules=False, takes_update=True
    ),
}
