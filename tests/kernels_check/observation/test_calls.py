"""Every call of a module is noted with the one that it came from, in both passes; nothing is left behind."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels_check.observation import compilations
from kernels_check.observation.calls import CallRecorder


@pytest.fixture
def instrument():
    """No instrument is asked."""
    return "profile"


class Layer(nn.Module):
    """Calls its part, by way of checkpointing where told to."""

    def __init__(self, part, reentrant=None):
        super().__init__()
        self.part, self.reentrant = part, reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self.part(x)
        return checkpoint(self.part, x, use_reentrant=self.reentrant)


def recorded(model, run):
    recorder = CallRecorder(model)
    with recorder.hooked():
        run(model, torch.randn(2, 4, requires_grad=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return recorder.calls()


def train(model, x):
    model(x).sum().backward()


def test_a_call_knows_its_caller():
    """By number, the innermost first; a module in two places has both names."""
    shared = nn.Linear(4, 4)
    calls = recorded(nn.Sequential(Layer(shared), Layer(shared)), train)
    assert [call.names for call in calls.all] == [("",), ("0",), ("0.part", "1.part"), ("1",), ("0.part", "1.part")]
    assert [calls.all[number].name for number in calls.enclosing(4)] == ["0.part", "1", ""]
    assert [call.caller for call in calls.all] == [None, 0, 1, 0, 3]
    assert calls.called("1.part") == [2, 4]


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_is_told_apart(reentrant):
    """Reentrant checkpointing runs the first forward without gradients: it is the model's training all the same."""
    calls = recorded(nn.Sequential(Layer(nn.Linear(4, 4), reentrant), Layer(nn.Linear(4, 4))), train)
    assert calls.recomputed("0.part")
    assert not calls.recomputed("1.part")
    assert calls.ran("0.part")
    assert len(calls.called("0.part")) == len(calls.called("0.part", in_backward=True)) == 1
    assert len(calls.relevant) == len(calls.all)


def test_entries_without_gradients_count_only_where_there_are_no_others():
    """An evaluation beside the training is left out; an evaluation by itself is what is judged."""

    def both(model, x):
        with torch.no_grad():
            model(x)
        train(model, x)

    def evaluation(model, x):
        with torch.no_grad():
            model(x)

    model = nn.Sequential(nn.Linear(4, 4))
    assert recorded(model, both).forward == (2, 3)
    assert recorded(model, evaluation).forward == (0, 1)


def test_modes_are_those_of_every_call():
    """None where a module was called in both; what is never called has the mode that it stood in."""

    def changing(model, x):
        train(model, x)
        model[0].eval()
        train(model, x)

    model = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    model.spare = nn.Linear(4, 4).eval()
    model.forward = lambda x: model[1](model[0](x))
    modes = recorded(model, changing).training()
    assert modes == {"": True, "0": None, "1": True, "spare": False}


def test_an_exception_leaves_no_hook_and_no_open_call():
    """Also one that the model catches: what follows belongs to the caller again."""

    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.bad, self.good = Layer(None), nn.Linear(4, 4)

        def forward(self, x):
            try:
                self.bad(x)
            except TypeError:
                return self.good(x)

    calls = recorded(Careless(), train)
    assert [(call.name, call.caller) for call in calls.all] == [("", None), ("bad", 0), ("good", 0)]
    model = nn.Sequential(Layer(None))
    recorder = CallRecorder(model)
    with pytest.raises(TypeError), recorder.hooked():
        model(torch.randn(2, 4))
    assert recorder.current() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Answer:
    """What a module may return that is no tensor and no container."""

    def __init__(self, logits):
        self.logits, self.count = logits, 3


class Answering(nn.Module):
    """Returns what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


@pytest.mark.parametrize(
    ("answer", "comes_back"),
    [
        (Answer, True),
        (lambda x: Answer(x.detach()), False),
        (lambda x: [{"logits": x}], True),
        (lambda x: 3, False),
        (lambda x: None, False),
    ],
)
def test_a_gradient_comes_back_to_what_holds_a_tensor_that_asks_for_it(answer, comes_back):
    """Also to an object that keeps it in an attribute, and not to every object."""
    calls = recorded(Answering(answer), lambda model, x: model(x))
    assert calls.differentiable == (frozenset({0}) if comes_back else frozenset())


def test_a_checkpoint_in_an_evaluation_trains_nothing():
    """The function that it runs in would switch gradients off, had not the evaluation done so."""

    def evaluate(model, x):
        with torch.no_grad():
            model(x)

    calls = recorded(nn.Sequential(Layer(nn.Linear(4, 4), True)), evaluate)
    assert [call.with_grad for call in calls.all] == [False, False, False]
    assert calls.differentiable == frozenset()


@pytest.mark.parametrize("reentrant", [True, False])
def test_modes_are_read_at_each_entry_into_the_model(reentrant):
    """Neither at a call inside one, nor where the backward pass computes a part of it again."""

    def twice(model, x):
        train(model, x)
        train(model.eval(), x)

    calls = recorded(nn.Sequential(Layer(nn.Linear(4, 4), reentrant)), twice)
    entries = [number for number, call in enumerate(calls.all) if call.names == ("",)]
    assert [number for number, _ in calls.modes] == entries
    assert [modes["0.part"] for _, modes in calls.modes] == [True, False]


@pytest.fixture
def compiled():
    """A layer that is compiled in place, beside one that is not."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].compile(backend="eager")
    yield model
    compilations.forget()


def test_what_calls_a_compiled_module_is_taken_off_in_any_order(compiled):
    """Two records of the same module that end crosswise each have their calls, and leave what was there."""
    before = compiled[0]._compiled_call_impl
    first, second = ExitStack(), ExitStack()
    recorders = [CallRecorder(compiled) for _ in range(2)]
    for stack, recorder in zip((first, second), recorders, strict=True):
        stack.enter_context(recorder.hooked())
    x = torch.ones(1, 4)
    compiled(x)
    first.close()
    compiled(x)
    second.close()
    assert compiled[0]._compiled_call_impl is before
    compiled(x)
    names = [[call.name for call in recorder.calls().all] for recorder in recorders]
    assert names == [["", "0", "1"], ["", "0", "1"] * 2]
    assert [call.compiled for call in recorders[0].calls().all] == [False, True, False]
    assert [recorder.calls().unhooked for recorder in recorders] == [frozenset({"0"})] * 2
    assert [recorder.current() for recorder in recorders] == [None, None]


def test_what_the_program_compiles_meanwhile_stays(compiled):
    """Also where it takes the compilation back."""
    with CallRecorder(compiled).hooked():
        compiled[0].compile(backend="eager", dynamic=True)
        own = compiled[0]._compiled_call_impl
    assert compiled[0]._compiled_call_impl is own
    with CallRecorder(compiled).hooked():
        compiled[0]._compiled_call_impl = None
    assert compiled[0]._compiled_call_impl is None


def test_a_compiled_module_that_raises_is_left_again(compiled):
    """The call that it was in is the caller's no more, and came to nothing."""
    recorder = CallRecorder(compiled)
    with recorder.hooked():
        with pytest.raises(Exception, match=r"mat1 and mat2|same reduction dim"):
            compiled[0](torch.ones(1, 3))
        assert recorder.current() is None
        compiled[0](torch.ones(1, 4))
    assert [call.name for call in recorder.calls().all] == ["0", "0"]
    assert recorder.calls().failed == frozenset({0})
