"""A loop that nobody announces: its steps are seen by the updates of an optimizer, whoever calls or replaces them."""

import gc
import weakref

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from harness.attach.follower import Next
from harness.attach.optimizer import OTHERS_TO_TAKE_OVER, OptimizerSource, StopTraining

ROWS = 3


@pytest.fixture
def source(listener, unattached):
    """A source that a listener follows, told of all updates of this process."""
    made = OptimizerSource(lambda: listener)
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: made.see_update(optimizer))
    yield made
    handle.remove()
    made.end()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(16, 4), torch.nn.Linear(4, 16))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def loss_of(model, rows=ROWS):
    ids = torch.randint(0, 16, (rows, 5))
    return torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def train(model, optimizer, steps, rows=ROWS):
    for _ in range(steps):
        loss_of(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()


def tokens(listener):
    """Real tokens of each step that was told."""
    return [reading.real_tokens for reading in listener.readings]


@pytest.mark.usefixtures("source")
def test_a_scalers_update_is_a_step_unless_it_is_skipped(listener, model):
    """A gradient that is not finite leaves the update out, and what was computed for it belongs to the next one."""
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=8.0)
    for number in range(5):
        loss = loss_of(model)
        scaler.scale(loss * (float("inf") if number == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert tokens(listener) == [15, 30, 15]
    assert all(reading.optimizer_time_s > 0 for reading in listener.readings)


@pytest.mark.usefixtures("source")
def test_a_scaler_is_inside_the_step_with_its_own_work(listener, model):
    """The step has ended when the scaler's call returns, not when the optimizer's does: the device is still busy."""
    order = []
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    unscaled = scaler._maybe_opt_step

    def told(*args, **kwargs):
        found = unscaled(*args, **kwargs)
        order.append(len(listener.readings))
        return found

    scaler._maybe_opt_step = told
    for _ in range(3):
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert order == [0, 0, 1]
    assert len(listener.readings) == 2


@pytest.mark.usefixtures("source")
def test_a_scheduler_that_is_built_in_the_middle_does_no_harm(listener, model):
    """It takes the method apart that it finds on the optimizer and puts one of its own there."""
    optimizer = sgd(model)
    train(model, optimizer, 3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(3):
        train(model, optimizer, 1)
        scheduler.step()
    assert tokens(listener) == [15] * 5
    assert optimizer.param_groups[0]["lr"] == 0.1 / 8


def test_an_update_that_somebody_replaces_is_followed_on(listener, model, source):
    """What does not call ours is seen by the hook; the update in which that happens is a part of the step after it."""
    optimizer = sgd(model)
    train(model, optimizer, 3)
    plain = type(optimizer).step
    theirs = optimizer.step = lambda *args: plain(optimizer, *args)
    train(model, optimizer, 4)
    assert tokens(listener) == [15, 15, 30, 15, 15]
    source.end()
    assert vars(optimizer)["step"] is theirs


@pytest.mark.usefixtures("source")
def test_another_optimizer_takes_over_where_the_first_is_given_up(listener, model):
    """After so many updates of it; what lies between the two belongs to no step."""
    first, second = sgd(model), sgd(model)
    train(model, first, 3)
    assert tokens(listener) == [15] * 2
    train(model, second, OTHERS_TO_TAKE_OVER + 3, rows=2)
    assert tokens(listener) == [15] * 2 + [10] * 3
    assert "step" not in vars(first)


@pytest.mark.usefixtures("source")
def test_two_in_turn_are_one_training(listener, model):
    """The first marks the steps, and the other's updates are in them; as also where it updates twice."""
    ours, theirs = sgd(model), sgd(model)
    for _ in range(6):
        train(model, ours, 1)
        train(model, theirs, 2, rows=1)
    assert tokens(listener) == [15 + 2 * 5] * 5


@pytest.mark.usefixtures("source")
def test_an_optimizer_of_each_parameter_is_one_training(listener):
    """Updates inside the backward pass: many optimizers, each once a step."""
    model = torch.nn.Sequential(torch.nn.Embedding(16, 4), *(torch.nn.Linear(4, 4) for _ in range(4)))
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)

        def update(parameter, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(update)
    for _ in range(6):
        model(torch.randint(0, 16, (ROWS, 5))).sum().backward()
    assert tokens(listener) == [15] * 5


def test_at_the_end_everything_is_as_it_was_found(listener, model, source):
    """On the optimizer, on torch's scaler, and on torch."""
    found = torch.amp.GradScaler.step, torch.autograd.backward
    optimizer = sgd(model)
    train(model, optimizer, 2)
    assert (torch.amp.GradScaler.step, torch.autograd.backward) != found
    listener.answers = [Next(go_on=False)]
    with pytest.raises(StopTraining):
        train(model, optimizer, 1)
    assert (torch.amp.GradScaler.step, torch.autograd.backward) == found
    assert "step" not in vars(optimizer)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert listener.ends == [None]
    source.end()
    train(model, optimizer, 1)
    assert len(listener.readings) == 2


@pytest.mark.usefixtures("source")
def test_a_closures_passes_are_no_part_of_the_update(listener, model):
    """They are inside its call, and each is counted where it belongs."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    for reading in listener.readings:
        parts = [reading.forward_time_s, reading.backward_time_s, reading.optimizer_time_s]
        assert all(part > 0 for part in parts)
        assert sum(parts) <= reading.step_time_s * (1 + 1e-9)  # but for the last digits of sums


@pytest.mark.usefixtures("source")
def test_a_batch_that_is_given_twice_in_a_step_is_one(listener, model):
    """Whatever it is given twice for; another one is counted as well, and in another step the same again."""
    optimizer = sgd(model)
    train(model, optimizer, 1)
    ids, other = torch.randint(0, 16, (ROWS, 5)), torch.randint(0, 16, (2, 5))
    for batches in ((ids, ids), (ids, other, ids), (ids,)):
        sum(model(one).sum() for one in batches).backward()
        optimizer.step()
    assert tokens(listener) == [15, 25, 15]


@pytest.mark.usefixtures("source")
def test_a_batch_is_not_kept_by_who_counts_it(model):
    """It would be in the peak of memory, all batches of a step at once."""
    train(model, sgd(model), 2)
    ids = torch.randint(0, 16, (ROWS, 5))
    seen = weakref.ref(ids)
    model(ids).sum().backward()
    del ids
    gc.collect()
    assert seen() is None
