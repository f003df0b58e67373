"""Which fused kernels of other libraries are bound in the model, and in how many places they were called.

The switch that asks for them is silent where it comes after the model was built, or where it does not know the
architecture: then they are bound in 0 of 28 layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kernels_check.check import Json, JudgedPath, PathObservation, Requirement, join_values, name_some

if TYPE_CHECKING:
    from kernels_check.observe.execution import FusedKernelSite
    from kernels_check.observe.observation import Observation

_RULES = {"liger_kernel": "LIGER", "unsloth": "UNSLOTH", "unsloth_zoo": "UNSLOTH"}
"""The rule that knows the kernels of a library, see ``rules``."""
_NOTHING = "nothing of a library of fused kernels is bound: apply it before the model is built, or to the model itself"


def judge_fused(seen: Observation, required: Json) -> PathObservation:
    """Judge ``fused.kernels``: kinds, joined by ``+``, each of which must have been called in all of its places."""
    places = seen.swapped()
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
        return PathObservation(observed=None, status="unknown", reason="; ".join(parts))
    satisfied = bool(wanted) and not missing and all(kind in whole for kind in wanted)
    present = any(_ran(place, seen) for place in places)
    return PathObservation(observed=join_values(whole), reason="; ".join(parts), satisfies=satisfied, present=present)


def _ran(place: FusedKernelSite, seen: Observation) -> bool:
    return place.library is not None and place.called and _launched(place, seen) is not False


def _launched(place: FusedKernelSite, seen: Observation) -> bool | None:
    """Whether the profile has a kernel of the library; None where no kernel was recorded or no rule knows its own."""
    rule = _RULES.get(place.library or "")
    return None if rule is None or not seen.profile.kernels else seen.profile.kernels.get(rule, 0) > 0


def _counted(kind: str, places: Sequence[FusedKernelSite], seen: Observation) -> str:
    """In how many places something is bound, and in how many of them it was called."""
    bound = [place for place in places if place.library is not None]
    ran = sum(_ran(place, seen) for place in places)
    libraries = join_values(place.library for place in bound if place.library is not None)
    own = f" of {libraries}" if libraries else ""
    idle = f", bound in {len(bound)}" if ran != len(bound) else ""
    return f"{kind} {ran} of {len(places)}{own}{idle}"


PATHS: Mapping[str, JudgedPath] = {
    "fused.kernels": JudgedPath(requirement=Requirement(kind="text"), judge=judge_fused, by_operators=True),
}
