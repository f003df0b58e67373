"""What the compiler has on record is told by place, once each, and never guessed."""

import sys
from traceback import FrameSummary
from types import SimpleNamespace

import pytest
import torch

from kernels_check.observation import compilations
from kernels_check.observation.compilations import Compilations

LIMIT = 64


class Layer(torch.nn.Module):
    def __init__(self, breaks):
        super().__init__()
        self.breaks = breaks
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, value):
        value = self.linear(value)
        if self.breaks:
            torch._dynamo.graph_break()
        return value * 2


class Stack(torch.nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, value):
        for layer in self.layers:
            value = layer(value)
        return value


@pytest.fixture(autouse=True)
def _alone():
    """The record is the process's."""
    compilations.forget()
    yield
    compilations.forget()


def _ran(model, *rows):
    compiled = torch.compile(model, backend="eager", dynamic=False)
    for count in rows:
        compiled(torch.ones(count, 4))
    return compilations.read()


def _compilation(**given):
    nothing = dict.fromkeys(("recompile_reason", "fail_reason", "fail_user_frame_filename", "fail_user_frame_lineno"))
    return SimpleNamespace(**nothing | {"co_name": "f", "co_filename": "/a/b/c.py", "co_firstlineno": 7} | given)


def _frame(line):
    return FrameSummary("/a/b/c.py", line, "f")


@pytest.fixture
def recorded(monkeypatch):
    """Read a record that is made up."""

    def read(*metrics, breaks=()):
        dynamo = SimpleNamespace(
            get_compilation_metrics=lambda: list(metrics),
            graph_break_reasons=[SimpleNamespace(reason=reason, user_stack=stack) for reason, stack in breaks],
            DEFAULT_COMPILATION_METRICS_LIMIT=LIMIT,
        )
        monkeypatch.setitem(sys.modules, "torch._dynamo.utils", dynamo)
        return compilations.read()

    return read


def test_a_clean_compilation_leaves_nothing():
    """One graph, compiled once."""
    assert _ran(Stack(Layer(False)), 2, 2) == Compilations()


def test_a_break_is_told_by_its_line():
    """Once, although Dynamo has it on record for the layer and for each of its callers."""
    model = torch.nn.Sequential(Layer(True), Layer(True))
    (place,) = _ran(model, 2).breaks
    assert place.startswith("Call to `torch._dynamo.graph_break()` at observation/test_compilations.py:")
    assert place.endswith("`torch._dynamo.graph_break()`")


def test_a_break_inside_a_loop_leaves_the_function_uncompiled():
    """It is no graph break to Dynamo: the loop is given up, and only what it calls is compiled."""
    seen = _ran(Stack(Layer(True), Layer(True)), 2)
    assert len(seen.breaks) == 1
    assert [name.rpartition(":")[0] for name in seen.uncompiled] == ["forward at observation/test_compilations.py"]


def test_every_recompilation_names_its_guard():
    """Another length each time; one beyond the limit is refused."""
    with torch._dynamo.config.patch(recompile_limit=2):
        seen = _ran(Layer(False), 2, 3, 4)
    (again,) = seen.recompiles
    assert again.startswith("forward at observation/test_compilations.py:")
    assert again.endswith(": tensor 'value' size mismatch at index 0. expected 2, actual 3")
    (refused,) = seen.refused
    assert "limit" in refused
    assert refused.endswith(": tensor 'value' size mismatch at index 0. expected 3, actual 4")


def test_what_failed_is_told_apart(recorded):
    """At first sight a function stays uncompiled, later a recompilation was refused; with a place it is a break."""
    placed = {"fail_reason": "no\nhint", "fail_user_frame_filename": "/a/b/c.py", "fail_user_frame_lineno": 9}
    again = {"recompile_reason": "0/0: x == 1   # y  # c.py:2\nUser stack trace:"}
    seen = recorded(
        _compilation(),
        _compilation(**placed),
        _compilation(fail_reason="the backend"),
        _compilation(**again),
        _compilation(**again),
        _compilation(**again | placed | {"co_name": None, "fail_user_frame_lineno": 10}),
        _compilation(**again, fail_reason="limit", co_filename=None),
    )
    assert seen == Compilations(
        breaks=("no at b/c.py:9", "no at b/c.py:10"),
        uncompiled=("f at b/c.py:7",),
        recompiles=("f at b/c.py:7: x == 1",) * 2,
        refused=("no: x == 1", "limit: x == 1"),
    )


def test_a_break_is_placed_where_it_happened(recorded):
    """In the innermost function; a break before the first line has no place of its own."""
    seen = recorded(breaks=[("a", [_frame(1), _frame(2)]), ("b", []), ("a", [_frame(3), _frame(2)])])
    assert seen.breaks == ("a at b/c.py:2", "b")


def test_a_full_record_is_a_lower_bound(recorded):
    """Dynamo keeps the latest compilations only."""
    assert recorded(*[_compilation()] * (LIMIT - 1)).complete
    seen = recorded(*[_compilation()] * LIMIT)
    assert not seen.complete
    assert str(seen).startswith("in this process so far at least 0 graph breaks, 0 recompiles; ")


def test_a_torch_that_does_not_tell_is_named(monkeypatch):
    """What is missing is the reason; nothing is counted as zero."""
    import torch._dynamo.utils

    monkeypatch.delattr(torch._dynamo.utils, "graph_break_reasons")
    seen = compilations.read()
    assert "graph_break_reasons" in seen.unreadable
    assert str(seen).startswith("graph breaks and recompiles cannot be told: ")
    monkeypatch.setattr(torch._dynamo.utils, "get_compilation_metrics", lambda since: [])
    assert "since" in compilations.read().unreadable


def test_without_a_compiler_nothing_was_compiled(monkeypatch):
    """It is not loaded to be asked."""
    monkeypatch.delitem(sys.modules, "torch._dynamo.utils", raising=False)
    assert compilations.read() == Compilations()
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    compilations.forget()
    assert "torch._dynamo" not in sys.modules


def test_the_record_reads_as_a_sentence():
    """Counts with what was counted; the way to see more where there is something to see."""
    assert str(Compilations()) == "in this process so far 0 graph breaks, 0 recompiles"
    seen = Compilations(breaks=("a", "b"), recompiles=("c",), uncompiled=("d",), refused=("e",))
    assert str(seen) == (
        "in this process so far 2 graph breaks (a; b), 1 recompiles (c), 1 functions left uncompiled (d), "
        "1 recompiles refused (e); TORCH_LOGS=graph_breaks,recompiles shows each as it happens"
    )


def test_a_compiler_that_is_held_compiles_nothing():
    """What is called then runs eagerly; afterwards it is compiled as ever."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    function = torch.compile(lambda value: value + 1, backend=backend)
    with compilations.compiler_held("force_eager"):
        function(torch.ones(2))
    assert not compiled
    function(torch.ones(2))
    assert len(compiled) == 1
