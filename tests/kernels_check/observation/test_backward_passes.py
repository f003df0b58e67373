"""Backward passes add up in the gradients that one update takes, as far as what lies there tells."""

import pytest
import torch

from kernels_check.observation.backward_passes import BackwardPass, BackwardPasses, sums_of

NOTHING, ZERO, SOME = (), (torch.zeros(()),), (torch.zeros(()), torch.ones(()))


def _pass(task, lying=SOME, *, after=False, inside=False):
    return BackwardPass(task=task, after_update=after, in_update=inside, lying=lying)


def _sums(*passes, gives=None):
    found = sums_of(zip(passes, gives or [True] * len(passes), strict=True))
    return found if isinstance(found, str) else list(found.values())


@pytest.mark.parametrize(
    ("passes", "sums"),
    [
        ([_pass(1, NOTHING), _pass(2), _pass(3)], [0, 0, 0]),
        ([_pass(1), _pass(2)], [0, 0]),
        ([_pass(1, NOTHING, after=True)], [0]),
        ([_pass(1, NOTHING), _pass(2, NOTHING, after=True), _pass(3)], [0, 1, 1]),
        ([_pass(1, NOTHING), _pass(2, ZERO, after=True)], [0, 1]),
        ([_pass(1, NOTHING, inside=True), _pass(2, ZERO, inside=True), _pass(3, NOTHING, inside=True)], [0, 1, 2]),
        ([_pass(1, NOTHING, inside=True), _pass(2, SOME, inside=True)], [0, 0]),
    ],
)
def test_passes_add_up_until_an_update(passes, sums):
    """Or until a closure is evaluated anew."""
    assert _sums(*passes) == sums


@pytest.mark.parametrize("lying", [NOTHING, ZERO])
def test_gradients_that_are_gone_without_an_update_leave_it_open(lying):
    """They were cleared, or put elsewhere."""
    assert "gone before the next" in _sums(_pass(1, NOTHING), _pass(2, lying))


def test_gradients_that_an_update_leaves_leave_it_open():
    """They weigh in the next one, too."""
    assert "still there" in _sums(_pass(1, NOTHING), _pass(2, SOME, after=True))
    assert "still there" in _sums(_pass(1, NOTHING), _pass(2, SOME, after=True, inside=True))


def test_a_pass_that_gave_nothing_is_missed_by_nobody():
    """Nothing lies there after it in any case."""
    assert _sums(_pass(1, NOTHING), _pass(2, NOTHING), gives=[False, True]) == [0, 0]
    assert _sums(_pass(1, NOTHING), _pass(2, ZERO, after=True), gives=[False, True]) == [0, 0]
    gives = [True, False, True]
    assert _sums(_pass(1, NOTHING), _pass(2, ZERO, after=True), _pass(3, ZERO), gives=gives) == [0, 1, 1]


def _noted(steps):
    """What is noted of the passes of a linear layer, where steps come between them."""
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    passes, found = BackwardPasses(model), []
    for step in steps:
        if step == "back":
            loss = model(torch.ones(1, 2)).sum()
            loss.grad_fn.register_prehook(lambda _: found.append(passes.current()))
            loss.backward()
        else:
            step(model, optimizer, passes)
    return found


def _update(model, optimizer, passes):
    passes.update_begins(optimizer)
    passes.update_ends(optimizer)


def _begin(model, optimizer, passes):
    passes.update_begins(optimizer)


def _update_another(model, optimizer, passes):
    other = torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.1)
    passes.update_begins(other)
    passes.update_ends(other)


def _clear(model, optimizer, passes):
    optimizer.zero_grad()


def _zero(model, optimizer, passes):
    optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize(
    ("between", "anew", "after", "inside"),
    [
        ([], False, False, False),
        ([_clear], True, False, False),
        ([_zero], True, False, False),
        ([_update], False, True, False),
        ([_update, _clear], True, True, False),
        ([_update_another], False, False, False),
        ([_begin], False, False, True),
        ([_update, _begin], False, True, True),
    ],
)
def test_what_lay_between_two_passes_is_noted_of_the_second(between, anew, after, inside):
    """And of it alone."""
    first, second, third = _noted(["back", *between, "back", "back"])
    assert first.anew
    assert (first.after_update, first.in_update) == (False, False)
    assert (second.anew, second.after_update, second.in_update) == (anew, after, inside)
    assert (third.anew, third.after_update, third.in_update) == (False, False, inside)


def test_what_is_asked_twice_in_one_pass_is_one():
    """A loss may be made of two cross entropies."""
    model = torch.nn.Linear(2, 1, bias=False)
    passes, found = BackwardPasses(model), []
    losses = [model(torch.ones(1, 2)).sum() for _ in range(2)]
    for loss in losses:
        loss.grad_fn.register_prehook(lambda _: found.append(passes.current()))
    sum(losses).backward()
    assert len(found) == 2
    assert found[0] is found[1]


def test_an_update_that_ends_without_a_beginning_is_none_under_way():
    """The watch may begin within one."""
    model = torch.nn.Linear(2, 1)
    passes = BackwardPasses(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    passes.update_ends(optimizer)
    passes.update_begins(optimizer)
    assert passes.current().in_update


class Unreadable(torch.Tensor):
    """A gradient of a library that knows no norm."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if "norm" in getattr(func, "__name__", ""):
            raise RuntimeError("no norm")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_gradient_that_cannot_be_read_is_no_error_of_the_step():
    """What lies there is unknown, so which passes add up is, too; one pass alone needs it not."""
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.zeros(1, 2).as_subclass(Unreadable)
    found = BackwardPasses(model).current()
    assert found.unread
    assert _sums(found) == [0]
    assert "could not be read" in _sums(_pass(1), found)
    assert _sums(_pass(1), found, gives=[False, True]) == [0, 0]


def test_parameters_that_do_not_train_are_not_asked():
    """What lies in their gradients is nobody's."""
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)
    model.weight.requires_grad_(False)
    assert BackwardPasses(model).current().anew
