"""Which pairs stay when some trials were disturbed, decided without a look at their times.

Dropping slow trials makes any code look fast. A flag that does not know the outcome (another process on the device, a
clock that was throttled, less CPU time than wall time) may drop a trial; it then drops the whole pair, or the pairing
is lost. The flags themselves can still be an effect of the candidate, which may heat the GPU more: so the exact test
of McNemar (1947) asks whether one side is flagged more often where the two differ. And where too little would be left,
nothing is dropped: a filter must not end in an empty result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorameter.stats.intervals import sign_test
from lorameter.stats.samples import checked_number
from lorameter.stats.verdict import checked_alpha

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptPairs:
    """The pairs to compare, and how the others were lost."""

    kept: tuple[int, ...]
    """Indexes of the pairs, in order."""
    base_flagged: int
    """Pairs whose base trial is flagged; a pair may count here and below."""
    candidate_flagged: int
    """Pairs whose candidate trial is flagged."""
    balanced: bool
    """False: one side is flagged more often than chance allows, so dropping may favour it."""
    refused: bool
    """True: too few pairs would have remained, and none was dropped."""
    reason: str
    """One sentence for people: what was dropped, or why nothing was."""


def kept_pairs(
    base_flags: Sequence[bool], candidate_flags: Sequence[bool], *, least: int, alpha: float = 0.05
) -> KeptPairs:
    """The pairs of which neither side is flagged; all of them, `refused`, where fewer than `least` would remain.

    Flags must not depend on what is compared. `balanced` is the exact two-sided test of McNemar at `alpha` on the pairs
    with one flag; below 6 such pairs it cannot say no at 5 %.
    Raises ValueError for sides of unequal length, for flags that are not True or False, for least < 1 and for alpha out
    of range.
    """
    checked_number("least", least, at_least=1, strictly=False)
    checked_alpha(alpha)
    base, candidate = _checked_flags("base", base_flags), _checked_flags("candidate", candidate_flags)
    if len(base) != len(candidate):
        raise ValueError(f"base has {len(base)} flags and candidate {len(candidate)}: pass one of each a replicate")
    pairs = list(zip(base, candidate, strict=True))
    clean = tuple(index for index, pair in enumerate(pairs) if not any(pair))
    only_base, only_candidate = pairs.count((True, False)), pairs.count((False, True))
    discordant = only_base + only_candidate
    balanced = sign_test(only_base, discordant) > alpha
    refused = len(clean) < min(least, len(pairs))
    dropped = len(pairs) - len(clean)
    if refused:
        reason = (
            f"dropping the {dropped} flagged of {len(pairs)} pairs would leave {len(clean)}, below {least}: kept all"
        )
    elif dropped:
        reason = f"dropped {dropped} of {len(pairs)} pairs: base flagged in {sum(base)}, candidate in {sum(candidate)}"
    else:
        reason = f"no pair of {len(pairs)} is flagged"
    if not balanced:
        reason += (
            f"; flagged on one side only: {only_base} times base and {only_candidate} times candidate, not balanced"
        )
    return KeptPairs(
        kept=tuple(range(len(pairs))) if refused else clean,
        base_flagged=sum(base),
        candidate_flagged=sum(candidate),
        balanced=balanced,
        refused=refused,
        reason=reason,
    )


def _checked_flags(side: str, flags: Sequence[bool]) -> list[bool]:
    """Plain bools. Raises ValueError, naming side and index, for anything that is not a truth value."""
    import numpy as np

    for index, flag in enumerate(flags):
        if not isinstance(flag, bool | np.bool_):
            raise ValueError(f"{side} flag {index} is {flag!r}: pass True where the trial is flagged, else False")
    return [bool(flag) for flag in flags]
