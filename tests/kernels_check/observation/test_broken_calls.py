"""A call that raised and came to nothing is no call of the step; one that is trained on in spite of it is."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels_check.observation.broken_calls import BrokenCalls, outputs_of
from kernels_check.observation.watcher import StepWatcher


class Layer(nn.Module):
    """A layer of an adapter of one's own."""

    def __init__(self):
        super().__init__()
        self.base_layer, self.lora_A = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.base_layer(x) + self.lora_A(x)


class Failing(nn.Module):
    """Raises as often as it is told to, and hands over."""

    def __init__(self, times):
        super().__init__()
        self.times, self.kept = times, None

    def forward(self, x):
        self.kept = x
        if self.times:
            self.times -= 1
            raise MemoryError("no more of it")
        return x


@pytest.fixture
def instrument():
    """No instrument is asked."""
    return "profile"


def _watched(model, run):
    watcher = StepWatcher(model)
    with watcher.hooked():
        run(model, torch.ones(1, 4))
    return watcher


def _again(model, x):
    try:
        model(x)
    except MemoryError:
        model[1].kept = None
    model(x).sum().backward()


def _again_where_it_is_caught(model, x):
    try:
        model(x)
    except MemoryError:
        model[1].kept = None
        model(x).sum().backward()


@pytest.mark.parametrize("run", [_again, _again_where_it_is_caught])
def test_what_failed_and_was_taken_again_counts_once(run):
    """Of all calls, of those of the adapter, and of those of the model; the second is none of what failed."""
    watcher = _watched(nn.Sequential(Layer(), Failing(1)), run)
    assert watcher.calls.failed == frozenset(range(5))
    assert [watcher.calls.all[number].name for number in watcher.calls.forward] == [
        "",
        "0",
        "0.base_layer",
        "0.lora_A",
        "1",
    ]
    assert watcher.calls.forward[0] == 5
    assert [call.number for call in watcher.adapter.layers["0"]] == [6]
    assert [call.number for call in watcher.inputs.calls] == [5]


def test_what_is_trained_on_counts_although_it_raised():
    """As by those who read activations and leave the forward by an exception."""

    def read(model, x):
        try:
            model(x)
        except MemoryError:
            model[1].kept.sum().backward()

    watcher = _watched(nn.Sequential(Layer(), Failing(1)), read)
    assert watcher.calls.failed == frozenset({4}), "nothing came back to the output of the one that raised"
    assert [call.number for call in watcher.adapter.layers["0"]] == [1]
    assert len(watcher.inputs.calls) == 1
    assert not watcher.calls.all[1].in_backward


def test_only_the_part_that_failed_is_dropped():
    """Where the model catches the error itself and goes on."""

    class Careful(nn.Sequential):
        def forward(self, x):
            try:
                return self[1](self[0](x))
            except MemoryError:
                return self[2](x)

    watcher = _watched(
        Careful(nn.Linear(4, 4), Failing(1), nn.Linear(4, 4)), lambda model, x: model(x).sum().backward()
    )
    assert [watcher.calls.all[number].name for number in sorted(watcher.calls.failed)] == ["1"]


def test_a_call_inside_a_wrapper_that_failed_is_no_call_of_the_wrapper():
    """Which called what it wraps once more."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(4, 4), Failing(1))

        def forward(self, x):
            try:
                return self.model(x)
            except MemoryError:
                return self.model(x)

    watcher = _watched(Wrapper(), lambda model, x: model(x).sum().backward())
    assert [call.number for call in watcher.inputs.calls] == [0]
    assert [call.number for call in watcher.inputs.calls[0].inside] == [4]


def test_where_all_failed_nothing_counts():
    """Nor does the evaluation beside it, which trains nothing."""

    def fail(model, x):
        with torch.no_grad():
            model[0](x)
        with pytest.raises(MemoryError):
            model(x)
        model[1].kept = None

    watcher = _watched(nn.Sequential(nn.Linear(4, 4), Failing(1)), fail)
    assert watcher.calls.relevant == frozenset()
    assert watcher.calls.forward == ()


def test_what_is_computed_again_may_stop_by_an_exception():
    """Torch does so as soon as it has what the backward pass needs."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())

        def forward(self, x):
            return checkpoint(self.part, x, use_reentrant=False)

    model = Checkpointed()
    watcher = _watched(model, lambda model, x: model(x).sum().backward())
    assert watcher.calls.recomputed("part")
    assert watcher.calls.failed == frozenset()


def test_hooks_on_what_a_failed_pass_has_left_are_taken_off():
    """Also where the program keeps it."""
    model = nn.Sequential(nn.Linear(4, 4), Failing(1))

    def fail(model, x):
        with pytest.raises(MemoryError):
            model(x)

    watcher = _watched(model, fail)
    assert watcher.calls.failed == frozenset({0, 1, 2})
    assert not model[1].kept._backward_hooks


class Answer:
    """What a module may return that is no tensor and no container."""

    def __init__(self, tensor):
        self.tensor, self.count = tensor, 3


def test_outputs_are_those_that_a_gradient_can_come_back_to():
    """In containers and in the attributes of an object; of no other tensor."""
    asking, other = torch.ones(1, requires_grad=True), torch.ones(1)
    for output, count in [
        (asking, 1),
        (other, 0),
        ({"a": [asking, other], "b": (asking,)}, 2),
        (Answer(asking), 1),
        (3, 0),
    ]:
        assert [(number, reference()) for number, reference in outputs_of(7, output)] == [(7, asking)] * count


def test_a_call_that_came_back_holds_those_around_it():
    """And nothing beside it."""
    callers = {0: None, 1: 0, 2: 1, 3: 0, 4: None}
    broken = BrokenCalls()
    inner = torch.ones(1, requires_grad=True)
    for number in (2, 1, 3, 0, 4):
        broken.add(number, outputs_of(1, inner) if number == 1 else ())
    assert broken.failed(callers) == frozenset(callers)
    inner.sum().backward()
    assert broken.failed(callers) == frozenset({2, 3, 4})
