"""How many rounds a process should take before the next process begins, where time is limited.

The variance of a mean over processes is (between + within / rounds) / processes, and the time is processes · (what
starting one costs + rounds · what a round costs). For a given time it is least at

    rounds = sqrt(process cost / round cost · within variance / between variance)

(Kalibera & Jones 2013, "Rigorous benchmarking in reasonable time", section 5): many rounds where a process is dear to
start or rounds scatter, few where processes differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def optimal_rounds(processes: Sequence[Sequence[float]], *, process_s: float, round_s: float) -> float | None:
    """The number of rounds a process that narrows an interval most in a given time, not rounded.

    Args:
        processes: for each process one value a round, such as the log ratio of a turn's two times.
        process_s: seconds that a process costs beside its rounds.
        round_s: seconds of a round.

    Returns:
        Infinity where processes do not differ more than their rounds explain; None where fewer than two of them have
        two rounds, or a cost is not known.
    """
    usable = [values for values in processes if len(values) >= 2]
    if len(usable) < 2 or not process_s > 0 or not round_s > 0:
        return None
    within = sum(_variance(values) for values in usable) / len(usable)
    means = [sum(values) / len(values) for values in usable]
    explained = within * sum(1 / len(values) for values in usable) / len(usable)
    between = _variance(means) - explained
    return math.inf if between <= 0 else math.sqrt(process_s / round_s * within / between)


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)
