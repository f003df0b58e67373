"""Which operator updated a parameter is told by the tensors that it wrote."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kernels_check.observation.calls import MARK
from kernels_check.observation.updates import (
    GroupSeen,
    Write,
    groups_of,
    identity,
    is_hidden_by_a_mode,
    operators_on,
    recorded_writes,
    updated_by,
    with_gradient,
    write,
    writes,
)


def group(*parameters, index=0):
    return GroupSeen(optimizer="AdamW", index=index, has_fused=True, built_with=False, parameters=parameters)


def tensor(address, storage):
    """A tensor as a profile records it."""
    return SimpleNamespace(impl_ptr=address, storage_data_ptr=storage)


def event(name, *children, inputs=(), scope="FUNCTION"):
    fields = SimpleNamespace(scope=SimpleNamespace(name=scope), inputs=inputs)
    return SimpleNamespace(name=name, children=children, extra_fields=fields)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("aten::add_", True),
        ("aten::_fused_adamw_", True),
        ("bitsandbytes::optimizer_update_32bit", True),
        ("aten::add", False),
        ("c10d::allreduce_", False),
    ],
)
def test_a_write_is_told_by_its_name(name, told):
    """An operator of torch in place, or the update of a library; a collective is none."""
    assert writes(name) is told


def test_a_group_names_what_had_a_gradient():
    """Now, or before the step, which may drop it; what never had one is not the step's."""
    first, dropped, idle = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.SGD([first, dropped, idle])
    first.grad = torch.ones(2)
    (seen,) = groups_of(optimizer, {id(dropped)})
    assert seen.parameters == (identity(first), identity(dropped))
    assert (seen.has_fused, groups_of(torch.optim.Rprop([first]))[0].has_fused) == (True, False)
    assert with_gradient(optimizer) == {id(first)}


def test_parameters_are_counted_by_what_wrote_them():
    """By address, or by a storage that is theirs alone; one that nobody wrote is unseen."""
    written = [
        Write(op="aten::_fused_adamw_", tensors=((1, 10),)),
        Write(op="aten::_foreach_add_", tensors=((1, 10), (2, 20))),
        Write(op="aten::add_", tensors=((99, 30),)),
        Write(op="aten::add_", tensors=((98, 40),)),
    ]
    shares = (4, 40), (5, 40)
    counts = updated_by([group((1, 10), (2, 20), (3, 30), *shares, (6, 60), (7, 0))], written)
    assert counts == [Counter(fused=1, foreach=1, loop=1, unseen=4)]


def test_an_optimizer_that_wraps_another_updates_nothing_twice():
    """A parameter counts in the first group that has it."""
    counts = updated_by([group((1, 10)), group((1, 10), (2, 20))], [Write(op="aten::add_", tensors=((1, 10), (2, 20)))])
    assert counts == [Counter(loop=1), Counter(loop=1)]


def test_operators_are_those_that_wrote_a_parameter():
    """By its address or its storage; a step counter's is none, and 0 is no address."""
    written = [
        Write(op="aten::add_", tensors=((1, 10),)),
        Write(op="aten::mul_", tensors=((50, 10), (51, 0))),
        Write(op="aten::lerp_", tensors=((60, 0),)),
    ]
    assert operators_on([group((1, 10), (2, 0))], written) == ["aten::add_", "aten::mul_"]


def test_an_operator_of_torch_writes_its_first_argument():
    """A library's update writes what it likes, also tensors in lists."""
    one, other = torch.ones(1), torch.ones(1)
    assert write("aten::add_", [one, other]).tensors == (identity(one),)
    assert write("bitsandbytes::optimizer", ["adam", [one], other]).tensors == (identity(one), identity(other))


def test_writes_are_read_off_the_optimizers_step():
    """In ranges of the program's own too; a closure's backward pass and modules write no parameter."""
    user = {"scope": "USER_SCOPE"}
    inside = event("aten::mul_", inputs=[tensor(7, 70)])
    step = event(
        "Optimizer.step#AdamW.step",
        event("aten::_fused_adamw_", inputs=[[tensor(1, 10), tensor(2, None)], [tensor(3, 30)]]),
        event("my range", event("bitsandbytes::optimizer_update", inputs=[tensor(4, 40), tensor(None, 50)]), **user),
        event(f"{MARK}3", inside, **user),
        event("autograd::engine::evaluate_function: X", inside, **user),
        event("aten::linear", inside),
        event("aten::add", inputs=[tensor(8, 80)]),
    )
    roots = [event("training_step", step, **user), event("aten::fill_", inputs=[tensor(9, 90)]), event("f", step)]
    assert list(recorded_writes(roots, MARK)) == [
        Write(op="aten::_fused_adamw_", tensors=((1, 10), (2, 0))),
        Write(op="bitsandbytes::optimizer_update", tensors=((4, 40), (0, 50))),
    ]


@pytest.mark.parametrize(
    ("wraps", "hidden"),
    [
        ((), False),
        (("PythonDispatchMode",), True),
        (("PythonDispatchMode", "PythonDispatchMode"), True),
        (("my range", "PythonDispatchMode"), True),
        (("PythonDispatchMode", "my range"), False),
        (("aten::linear", "PythonDispatchMode"), False),
        ((f"{MARK}3", "PythonDispatchMode"), False),
    ],
)
def test_a_mode_hides_what_is_inside_the_step_that_it_was_told_of(wraps, hidden):
    """Below other modes and in the program's ranges; what is told of something else hides nothing."""
    made = event("Optimizer.step#AdamW.step", scope="USER_SCOPE")
    for name in reversed(wraps):
        scope = "FUNCTION" if name in ("PythonDispatchMode", "aten::linear") else "USER_SCOPE"
        made = event(name, event("aten::add"), made, scope=scope)
    assert is_hidden_by_a_mode([event("aten::add"), made], MARK) is hidden
