"""Tests that recomputation, compilation and modes are observed in the step and not read from flags."""

from functools import partial

import pytest
import torch
from negative_controls.small_run import forget_compilations

import kernels_check


def test_tf32_cannot_run_without_cuda(training):
    """False is met, true is absent, and the reason quotes the flag; mixing the old and the new switches is not an
    error."""
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    run = training()
    assert run.check("tf32", False).met
    check = run.check("tf32", True)
    assert check.status == "absent"
    assert "fp32_precision" in check.reason


def test_compiled_regions_are_counted_and_checks_stay_sound(training):
    """In a compiled model, which calls no hook, gradients prove the adapter, and nothing is recompiled."""
    from torch._dynamo.utils import counters

    run = training(quant=None)
    inner = run.model
    run.model = torch.compile(inner, backend="eager")
    run.step()
    graphs = counters["stats"]["unique_graphs"]
    requirements = {
        **{"compile": True, "peft.attached": True, "peft.learning": True, "peft.dropout": 0.05, "mode": "train"},
        "attention.dtype": "bfloat16",
    }
    checks = run.verify(requirements)
    assert [(check.path, check.reason) for check in checks if check.required is not None and not check.met] == []
    run.step()
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


_compile = partial(torch.compile, backend="eager", dynamic=False)


@pytest.fixture
def compiled():
    """A function that judges ``compile`` of a layer by its last step, after steps with the given numbers of rows."""

    def judge(layer, *rows, forward=None, required=True):
        forget_compilations()
        forward = forward or _compile(layer)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

        def step(rows=rows[-1]):
            optimizer.zero_grad()
            forward(torch.ones(rows, 4)).sum().backward()
            optimizer.step()

        for count in rows:
            step(count)
        checks = kernels_check.verify(layer, step, {"compile": required})
        return next(check for check in checks if check.path == "compile")

    yield judge
    forget_compilations()


def test_a_compiled_model_that_runs_eagerly_in_part_is_caught(compiled):
    """One function gets the length of its compilation, the other exceeds the recompile limit."""
    layer = torch.nn.Linear(4, 4)
    doubled, shifted = _compile(lambda value: value * 2), _compile(lambda value: value + 1)
    with torch._dynamo.config.patch(recompile_limit=1):
        check = compiled(
            layer, 3, 4, forward=lambda value: doubled(layer(value)).sum() + shifted(layer(value[:3])).sum()
        )
    assert (check.status, check.observed) == ("fallback", False)
    assert "1 compiled regions entered, 2 compiler cache look-ups; 0 of 1 blocks ran in compiled code" in check.reason
    assert "part of the code ran eagerly" in check.reason
