"""What the judges ask of a model is read once for all of them."""

import dataclasses

import pytest

from kernels_check.observation import observation


def test_a_reading_is_taken_once_and_anew_for_a_replaced_observation(seen, monkeypatch):
    """A dozen judges ask for the same; another observation is of another moment."""
    taken = []
    monkeypatch.setattr(observation, "adapter_layers", lambda model: taken.append(model) or [])
    one = seen()
    assert one.adapter_layers() is one.adapter_layers()
    assert len(taken) == 1
    dataclasses.replace(one, batch={}).adapter_layers()
    assert len(taken) == 2


def test_a_reading_that_fails_is_not_kept(seen, monkeypatch):
    """Each judge that asks is told why."""

    def unreadable(model):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(observation, "take_census", unreadable)
    one = seen()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such thing"):
            one.census()
