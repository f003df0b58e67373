"""What the backward pass takes for a mask of dropout, told from products that look like it by real records of torch."""

from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

from harness.records.activity import DROPOUT_OPERATOR
from harness.trial.profiling.activity import MARK, activity_of
from harness.trial.profiling.backward import backward_times
from harness.trial.profiling.copies import KernelTimes

SIZE = 256


def recorded(loss_of):
    """The records of one forward and one backward pass of a loss."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        with record_function(f"{MARK}forward"):
            loss = loss_of()
        with record_function(f"{MARK}backward"):
            loss.backward()
    return list(found.profiler.kineto_results.events())


def calls_of(events, name):
    """Beginnings and seconds of the calls of a node, in order."""
    called = [one for one in events if one.name() == f"autograd::engine::evaluate_function: {name}"]
    return sorted((one.start_ns(), (one.end_ns() - one.start_ns()) / 1e9) for one in called)


@pytest.fixture
def weight():
    return torch.randn(SIZE, SIZE, requires_grad=True)


def test_the_product_with_a_mask_is_told_from_another(weight):
    """Of three products in the backward pass two are with masks; those are counted, with all that belongs to them."""

    def loss():
        masked = torch.dropout(torch.dropout(weight, 0.1, True) @ weight, 0.5, True)
        return (masked * weight).sum()

    events = recorded(loss)
    products = calls_of(events, "MulBackward0")
    assert len(products) == 3
    masks = sorted(backward_times(events, DROPOUT_OPERATOR, None))
    assert masks == products[1:]  # backwards: the loss's own comes first
    _, forward, backward, _ = activity_of(events, (0.01,), "cpu").phases
    assert forward.dropout_backward_s == 0.0
    assert backward.dropout_backward_s == pytest.approx(sum(seconds for _, seconds in masks))
    assert 0 < backward.dropout_backward_s < backward.window_s
    drawn = [one for one in events if one.name() == "aten::bernoulli_"]
    assert len(drawn) == 2
    assert 6 <= forward.records["dropout_s"] < forward.records["phase"]  # two operators, each with two more at least
    assert 4 <= backward.records["dropout_backward_s"] < backward.records["phase"]
    assert (forward.records["dropout_backward_s"], backward.records["dropout_s"]) == (0.0, 0.0)


@pytest.mark.parametrize("masks", [0, 2])
def test_what_is_computed_again_for_the_backward_pass_counts(weight, masks):
    """With checkpointing the masks that are multiplied with are those that were drawn a second time."""

    def block(given):
        for _ in range(masks):
            given = torch.dropout(given, 0.1, True)
        return (given * weight).exp()

    events = recorded(lambda: checkpoint(block, weight, use_reentrant=False).sum())
    assert len(calls_of(events, "MulBackward0")) == masks + 1
    assert len(backward_times(events, DROPOUT_OPERATOR, None)) == masks


@pytest.mark.parametrize("given", ["evaluated", "frozen"])
def test_what_is_never_multiplied_with_again_takes_no_time(weight, given):
    """No mask is drawn in evaluation, and what needs no gradient gets none: the next node is not taken for it."""
    other = torch.randn(SIZE, SIZE)
    events = recorded(
        lambda: (
            (torch.dropout(weight, 0.1, False) * other).sum()
            if given == "evaluated"
            else (torch.dropout(other, 0.1, True) * weight).sum()
        )
    )
    assert len(calls_of(events, "MulBackward0")) == 1
    assert backward_times(events, DROPOUT_OPERATOR, None) == []


def record(name, start, end, *, thread=1, sequence=-1, forward=0, number=0):
    """A record of the profiler, constructed; times in milliseconds."""
    values = {
        "name": name, "start_ns": int(start * 1e6), "end_ns": int(end * 1e6), "start_thread_id": thread,
        "sequence_nr": sequence, "fwd_thread_id": forward, "correlation_id": number, "linked_correlation_id": 0,
    }  # fmt: skip
    return SimpleNamespace(**{key: (lambda value=value: value) for key, value in values.items()})


def test_on_a_gpu_the_kernels_of_another_thread_are_counted():
    """Constructed: the engine runs in a thread of its own, where numbers mean another thread's nodes."""
    host = [
        record("aten::dropout", 0, 3, sequence=7),
        record("aten::native_dropout", 1, 2, sequence=7),
        record("aten::mul", 4, 5, sequence=8),
        record("aten::mul", 0, 5, sequence=7, thread=2),
        record("autograd::engine::evaluate_function: MulBackward0", 10, 11, thread=3, sequence=8, forward=1),
        record("autograd::engine::evaluate_function: MulBackward0", 11, 12, thread=3, sequence=7, forward=2),
        record("autograd::engine::evaluate_function: NativeDropoutBackward0", 12, 14, thread=3, sequence=7, forward=1),
        record("NativeDropoutBackward0", 12.5, 13.5, thread=3, sequence=7, forward=1),
        record("aten::native_dropout_backward", 13, 13.2, thread=3, number=5),
    ]
    kernel = record("masked_scale_kernel", 20, 24)
    kernel.linked_correlation_id = lambda: 5
    times = KernelTimes([kernel], host)
    assert backward_times(host, DROPOUT_OPERATOR, times) == [(12_000_000, pytest.approx(0.004))]
    assert backward_times(host, DROPOUT_OPERATOR, None) == [(12_000_000, pytest.approx(0.002))]
