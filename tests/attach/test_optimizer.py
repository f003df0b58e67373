"""Tests of a loop without a meter: its steps are observed through the updates of an optimizer."""

import functools

import pytest
import torch

from lorameter.attach.observer import ObserverReply
from lorameter.attach.sources import MAX_OTHERS, OptimizerSource, this_process

ROWS = 3


@pytest.fixture
def source(unattached, monkeypatch):
    """A source with a listener, around the updates of an optimizer."""
    made = OptimizerSource()

    def around(step):
        @functools.wraps(step)
        def update(*args):
            result = step(*args)
            made.end_update(args[0])
            return result

        return update

    sgd(torch.nn.Linear(1, 1))  # torch wraps the updates of a class when its first optimizer is made
    monkeypatch.setattr(torch.optim.SGD, "step", around(torch.optim.SGD.step))
    yield made
    if (steps := this_process().steps) is not None:
        steps.end(None)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(16, 4), torch.nn.Linear(4, 16))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def batches(count, rows=ROWS):
    """Return a loader of the given number of batches of rows with five tokens."""
    return torch.utils.data.DataLoader(torch.randint(0, 16, (count * rows, 5)), batch_size=rows)


def loss_of(model, ids):
    return torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def train(model, optimizer, loader):
    for ids in loader:
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()


def tokens(listener):
    """Return the real tokens of each step."""
    return [reading.real_tokens for reading in listener.readings]


@pytest.mark.usefixtures("source")
def test_a_scalers_update_is_a_step_unless_it_is_skipped(listener, model):
    """A non-finite gradient skips the update, and its computation counts for the next step; the loss is unscaled."""
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=8.0)
    losses = []
    for number, ids in enumerate(batches(5)):
        loss = loss_of(model, ids)
        losses.append(loss.item())
        scaler.scale(loss * (float("inf") if number == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert tokens(listener) == [15, 30, 15]
    assert [listener.readings[0].loss, listener.readings[2].loss] == pytest.approx([losses[1], losses[4]])
    assert all(reading.optimizer_time_s > 0 for reading in listener.readings)


@pytest.mark.parametrize("how", ["freed", "kept"])
def test_only_the_first_of_two_trainings_is_followed(listener, model, source, how, capfd):
    """A training ends when its optimizer is freed or has not updated during many updates of another; the second
    training is reported once and counts in no step."""
    first, second = sgd(model), sgd(model)
    train(model, first, batches(4))
    if how == "freed":
        del first
    steps = 3 if how == "freed" else MAX_OTHERS
    train(model, second, batches(steps, rows=2))
    assert tokens(listener) == [15] * 3
    assert (listener.ends, listener.seen) == ([None], [False])
    assert len(listener.trainings) == 1
    train(model, sgd(model), batches(3))
    assert capfd.readouterr().err.count("another training of this script") == 1


@pytest.mark.usefixtures("source")
def test_a_step_is_watched_where_a_part_of_the_model_is_called(listener):
    """The check also works if only a submodule is called, as by Lightning, whose loop calls a method of the outermost
    module."""

    class LightningLike(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Embedding(16, 4), torch.nn.Linear(4, 16))

        def training_step(self, ids):
            return loss_of(self.net, ids)

    module = LightningLike()
    optimizer = sgd(module)
    listener.answers = [ObserverReply(), ObserverReply(watch={})]
    for ids in batches(4):
        module.training_step(ids).backward()
        optimizer.step()
    assert [reading.checks is not None for reading in listener.readings] == [False, True, False]
    (mode,) = (check for check in listener.readings[1].checks if check.path == "mode")
    assert mode.observed == "train"
    assert len(listener.trainings) == 1
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


class PrefetchingLoader:
    """A loader that prefetches one batch, as Accelerate's loaders do."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        iterator = iter(self.loader)
        batch = next(iterator, None)
        while batch is not None:
            following = next(iterator, None)
            yield batch
            batch = following


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_tokens_are_those_of_the_batches_that_a_step_uses(listener, model, ahead, passes):
    """This holds with and without prefetching, over two epochs with a smaller last batch, with an evaluation between
    them, and with several passes a step."""
    optimizer = sgd(model)
    rows = torch.randint(0, 16, (ROWS * 7 + 2, 5))
    for _ in range(2):
        loader = torch.utils.data.DataLoader(rows, batch_size=ROWS)
        for number, ids in enumerate(PrefetchingLoader(loader) if ahead else loader, 1):
            loss_of(model, ids).backward()
            if number % passes == 0:
                optimizer.step()
                optimizer.zero_grad()
        for ids in batches(2):
            with torch.no_grad():
                loss_of(model, ids)
    epoch = [15] * 7 + [10] if passes == 1 else [30] * 3 + [25]
    first = None if ahead else epoch[1]  # it was loaded before the observation began
    assert tokens(listener) == [first, *epoch[2:], *epoch]
