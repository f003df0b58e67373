"""The sign test (Dixon & Mood 1946): is a coin fair that came up heads that often?"""

from __future__ import annotations


def sign_test(heads: int, tosses: int) -> float:
    """The exact two-sided p-value of `heads` in `tosses`; 1 of none.

    From `scipy.special`, because importing `scipy.stats` for one binomial sum takes half a second.
    """
    from scipy.special import bdtr

    if tosses == 0:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(heads, tosses - heads), tosses, 0.5)))
