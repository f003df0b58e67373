"""What the judges ask of a model is read once for all of them."""

import dataclasses

import pytest
from torch import nn

from kernels_check.observation import observation
from kernels_check.observation.module_tree import ModelTree


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


def test_the_model_is_as_the_last_call_left_it_until_it_is_restored(seen):
    """What the step added is judged; what is judged after the restoration is read anew."""
    model = nn.Linear(2, 2)
    left = ModelTree.of(model)
    one = seen(model=model, left=left)
    model.late = nn.Linear(2, 2)
    assert one.tree() is left
    assert len(dataclasses.replace(one, left=None).tree().modules) == 2
