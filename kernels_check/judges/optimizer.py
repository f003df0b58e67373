"""Which optimizer stepped, which implementation it used, where its state is, and whether embeddings and norms train.

``is_paged`` on a bitsandbytes optimizer is only a request: tensors below 1e5 elements, and all tensors on a CPU, are
not paged although the flag stays true. Only the state tensors show what is paged.

Some recipes need trained embeddings and norms, and others must leave them unchanged: a new token has no meaning until
its embedding trains; a base that several adapters share must keep its own. A parameter counts as trained if a step
changed it by a gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from functools import partial
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
    format_count,
    join_clauses,
    join_values,
    name_some,
    undecided,
)

if TYPE_CHECKING:
    from kernels_check.observe.observation import Observation
    from kernels_check.observe.parts import Fate, ParameterStatus
    from kernels_check.observe.profile import GroupRecord

_FUSED_LOST = (
    "requested and lost: load_state_dict() restores the flag of the saved groups, set group['fused'] = True after it"
)


def judge_class(observation: Observation, required: Json) -> PathObservation:
    """Judge ``optimizer.class`` by the rule of ``is_class``."""
    if not observation.optimizers:
        return _report_missing_optimizer(observation)
    observed = join_values(optimizer.classes[0] for optimizer in observation.optimizers)
    matches = all(is_class(one.classes, str(required), one.steps_by) for one in observation.optimizers)
    steps = format_count(observation.optimizer_steps, "time")
    reason = f"{observed} stepped {steps} in {format_count(observation.calls, 'call')}"
    reason += f", by the step of {join_values(one.steps_by for one in observation.optimizers)}"
    return PathObservation(observed=observed, reason=reason, satisfies=matches)


def is_class(classes: tuple[str, ...], required: str, steps_by: str = "") -> bool:
    """Decide whether an optimizer, given by the qualified names of its class and its bases, is the required one.

    The most derived class that comes from the required name's top-level package counts, and it must agree in the last
    component: ``torch.optim.adamw.AdamW`` and a user's class derived from it satisfy ``torch.optim.AdamW``. Deeper
    bases do not count: torch derives AdamW from Adam, and an AdamW does not prove an Adam. A derived class that defines
    its own ``step``, given by ``steps_by``, may update in any way and is not the required class.
    """
    package = required.partition(".")[0]
    own = next((name for name in classes if name.partition(".")[0] == package), None)
    if own is None or own.rpartition(".")[2] != required.rpartition(".")[2]:
        return False
    return steps_by not in classes[: classes.index(own)]


def judge_fused(observation: Observation, required: Json) -> PathObservation:
    """Judge ``optimizer.fused``: torch's single-kernel update of every parameter that had a gradient."""
    if not observation.optimizers:
        return _report_missing_optimizer(observation)
    kinds = sum(observation.updated_by_kind, Counter[str]())
    total, fused, unseen = kinds.total(), kinds["fused"], kinds["unseen"]
    counts = ", ".join(f"{count} {name}" for name, count in sorted(Counter(observation.update_operators).items()))
    requested = join_values(str(optimizer.fused_requested) for optimizer in observation.optimizers)
    clauses = [
        f"{fused} of {total} parameters updated by fused kernels",
        f"{counts or 'no update operator'} in one step",
        f"optimizers were built with fused={requested}",
    ]
    if not total or unseen == total:
        return undecided(join_clauses(*clauses, _why_unseen(observation, total)))
    observed = join_values(kind for kind in kinds if kind != "unseen")
    clauses += [f"the update of {unseen} parameters was not observed"] if unseen else []
    if kinds["bitsandbytes"] and kinds["bitsandbytes"] + fused == total:
        reason = join_clauses(*clauses, "bitsandbytes uses its own kernels")
        return PathObservation(observed=observed, status="not_applicable", reason=reason)
    by_group = zip(observation.updated, observation.updated_by_kind, strict=True)
    others = [group for group, counted in by_group if counted.total() > counted["fused"]]
    named = name_some(f"group {group.index} of {group.optimizer}" for group in others)
    clauses += [f"not by fused kernels: {named}"] if fused and others else []
    clauses += [_remedy(others)] if required is True and fused < total else []
    is_decided = not unseen or (fused if required is False else total - fused - unseen)
    return PathObservation(
        observed=observed,
        status=None if is_decided else "unknown",
        reason=join_clauses(*clauses),
        satisfies=fused == total if required is True else not fused,
    )


def _remedy(groups: Sequence[GroupRecord]) -> str:
    without = sorted({group.optimizer for group in groups if not group.has_fused})
    if without:
        return f"{', '.join(without)} has no fused version: choose torch's AdamW, Adam, SGD or Adagrad with fused=True"
    return _FUSED_LOST if any(group.built_with for group in groups) else "build it with fused=True"


def _why_unseen(observation: Observation, total: int) -> str:
    """Why no operator of an update was recorded, although an optimizer stepped."""
    if not observation.updated:
        return "no optimizer stepped in the watched call"
    if not total:
        return "no parameter had a gradient, so that there was nothing to update"
    if observation.profile.compiled_regions:
        return "the update may be compiled"
    names = join_values(group.optimizer for group in observation.updated)
    return f"{names} wrote no parameter by a torch operator: it calls its own kernels, or updates in another way"


def _report_missing_optimizer(observation: Observation) -> PathObservation:
    """No optimizer of the model stepped: absent, or unknown where parameters changed or another optimizer stepped."""
    reason = f"no torch.optim.Optimizer stepped in {format_count(observation.calls, 'call')}"
    if observation.other_optimizers:
        names = join_values(observation.other_optimizers)
        reason = (
            f"{names} stepped, but its parameters are not those of the model: perhaps another model, or master weights"
        )
    if observation.changed:
        changed = format_count(len(observation.changed), "parameter")
        reason += f"; {changed} changed nevertheless, by another kind of optimizer?"
    elif not observation.other_optimizers or observation.untouched:
        return absent(reason)
    return undecided(reason, present=False)


def judge_paged_share(observation: Observation, required: Json) -> PathObservation:
    """Judge ``optimizer.paged_share``, a minimum, by bytes of state."""
    if not observation.optimizers:
        return _report_missing_optimizer(observation)
    total = sum(optimizer.state_bytes for optimizer in observation.optimizers)
    paged = sum(optimizer.paged_bytes for optimizer in observation.optimizers)
    claims = [optimizer for optimizer in observation.optimizers if optimizer.claims_paged]
    reason = f"{paged} of {total} bytes of optimizer state are paged"
    if any(optimizer.on_cpu for optimizer in claims):
        reason += "; Paged optimizers are not supported on CPU: bitsandbytes keeps is_paged=True and pages nothing"
    elif claims and paged < total:
        reason += "; state of tensors below 100000 elements is never paged"
    return at_least(paged / total if total else 0.0, required, reason)


_ROUNDED = "parameters with a gradient and a learning rate that did not change were rounded back: keep them in float32"
_MOVED = frozenset({"updated", "moved without a gradient", "undone after an update"})
"""Fates of a parameter whose value changed."""
_INCONCLUSIVE: Mapping[Fate, str] = {
    "learning rate 0": "the learning rate is 0",
    "changed, no gradient seen": (
        "parameters without a gradient changed because something else wrote them, such as a copy of master weights"
    ),
    "its tokens are not in the batches": "use a batch that contains the trained tokens",
}
"""Fates after which a further step may be conclusive, and why, the most important first."""


def judge_parts(observation: Observation, required: Json, *, what: str) -> PathObservation:
    """Judge ``embedding.trained``, of the input and the output embedding, or ``norms.trained``, of every norm.

    ``observed`` is True if all are updated, False if none is, else the number updated and the total.
    """
    parts: Sequence[ParameterStatus] = getattr(observation, what)
    if not parts:
        return absent(f"the model has no {what} with parameters that are known")
    fates = {name: fate for part in parts for name, fate in part.fates.items()}
    updated = sum(part.updated for part in parts)
    partly = "updated" in fates.values()
    others = [f"{name} ({fate})" for name, fate in fates.items() if fate != "updated"]
    why = _why_inconclusive(set(fates.values()), observation)
    reason = join_clauses(
        f"{updated} of {len(parts)} {what} updated, in {observation.optimizer_steps} updates",
        *(f"{part.name}: {part.tokens[0]} of {part.tokens[1]} tokens" for part in parts if part.tokens),
        f"parameters: {count_values(fates.values())}" if others else "",
        f"not updated: {name_some(others)}" if others else "",
        _ROUNDED if "unchanged" in fates.values() else "",
        why,
    )
    if why is not None:
        return undecided(reason, present=partly)
    whole = updated == len(parts)
    observed: Json = whole or (f"{updated} of {len(parts)}" if partly else False)
    unmoved = _MOVED.isdisjoint(fates.values())
    return PathObservation(observed=observed, reason=reason, present=partly, satisfies=whole if required else unmoved)


def _why_inconclusive(fates: Set[Fate], observation: Observation) -> str | None:
    """Why the observed steps are not conclusive."""
    if fates <= {"updated", "frozen"}:
        return None
    if not observation.optimizer_steps:
        return "no torch.optim.Optimizer stepped"
    return next((why for fate, why in _INCONCLUSIVE.items() if fate in fates), None)


_FURTHER_STEPS = (
    "a gradient of zero does not show what learns once the other factor has left zero: open the same watch "
    "around the next step, too"
)
PATHS: Mapping[str, JudgedPath] = {
    **{
        path: JudgedPath(
            requirement=FLAG,
            judge=partial(judge_parts, what=what),
            by_modules=False,
            needs_update=True,
            further_steps=_FURTHER_STEPS,
        )
        for path, what in (("embedding.trained", "embeddings"), ("norms.trained", "norms"))
    },
    "optimizer.class": JudgedPath(
        requirement=Requirement(kind="class"), judge=judge_class, by_modules=False, needs_update=True
    ),
    "optimizer.fused": JudgedPath(
        requirement=FLAG, judge=judge_fused, by_operators=True, by_modules=False, needs_update=True
    ),
    "optimizer.paged_share": JudgedPath(
        requirement=SHARE, judge=judge_paged_share, by_modules=False, needs_update=True
    ),
}
