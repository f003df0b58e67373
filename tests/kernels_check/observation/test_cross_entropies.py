"""What a loss is over is read off what autograd has recorded of it."""

import weakref
from contextlib import ExitStack

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from kernels_check.observation.backward_passes import BackwardPasses
from kernels_check.observation.cross_entropies import read_loss

TARGETS = torch.tensor([1, 2, -100, 3, 0, 1])


def _logits(*shape):
    return torch.randn(*(shape or (6, 5)), requires_grad=True)


def _read(loss, *, back=1):
    """The parts of a loss, with what reached each of them, or why there are none."""
    with ExitStack() as hooks:
        made = read_loss(loss, BackwardPasses(torch.nn.Linear(1, 1)), hooks, lambda hook: hook)
        for _ in range(back):
            loss.backward(retain_graph=True)
    loss.backward()  # which nobody hears of any more
    if made.unread is not None:
        return made.unread
    return [
        (int(part.tokens), part.mean, [round(float(one.gradient), 4) for one in part.arrivals]) for part in made.parts
    ]


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: cross_entropy(_logits(), TARGETS), [(5, True, [1.0])]),
        (lambda: cross_entropy(_logits(), TARGETS) / 4, [(5, True, [0.25])]),
        (lambda: cross_entropy(_logits(), TARGETS, reduction="sum") / 4, [(5, False, [0.25])]),
        (lambda: cross_entropy(_logits(), TARGETS.abs() % 5), [(6, True, [1.0])]),
        (lambda: cross_entropy(_logits(), TARGETS.clamp(min=0), ignore_index=1), [(4, True, [1.0])]),
        (lambda: cross_entropy(_logits(), TARGETS.abs() % 5, ignore_index=-(2**63)), [(6, True, [1.0])]),
        (lambda: cross_entropy(_logits(2, 5, 3), TARGETS.view(2, 3)), [(5, True, [1.0])]),
        (lambda: cross_entropy(_logits(), TARGETS, label_smoothing=0.2), [(5, True, [0.8])]),
        (lambda: cross_entropy(_logits(), TARGETS) + _logits().square().mean(), [(5, True, [1.0])]),
        (lambda: cross_entropy(_logits(), TARGETS).reshape(1, 1).sum(), [(5, True, [1.0])]),
        (lambda: _logits().square().mean(), []),
        (lambda: (_logits() * cross_entropy(_logits(), TARGETS)).sum(), []),
    ],
)
def test_cross_entropies_are_found_with_what_reaches_them(make, parts):
    """Through numbers alone: behind a tensor of more lies the model."""
    assert _read(make()) == parts


def test_every_cross_entropy_of_a_loss_is_found():
    """Once each, however many ways lead there."""
    one, two = cross_entropy(_logits(), TARGETS), cross_entropy(_logits(), TARGETS, reduction="sum")
    assert sorted(_read(one + two / 2 + one)) == [(5, False, [0.5]), (5, True, [2.0])]


def test_each_backward_pass_is_kept():
    """Until the hooks are taken off."""
    assert _read(cross_entropy(_logits(), TARGETS), back=2) == [(5, True, [1.0, 1.0])]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cross_entropy(_logits(), TARGETS, reduction="none").reshape(-1)[:1].sum(), None),
        (lambda: cross_entropy(_logits(), TARGETS, weight=torch.ones(5)), "by its class"),
        (lambda: cross_entropy(_logits()[:1], TARGETS[:1], reduction="none").sum(), "each token by itself"),
    ],
)
def test_tokens_of_different_weights_are_not_counted(make, words):
    """Nor is a loss that is taken token by token and summed up by the program."""
    found = _read(make())
    assert found == [] if words is None else words in found


def test_what_is_put_away_until_the_backward_pass_is_not_fetched():
    """To ask a checkpoint for it would compute the loss again."""
    calls = []

    def loss(logits):
        calls.append(1)
        return cross_entropy(logits, TARGETS)

    made = checkpoint(loss, _logits(), use_reentrant=False)
    with ExitStack() as hooks:
        found = read_loss(made, BackwardPasses(torch.nn.Linear(1, 1)), hooks, lambda hook: hook)
    assert "put away" in found.unread
    assert len(calls) == 1


def test_nothing_of_the_graph_is_held():
    """What the backward pass keeps is the program's to drop."""
    factor = torch.randn(6, 5)
    held = weakref.ref(factor)
    loss = cross_entropy(_logits() * factor, TARGETS)
    with ExitStack() as hooks:
        made = read_loss(loss, BackwardPasses(torch.nn.Linear(1, 1)), hooks, lambda hook: hook)
        del factor, loss
        assert held() is None
    assert len(made.parts) == 1


def test_a_loss_that_cannot_be_read_is_no_error_of_the_step():
    """Its reason is kept."""
    with ExitStack() as hooks:
        made = read_loss(cross_entropy(_logits(), TARGETS), None, hooks, lambda hook: 1 / 0)
    assert made.unread == "the loss could not be read: ZeroDivisionError: division by zero"
