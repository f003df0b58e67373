"""The collector of garbage is left as the program had it."""

from __future__ import annotations

import gc

import pytest

from kernels_check.observation.garbage import uncollected


def fail_uncollected():
    with uncollected():
        assert not gc.isenabled()
        raise KeyError


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_as_it_was_also_after_an_error(on):
    """Off inside, and afterwards what it was before."""
    before = gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        with pytest.raises(KeyError):
            fail_uncollected()
        assert gc.isenabled() is on
    finally:
        (gc.enable if before else gc.disable)()
