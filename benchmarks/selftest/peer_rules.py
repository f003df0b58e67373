"""How other benchmark tools decide that a candidate is slower, as functions on the same draws of a recording.

Each rule takes two arrays of times, draws × processes × iterations, and returns for each draw whether the tool would
call the candidate slower at its default limits. These are emulations from the tools' sources and manuals, not runs of
the tools: what matters is what each takes for the sample. All but the last few pool the iterations of all processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Times = NDArray[np.float64]
Slower = NDArray[np.bool_]

BOOTSTRAPS = 500
_CHUNK = 100  # draws at a time: a bootstrap holds draws × resamples × samples


def pooled(times: Times) -> Times:
    """All iterations of all processes of a draw in one row."""
    return times.reshape(len(times), -1)


def repetitions(times: Times, most: int) -> Times:
    """Up to `most` equal runs of iterations a process, each as its mean, in one row a draw."""
    draws, processes, iterations = times.shape
    count = min(most, iterations)
    length = iterations // count
    return times[:, :, : count * length].reshape(draws, processes * count, length).mean(axis=2)


def pytest_benchmark(base: Times, candidate: Times, *, statistic: Callable[..., Times]) -> Slower:
    """`--benchmark-compare-fail=STAT:5%`: one statistic over all rounds."""
    return statistic(pooled(candidate), axis=1) > 1.05 * statistic(pooled(base), axis=1)


def t_test(base: Times, candidate: Times) -> Slower:
    """Student's pooled, two-sided t-test at 5 %, on whatever is in the rows."""
    test = stats.ttest_ind(candidate, base, axis=1)
    return (test.pvalue < 0.05) & (test.statistic > 0)


def pyperf(base: Times, candidate: Times) -> Slower:
    """`pyperf compare_to`: three values a process, all pooled as if independent."""
    return t_test(repetitions(base, 3), repetitions(candidate, 3))


def u_test(base: Times, candidate: Times, *, level: float = 0.05) -> Slower:
    """Mann and Whitney's two-sided U test; slower if the median is larger."""
    test = stats.mannwhitneyu(candidate, base, axis=1, method="auto")
    return (test.pvalue < level) & (np.median(candidate, axis=1) > np.median(base, axis=1))


def google_benchmark(base: Times, candidate: Times, *, most: int) -> Slower:
    """google/benchmark's compare.py: U test at 5 % over the repetitions of a process."""
    return u_test(repetitions(base, most), repetitions(candidate, most))


def asv(base: Times, candidate: Times) -> Slower:
    """`asv continuous`: U test at 0.2 % on at most ten samples a process, and a factor of 1.1 between medians."""
    base, candidate = repetitions(base, 10), repetitions(candidate, 10)
    return u_test(base, candidate, level=0.002) & (np.median(candidate, axis=1) > 1.1 * np.median(base, axis=1))


def hyperfine(base: Times, candidate: Times) -> Slower:
    """A run is a process: the ratio of means, minus its propagated standard deviation, is above 1."""
    runs = [times.sum(axis=2) for times in (base, candidate)]
    means = [run.mean(axis=1) for run in runs]
    relative = [run.std(axis=1, ddof=1) / mean for run, mean in zip(runs, means, strict=True)]
    ratio = means[1] / means[0]
    return ratio - ratio * np.hypot(*relative) > 1


def nvbench(base: Times, candidate: Times) -> Slower:
    """nvbench_compare.py: the means differ by more than the smaller relative standard deviation."""
    base, candidate = pooled(base), pooled(candidate)
    noise = [times.std(axis=1, ddof=1) / times.mean(axis=1) for times in (base, candidate)]
    return candidate.mean(axis=1) / base.mean(axis=1) - 1 > np.minimum(*noise)


def intervals_apart(base: Times, candidate: Times) -> Slower:
    """95 % intervals of the mean over all iterations that do not overlap."""
    base, candidate = pooled(base), pooled(candidate)
    reach = [stats.t.ppf(0.975, x.shape[1] - 1) * stats.sem(x, axis=1) for x in (base, candidate)]
    return candidate.mean(axis=1) - reach[1] > base.mean(axis=1) + reach[0]


def benchstats(base: Times, candidate: Times) -> Slower:
    """Brunner and Munzel's test at 0.1 % on all iterations."""
    base, candidate = pooled(base), pooled(candidate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        test = stats.brunnermunzel(base, candidate, axis=1)
    # Sides without any overlap have no variance of ranks, and no p-value: nothing is more different.
    return ~(test.pvalue >= 0.001) & (np.median(candidate, axis=1) > np.median(base, axis=1))


def criterion(base: Times, candidate: Times) -> Slower:
    """Bootstrap t-test at 5 %, and the bootstrap interval of the relative mean wholly beyond the noise of 1 %."""
    rng = np.random.default_rng(1)
    base, candidate = pooled(base), pooled(candidate)
    count = base.shape[1]
    every = np.concatenate([base, candidate], axis=1)
    # The same resamples serve all draws; a mean of a resample is a product with its counts.
    counts = [rng.multinomial(count, [1 / count] * count, BOOTSTRAPS).T / count for _ in range(2)]
    relative = (candidate @ counts[1]) / (base @ counts[0]) - 1
    mixed = [rng.multinomial(count, [0.5 / count] * 2 * count, BOOTSTRAPS).T / count for _ in range(2)]

    def welch(first: Times, second: Times, first_squares: Times, second_squares: Times) -> Times:
        return (second - first) / np.sqrt(first_squares - first**2 + second_squares - second**2)

    seen = welch(*(x.mean(axis=1) for x in (base, candidate)), *((x**2).mean(axis=1) for x in (base, candidate)))
    null = welch(*(every @ weights for weights in mixed), *(every**2 @ weights for weights in mixed))
    tail = (null >= seen[:, None]).mean(axis=1)
    different = 2 * np.minimum(tail, 1 - tail) < 0.05
    return different & (np.quantile(relative, 0.025, axis=1) > 0.01)


def _bootstrap_medians(ordered: Times, rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.intp]:
    """Indexes of the medians of resamples of sorted values: the k-th of m uniform numbers is Beta(k, m - k + 1)."""
    count = ordered.shape[-1]
    middle = (count + 1) // 2
    return (rng.beta(middle, count - middle + 1, shape) * count).astype(np.intp)


def iid_bootstrap(base: Times, candidate: Times) -> Slower:
    """Percentile bootstrap of the ratio of medians, iterations resampled as if independent."""
    rng = np.random.default_rng(2)
    medians = []
    for times in (base, candidate):
        ordered = np.sort(pooled(times), axis=1)
        medians.append(np.take_along_axis(ordered, _bootstrap_medians(ordered, rng, (len(ordered), BOOTSTRAPS)), 1))
    return np.quantile(medians[1] / medians[0], 0.025, axis=1) > 1


def hierarchical_bootstrap(base: Times, candidate: Times) -> Slower:
    """Percentile bootstrap that resamples processes, and iterations inside each."""
    rng = np.random.default_rng(3)
    slower = []
    for start in range(0, len(base), _CHUNK):
        centres = []
        for times in (base[start : start + _CHUNK], candidate[start : start + _CHUNK]):
            ordered = np.log(np.sort(times, axis=2))
            draws, processes, _ = ordered.shape
            shape = (draws, BOOTSTRAPS, processes)
            chosen = rng.integers(processes, size=shape)
            rank = _bootstrap_medians(ordered, rng, shape)
            centres.append(ordered[np.arange(draws)[:, None, None], chosen, rank].mean(axis=2))
        slower.append(np.quantile(centres[1] - centres[0], 0.025, axis=1) > 0)
    return np.concatenate(slower)


RULES: dict[str, Callable[[Times, Times], Slower]] = {
    "pytest-benchmark mean:5%": partial(pytest_benchmark, statistic=np.mean),
    "pytest-benchmark median:5%": partial(pytest_benchmark, statistic=np.median),
    "pytest-benchmark min:5%": partial(pytest_benchmark, statistic=np.min),
    "pyperf pooled t-test": pyperf,
    "google/benchmark U, 9 repetitions": partial(google_benchmark, most=9),
    "google/benchmark U, 1 a process": partial(google_benchmark, most=1),
    "criterion, noise 1 %": criterion,
    "asv continuous, factor 1.1": asv,
    "hyperfine, ratio − sd > 1": hyperfine,
    "nvbench compare": nvbench,
    "benchstats Brunner–Munzel 0.1 %": benchstats,
    "Student t, all iterations": lambda base, candidate: t_test(pooled(base), pooled(candidate)),
    "95 % intervals apart, iterations": intervals_apart,
    "iid bootstrap, ratio of medians": iid_bootstrap,
    "hierarchical bootstrap": hierarchical_bootstrap,
}
"""By the name that a table shows."""

WITH_TURNS = ("pytest-benchmark mean:5%", "pytest-benchmark median:5%", "pyperf pooled t-test")
"""Those worth a look on times that were taken in turns, though they throw the pairing away."""
