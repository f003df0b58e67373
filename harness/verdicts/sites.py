"""What several sites do to the numbers of a run, and which of them differs from its like.

The site is a block: replicates are whole on one, so a ratio is within a site and what a site is slower by is on both of
its sides. Absolute values are another matter. Cards of one model differ: by 8 % in the mean and by half for outliers in
the clusters of a survey (Sinha et al., "Not All GPUs Are Created Equal", 2022, arXiv 2208.11035).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from harness.records.metrics import PRIMARY, samples_of
from harness.records.record import Notice, TrialRecord

UNLIKE = 0.10
"""How far a site may be from the median of its like, in step time, before it is named."""


def site_effects(records: Sequence[TrialRecord]) -> dict[str, float]:
    """By how much each site is slower than the mean of all, as a share: of the mean over variants of the logarithms of
    their median step times on it. Variants that were not measured on every site say nothing of them."""
    times: dict[str, dict[tuple[str, str, str], list[float]]] = {}
    for record in records:
        steps = samples_of(record, PRIMARY["train"]) if record.status == "ok" and record.site else ()
        if steps:
            key = (record.name, record.role, record.side)
            times.setdefault(record.site, {}).setdefault(key, []).append(math.log(statistics.median(steps)))
    common = set.intersection(*(set(of_one) for of_one in times.values())) if times else set()
    if len(times) < 2 or not common:
        return {}
    logs = {site: statistics.fmean(statistics.fmean(of_one[key]) for key in common) for site, of_one in times.items()}
    centre = statistics.fmean(logs.values())
    return {site: math.expm1(log - centre) for site, log in sorted(logs.items())}


def site_notices(records: Sequence[TrialRecord]) -> Iterator[Notice]:
    """What to know of a run that was measured on several sites."""
    sites = {record.site for record in records if record.site}
    effects = site_effects(records)
    if len(sites) < 2:
        return
    if not effects:
        yield Notice(
            code="sites",
            message=f"replicates were spread over {len(sites)} sites, too few of them to compare these.",
            remedy="Read ratios, which are within a site; measure more replicates for absolute values.",
        )
        return
    spread = statistics.stdev(math.log1p(effect) for effect in effects.values())
    said = ", ".join(f"{site} {effect:+.1%}" for site, effect in effects.items())
    yield Notice(
        code="sites",
        message=f"replicates were spread over {len(effects)} sites, which differ by {spread:.1%} (standard deviation "
        f"of their step times: {said}). Ratios are within a site; absolute values hold between these sites and carry "
        "what they differ by in their intervals.",
        remedy="Measure on one site where absolute values matter.",
    )
    yield from _unlike(effects)


def _unlike(effects: Mapping[str, float]) -> Iterator[Notice]:
    if len(effects) < 3:  # of two nobody can say which one is unlike
        return
    centre = statistics.median(effects.values())
    for site, effect in effects.items():
        away = (1 + effect) / (1 + centre) - 1
        if abs(away) > UNLIKE:
            yield Notice(
                code="site-unlike",
                message=f"site {site} is {abs(away):.0%} {'slower' if away > 0 else 'faster'} than the median of its "
                "like.",
                remedy="Look at its clocks, its heat and what runs beside it (lorameter doctor), or leave it out.",
            )
