"""Whether embeddings and norms are trained, which some recipes need and others must not do.

A new token means nothing until the embedding trains; a base that several adapters are to share must keep its own. Flags
do not tell: what is trained is what the steps have changed by a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING

from kernels_check.check import FLAG, Json, JudgedPath, PathObservation, count_values, name_some

if TYPE_CHECKING:
    from kernels_check.observe.observation import Observation
    from kernels_check.observe.parts import Fate, ParameterStatus

_ROUNDED = "what had a gradient and a rate and is unchanged was rounded away: keep it in float32"
_MOVED = frozenset({"updated", "moved without a gradient", "undone after an update"})
"""What becomes of a parameter that does not stay as it was."""


def judge_embeddings(seen: Observation, required: Json) -> PathObservation:
    """Judge ``embedding.trained``: the input and the output embedding, tied ones once."""
    return _judge(seen, seen.embeddings, "embeddings", required)


def judge_norms(seen: Observation, required: Json) -> PathObservation:
    """Judge ``norms.trained``: every norm with parameters."""
    return _judge(seen, seen.norms, "norms", required)


def _judge(seen: Observation, parts: Sequence[ParameterStatus], what: str, required: Json) -> PathObservation:
    """True where all are updated, False where none is, else how many of how many."""
    if not parts:
        return PathObservation(
            observed=None, present=False, reason=f"the model has no {what} with parameters that are known"
        )
    fates = {name: fate for part in parts for name, fate in part.fates.items()}
    updated = [part.name for part in parts if part.updated]
    partly = any(fate == "updated" for fate in fates.values())
    reason = f"{len(updated)} of {len(parts)} {what} updated, in {seen.optimizer_steps} updates"
    reason += "".join(f"; {part.name}: {part.tokens[0]} of {part.tokens[1]} tokens" for part in parts if part.tokens)
    others = [f"{name} ({fate})" for name, fate in fates.items() if fate != "updated"]
    reason += f"; parameters: {count_values(fates.values())}" if others else ""
    reason += f"; not updated: {name_some(others)}" if others else ""
    if "unchanged" in fates.values():
        reason += f"; {_ROUNDED}"
    why = _doubt(set(fates.values()), seen)
    if why is not None:
        return PathObservation(observed=None, status="unknown", present=partly, reason=f"{reason}; {why}")
    whole = len(updated) == len(parts)
    observed: Json = whole or (f"{len(updated)} of {len(parts)}" if partly else False)
    kept = _MOVED.isdisjoint(fates.values())
    return PathObservation(observed=observed, reason=reason, present=partly, satisfies=whole if required else kept)


def _doubt(fates: Set[Fate], seen: Observation) -> str | None:
    """Why the steps do not show it."""
    if fates <= {"updated", "frozen"}:
        return None
    if not seen.optimizer_steps:
        return "no torch.optim.Optimizer stepped"
    if "given a rate of 0" in fates:
        return "the learning rate is 0"
    if "changed, no gradient seen" in fates:
        return "what changed without a gradient was written by something else, such as a copy of master weights"
    if "none of its tokens in the batches" in fates:
        return "take a batch that holds the tokens that are trained"
    return None


_FURTHER_STEPS = (
    "a gradient of zero does not show what learns once the other factor has left zero: open the same watch "
    "around the next step, too"
)
PATHS: Mapping[str, JudgedPath] = {
    path: JudgedPath(requirement=FLAG, judge=judge, by_modules=False, takes_update=True, further_steps=_FURTHER_STEPS)
    for path, judge in (("embedding.trained", judge_embeddings), ("norms.trained", judge_norms))
}
