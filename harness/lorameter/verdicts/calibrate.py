"""Measures which slow-downs this machine can detect: the gate's rate of false alarms and its power.

Both depend on the noise of the machine. One long A/B is measured: the base, the base again (the A/A pair), and the base
with injected extra work. Every run of the gate corresponds to a subset of these replicates, so drawing subsets shows
how often the gate would have called identical code slower, and how often it would have found the slow-down. The scatter
of the A/A pair gives the replicates needed to detect 1, 2 and 5 % (noncentral t), and their duration gives the cost.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorameter.errors import InvalidRunError
from lorameter.measurements.metrics import PRIMARY
from lorameter.records.store import Run, measuring_time_s
from lorameter.records.units import format_count
from lorameter.stats import Comparison, Verdict, VerdictRule, compare_trials, replicates_to_see, sd_interval
from lorameter.stats.looks import judge_at_looks, look_level, planned_looks
from lorameter.studies.form import AnyVariant
from lorameter.verdicts.series import Pair, Series, group_trials, judge, make_pairs

TOLERANCE = VerdictRule().tolerance
"""Default tolerance of a gate."""
EFFECTS = (0.01, 0.02, 0.05)
"""Slow-downs for which the cost of detection is reported."""
INJECTED = 0.05
"""Target slow-down of the extra work; its true size is measured."""
GATE_SIZES = (5, 8, 12)
"""Replicates of the gates whose rates are reported."""
MIN_TO_CALIBRATE = min(GATE_SIZES) + 1
"""With fewer replicates, every gate would be the whole run."""
DRAWS = 2000
PILOT_ROWS = (64, 512)
"""Rows of the two pilots; the line through both includes the fixed cost of the extra calls."""
MAX_ROWS = 10**6
"""Maximum rows; a plan beyond it is an artefact of noise, and its factor alone would take 256 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The verdicts of gates of one size, as shares of the drawn subsets."""

    replicates: int
    """Replicates of each gate, or the maximum if it ends at a look."""
    used: float
    """Replicates that a gate took on average."""
    false_alarms: float
    """Identical code called `regressed`."""
    equivalent: float
    """Identical code called `equivalent`."""
    found: float
    """The injected slow-down called `regressed`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """The replicates and minutes that detect a slow-down in 80 % of the runs."""

    effect: float
    tolerance: float
    """Tolerance of the gate; it must be below the effect, or the gate would not call the effect a regression."""
    replicates: int | None
    """Number at the estimated scatter; None if no practical number suffices."""
    replicates_low: int | None
    """Number at the lower end of the scatter's interval."""
    replicates_high: int | None
    """Number at the upper end of the scatter's interval."""
    minutes: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Rates and prices on this machine, from one A/B of identical code with an injected slow-down."""

    run: str
    device: str
    interleaving: str
    replicates: int
    seconds_per_replicate: float
    identical: Comparison
    """Comparison of the base with itself, over all replicates."""
    injected: Comparison
    """Comparison of the slow-down with the base, over all replicates: its true size with its interval."""
    sd: float
    """Standard deviation of the A/A log ratio of one replicate."""
    sd_low: float
    """Lower end of its 95 % interval (chi-square)."""
    sd_high: float
    rates: tuple[Rates, ...]
    prices: tuple[Price, ...]


def calibrate(run: Run, variant: AnyVariant) -> Calibration:
    """Rates, power and prices from an A/B run whose candidate is the base with extra work.

    Raises:
        InvalidRunError: too few replicates are ok.
    """
    base_side, metric = group_trials(run.records, "base"), PRIMARY["train"]
    try:
        base, twin = base_side[variant.name, "variant"], base_side[variant.name, "control"]
        slow = group_trials(run.records, "candidate")[variant.name, "variant"]
    except KeyError:
        raise InvalidRunError(f"run {run.manifest.run}: no trial of {variant.name} to calibrate with.") from None
    same, other = _pairs(base, twin, metric, run), _pairs(base, slow, metric, run)
    both = min(len(same.base), len(other.base))
    identical, injected = judge({("identical", metric): same, ("injected", metric): other}, family=1).values()
    spread = same.effect.spread
    assert spread is not None  # with as many replicates as `_pairs` requires
    sd_low, sd_high = sd_interval(spread.sd, len(same.base) - 1)
    seconds = measuring_time_s(run.records) / len({record.replicate for record in run.records})
    return Calibration(
        run=run.manifest.run,
        device=str(run.manifest.provenance.get("device_name", "")),
        interleaving=str(base.interleaving(metric)),
        replicates=len(same.base),
        seconds_per_replicate=seconds,
        identical=identical,
        injected=injected,
        sd=spread.sd,
        sd_low=sd_low,
        sd_high=sd_high,
        rates=tuple(
            _rates(same, other, looks[-1], looks)
            for looks in (*((size,) for size in GATE_SIZES), planned_looks(GATE_SIZES[-1]))
            if looks[-1] < both
        ),
        prices=tuple(_price(effect, (sd_low, spread.sd, sd_high), seconds) for effect in EFFECTS),
    )


def rows_for_slowdown(injected: float, few: float, many: float) -> int:
    """Rows that slow down the step by `injected`, from the ratios of the two pilots: the cost is linear in the rows.

    Raises:
        InvalidRunError: more rows did not take more time, or a single row would be too much.
    """
    low, high = PILOT_ROWS
    slope = (many - few) / (high - low)
    rows = round(low + (1 + injected - few) / slope) if slope > 0 else 0
    if not 1 <= rows <= MAX_ROWS:
        raise InvalidRunError(
            f"{low} and {high} rows of extra work gave ratios of {few:.4f} and {many:.4f}: no number of rows can be "
            f"planned from them for {100 * injected:g} %. Give one with --inject-rows."
        )
    return rows


def _pairs(base: Series, other: Series, metric: str, run: Run) -> Pair:
    pairs = make_pairs(base, other, metric)
    if len(pairs.base) < MIN_TO_CALIBRATE:
        raise InvalidRunError(
            f"run {run.manifest.run}: {format_count(len(pairs.base), 'replicate')} ok on both sides, and a calibration "
            f"needs {MIN_TO_CALIBRATE}. Look at its report, or raise --replicates."
        )
    return pairs


def _rates(same: Pair, slow: Pair, size: int, looks: tuple[int, ...]) -> Rates:
    """Judge subsets of the replicates, drawn without replacement: each is a run that the gate could have made, which
    ends at the first of its looks that decides."""
    rng = random.Random(size)
    verdicts: Counter[tuple[str, str]] = Counter()
    used = 0
    for _ in range(DRAWS):
        for name, pairs in (("same", same), ("slow", slow)):
            look, verdict = _end_gate(pairs, rng.sample(range(len(pairs.base)), size), looks)
            verdicts[name, verdict] += 1
            used += look
    return Rates(
        replicates=size,
        used=used / DRAWS / 2,
        false_alarms=verdicts["same", "regressed"] / DRAWS,
        equivalent=verdicts["same", "equivalent"] / DRAWS,
        found=verdicts["slow", "regressed"] / DRAWS,
    )


def _end_gate(pairs: Pair, chosen: Sequence[int], looks: tuple[int, ...]) -> tuple[int, Verdict]:
    """The replicates and the verdict of a gate that measures the chosen pairs in this order."""
    base, candidate = [pairs.base[index] for index in chosen], [pairs.candidate[index] for index in chosen]
    level = look_level(VerdictRule().alpha, looks)

    def compare(look: int) -> Mapping[str, Comparison]:
        return {"": compare_trials(base[:look], candidate[:look], pairing=pairs.pairing, alpha=level)}

    look, found = judge_at_looks(compare, looks)
    return look, found[""].verdict


def _price(effect: float, scatter: tuple[float, float, float], seconds: float) -> Price:
    tolerance = min(TOLERANCE, effect / 2)
    low, replicates, high = (replicates_to_see(effect, sd, tolerance=tolerance) for sd in scatter)
    return Price(
        effect=effect,
        tolerance=tolerance,
        replicates=replicates,
        replicates_low=low,
        replicates_high=high,
        minutes=None if replicates is None else replicates * seconds / 60,
    )


def planned_effects(calibration: Calibration) -> Sequence[str]:
    """The prices as text."""
    lines = []
    for price in calibration.prices:
        size = f"{100 * price.effect:g} %"
        if price.replicates is None:
            lines.append(f"{size}: no practical number of replicates")
            continue
        note = "" if math.isclose(price.tolerance, TOLERANCE) else f" (with a tolerance of {100 * price.tolerance:g} %)"
        ends = f"[{price.replicates_low}, {price.replicates_high or 'no practical number'}]"
        lines.append(f"{size}: {price.replicates} replicates {ends}, about {price.minutes:.1f} min{note}")
    return lines
