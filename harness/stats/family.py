"""Several comparisons, one false-alarm rate: Holm's step-down (Holm 1979).

Twenty gated numbers at 2.5 % each raise a false alarm in 40 % of the runs on identical code. Bonferroni cures that;
Holm cures it too and is never weaker: once k comparisons are decided, the others share the whole rate among
themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from harness.stats.comparison import Pairing, decide, effect_of
from harness.stats.verdict import Comparison, Rule

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")


def compare_family(
    pairs: Mapping[str, tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]],
    *,
    pairing: Pairing | Mapping[str, Pairing],
    tolerance: float | Mapping[str, float] = 0.01,
    margin: float | Mapping[str, float] = 0.05,
    alpha: float = 0.05,
) -> dict[str, Comparison]:
    """`compare_trials` of every named (base, candidate), with a family-wise error rate of `alpha`; {} of none.

    Pairing, tolerance and margin are those of all, or maps from the names to those of each. Each interval shown is the
    one at the level at which Holm decided or gave up on that comparison.
    Raises ValueError as `compare_trials` does, with the name of the comparison in front.
    """
    effects = {}
    for name, (base, candidate) in pairs.items():
        try:
            effects[name] = effect_of(base, candidate, _of(pairing, name))
        except ValueError as error:
            raise ValueError(f"comparison {name!r}: {error}") from error

    decided: dict[str, Comparison] = {}
    undecided: dict[str, Comparison] = {}
    # Deciding every comparison that passes at a level, before the level is raised, ends where Holm's sorted p-values
    # end.
    while True:
        left = [name for name in effects if name not in decided]
        undecided = {
            name: decide(
                effects[name],
                Rule(tolerance=_of(tolerance, name), margin=_of(margin, name), alpha=alpha, family=len(left)),
            )
            for name in left
        }
        found = {name: result for name, result in undecided.items() if result.verdict in ("regressed", "improved")}
        if not found:
            break
        decided |= found
    results = decided | undecided
    return {name: results[name] for name in effects}


def _of(value: T | Mapping[str, T], name: str) -> T:
    """The value of a name, from a map or for all."""
    return value[name] if isinstance(value, Mapping) else value
