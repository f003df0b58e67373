"""The statistics of lorameter: pure functions from numbers to verdicts, independent of disks and devices.

The replicate is the unit of inference (Kalibera & Jones 2013): samples of one process are sub-samples, reduced to one
value before any interval is computed. A comparison distinguishes "equal" from "inconclusive". Use `compare_trials` for
times (several at once: `decide_family`) and `compare_bytes` for memory peaks; `lorameter.stats.trend` judges
statements about several levels from their contrasts.

Importing this package loads neither numpy nor scipy: functions that need them import them when called, so that the
command line and type annotations stay fast.
"""

from __future__ import annotations

from lorameter.stats.changes import drifting, is_steady, is_warm
from lorameter.stats.comparison import (
    compare_bytes,
    compare_trials,
    decide,
    decide_family,
    holm_step_down,
    run_wide_shift,
    select_pairs,
)
from lorameter.stats.effect import (
    Effect,
    Pairing,
    TrialsEstimate,
    estimate_effect,
    estimate_trials,
    share_scatter,
)
from lorameter.stats.gain import Gain, estimate_gain
from lorameter.stats.intervals import (
    Estimate,
    Proportion,
    bootstrap_interval,
    clustered_proportion,
    effective_size,
    mean_interval,
    median_interval,
    percentile,
    proportion,
    sd_interval,
)
from lorameter.stats.samples import count_outliers
from lorameter.stats.trend import ShareEstimate, explained_share
from lorameter.stats.verdict import (
    MAX_ADVISED,
    Comparison,
    Verdict,
    VerdictRule,
    is_precise,
    relative_half_width,
    replicates_to_see,
)

__all__ = [
    "MAX_ADVISED",
    "Comparison",
    "Effect",
    "Estimate",
    "Gain",
    "Pairing",
    "Proportion",
    "ShareEstimate",
    "TrialsEstimate",
    "Verdict",
    "VerdictRule",
    "bootstrap_interval",
    "clustered_proportion",
    "compare_bytes",
    "compare_trials",
    "count_outliers",
    "decide",
    "decide_family",
    "drifting",
    "effective_size",
    "estimate_effect",
    "estimate_gain",
    "estimate_trials",
    "explained_share",
    "holm_step_down",
    "is_precise",
    "is_steady",
    "is_warm",
    "mean_interval",
    "median_interval",
    "percentile",
    "proportion",
    "relative_half_width",
    "replicates_to_see",
    "run_wide_shift",
    "sd_interval",
    "select_pairs",
    "share_scatter",
]
