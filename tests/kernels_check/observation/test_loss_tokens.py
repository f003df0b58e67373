"""The weight of a token is the gradient at its cross entropy, shared among the tokens of a mean."""

import math

import pytest
import torch

from kernels_check.observation.backward_passes import BackwardPass
from kernels_check.observation.cross_entropies import Arrival, CrossEntropy, LossMade
from kernels_check.observation.inputs import ModelCall
from kernels_check.observation.loss_tokens import LossPass, loss_of_step

LABELS = torch.ones(2, 8, dtype=torch.long)
ONE = BackwardPass(task=1)
TWO = BackwardPass(task=2, lying=(torch.ones(()),))
AFTER = BackwardPass(task=2, after_update=True)


def _part(tokens=10, *gradients, mean=True, during=ONE, dtype=torch.float32):
    arrivals = [Arrival(gradient=torch.tensor(value, dtype=dtype), during=during) for value in gradients or (1.0,)]
    return CrossEntropy(tokens=torch.tensor(tokens), mean=mean, arrivals=arrivals)


def _call(*parts, labels=LABELS, gradients=True, reached=True, unread=None, **arguments):
    return ModelCall(
        module=torch.nn.Identity(),
        arguments={"labels": labels, **arguments},
        gradients=gradients,
        loss_gradients=[torch.ones(())] if reached else [],
        losses=[LossMade(parts=parts, unread=unread)],
    )


def _passes(*calls):
    return [(one.tokens, round(one.weight, 6), one.mean, one.sum) for one in loss_of_step(calls).passes]


@pytest.mark.parametrize(
    ("calls", "passes"),
    [
        ([_call(_part(10, 1.0))], [(10, 0.1, True, 0)]),
        ([_call(_part(10, 0.1, mean=False))], [(10, 0.1, False, 0)]),
        ([_call(_part(10, 0.5)), _call(_part(5, 0.5, during=TWO))], [(10, 0.05, True, 0), (5, 0.1, True, 0)]),
        ([_call(_part(10)), _call(_part(5, during=AFTER))], [(10, 0.1, True, 0), (5, 0.2, True, 1)]),
        ([_call(_part(10, 0.5, 0.5))], [(10, 0.1, True, 0)]),
        ([_call(_part(10)), _call(_part(0, math.nan))], [(10, 0.1, True, 0), (0, 0.0, True, 0)]),
        ([_call(_part(0, 1.0))], [(0, 0.0, True, 0)]),
        ([_call(_part(10), _part(10))], [(20, 0.1, True, 0)]),
        ([_call(_part(10), _part(0))], [(10, 0.1, True, 0)]),
        ([_call(_part(1, 0.1), _part(10, 0.1, mean=False))], [(11, 0.1, True, 0)]),
        ([_call(_part(10)), _call(_part(5), gradients=False)], [(10, 0.1, True, 0)]),
        ([_call(_part(10)), _call(_part(5, 0.0), _part(5, 0.0))], [(10, 0.1, True, 0), (10, 0.0, True, 0)]),
        ([_call(_part(10, during=TWO)), _call(_part(5))], [(10, 0.1, True, 0), (5, 0.2, True, 0)]),
    ],
)
def test_what_each_pass_gave(calls, passes):
    """To each sum of gradients that it feeds."""
    assert _passes(*calls) == passes


def test_a_call_that_goes_back_for_two_updates_feeds_both():
    """With what it gave to each."""
    part = _part(10, 1.0)
    part.arrivals.append(Arrival(gradient=torch.tensor(0.5), during=AFTER))
    assert _passes(_call(part)) == [(10, 0.1, True, 0), (10, 0.05, True, 1)]


def test_half_precision_is_given_more_room():
    """By the type of the gradient."""
    wide, narrow = (loss_of_step([_call(_part(10, 1.0, dtype=kind))]).passes[0] for kind in (torch.float32, torch.half))
    assert (wide.tolerance, narrow.tolerance) == (1e-3, 2e-2)
    assert isinstance(wide, LossPass)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (_call(_part(), labels=None), "made elsewhere"),
        (_call(_part(), labels=torch.ones(2, 8)), "made elsewhere"),
        (_call(_part(), labels=torch.ones(2, dtype=torch.long)), "whole rows"),
        (_call(_part(), reached=False), "nothing went back"),
        (_call(_part(), unread="no reason"), "no reason"),
        (_call(), "holds no cross entropy"),
        (_call(CrossEntropy(tokens=torch.tensor(5), mean=True)), "holds no cross entropy"),
        (_call(_part(10, math.inf)), "not finite"),
        (_call(_part(10, math.nan)), "not finite"),
        (_call(_part(10, 0.0)), "zero for every token"),
        (_call(_part(10, 1.0), _part(5, 1.0)), "2 cross entropies of different weights"),
        (_call(_part(), gradients=False), "no call of the model itself"),
    ],
)
def test_what_does_not_tell_says_why(call, words):
    """And is never counted."""
    assert words in loss_of_step([call]).unseen


def test_weights_within_one_pass_may_differ_by_rounding():
    """As much as in half precision they must."""

    def of(value, kind):
        return loss_of_step([_call(_part(8, 8.0, dtype=kind), _part(8, value, dtype=kind))]).unseen

    assert of(8.0 * 0.9991, torch.float32) is None
    assert of(8.0 * 0.9989, torch.float32) is not None
    assert of(7.875, torch.half) is None
    assert of(7.8125, torch.half) is not None


def test_doubt_of_which_passes_add_up_is_passed_on():
    """With its reason."""
    gone = BackwardPass(task=2)
    assert "gone before the next" in loss_of_step([_call(_part()), _call(_part(5, during=gone))]).unseen
    assert _passes(_call(_part(0)), _call(_part(5, during=gone))) == [(0, 0.0, True, 0), (5, 0.2, True, 0)]
    assert _passes(_call(_part(5, 0.0)), _call(_part(5, during=gone)))[0] == (5, 0.0, True, 0)


def test_labels_that_the_program_has_shifted_are_of_tokens():
    """Whether or not it passes others beside."""
    call = _call(_part(), labels=None, shift_labels=LABELS)
    assert [(one.tokens, one.positions) for one in loss_of_step([call]).passes] == [(10, 16)]
