"""Selects the pairs to keep if some trials were disturbed, independently of their times.

Dropping slow trials makes any code look fast. A flag that is independent of the outcome (another process on the device,
a throttled clock, less CPU time than wall time) may drop a trial; it then drops the whole pair, to keep the pairing.
The flags can still be an effect of the candidate, which may heat the GPU more, so the exact test of McNemar (1947)
checks whether one side is flagged more often than the other. If too few pairs would remain, nothing is dropped: a
filter must not give an empty result.
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
    """The pairs to compare, and why the others were dropped."""

    kept: tuple[int, ...]
    """Indexes of the pairs, in order."""
    base_flagged: int
    """Pairs whose base trial is flagged; a pair may count here and in `candidate_flagged`."""
    candidate_flagged: int
    """Pairs whose candidate trial is flagged."""
    balanced: bool
    """False if one side is flagged more often than chance allows, so that dropping may favour it."""
    refused: bool
    """True if too few pairs would have remained, and none was dropped."""
    reason: str
    """One sentence for users: which pairs were dropped, or why none were."""


def kept_pairs(
    base_flags: Sequence[bool], candidate_flags: Sequence[bool], *, least: int, alpha: float = 0.05
) -> KeptPairs:
    """The pairs without a flag on either side; all pairs, with `refused` set, if fewer than `least` would remain.

    Flags must not depend on the compared values. `balanced` is the result of McNemar's exact two-sided test at `alpha`
    on the pairs with one flag; with fewer than 6 such pairs it is always true at 5 %. Raises ValueError for sides of
    unequal length, for flags that are not True or False, for least < 1 and for alpha out of range.
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
    """Convert to plain bools. Raises ValueError, with side and index, for anything that is not a truth value."""
    import numpy as np

    for index, flag in enumerate(flags):
        if not isinstance(flag, bool | np.bool_):
            raise ValueError(f"{side} flag {index} is {flag!r}: pass True where the trial is flagged, else False")
    return [bool(flag) for flag in flags]
