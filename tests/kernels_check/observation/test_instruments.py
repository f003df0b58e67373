"""What an instrument cannot see is said to be unknown: other threads, and profilers of the program's own."""

import dataclasses
import threading
from contextlib import nullcontext

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import kernels_check
from kernels_check.observation import instruments
from kernels_check.observation.recording import is_recording, profiled

OPERATORS = ("attention.backend", "attention.dtype", "attention.mask", "base.compute_dtype", "base.gemm_path")


@pytest.fixture
def instrument():
    """Each test says which."""
    return "profile"


def _fused(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def _by_path(run, step=None, **required):
    return {
        check.path: check
        for check in run.verify({key.replace("_", "."): value for key, value in required.items()}, step)
    }


def _in_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def _recorder():
    return profile(activities=[ProfilerActivity.CPU])


def test_a_step_in_a_thread_is_unknown_to_the_spy(training):
    """Its operators are not seen; the profile sees all threads, and what needs no operator is judged by either."""
    run = training(targets="all-linear", make_optimizer=_fused)
    verdicts = {}
    for run.instrument in ("profile", "spy"):
        verdicts[run.instrument] = _by_path(run, lambda: _in_thread(run.step), attention_backend="flash")
    spied, profiled = verdicts["spy"], verdicts["profile"]
    for path in (*OPERATORS, "optimizer.fused"):
        assert (spied[path].status, spied[path].observed) == ("unknown", None)
        assert "ran in a thread of its own" in spied[path].reason
        assert profiled[path].status == "active", profiled[path].reason
    for path in ("checkpointing", "mode", "lora.attached", "compile", "optimizer.class"):
        assert (spied[path].status, spied[path].observed) == (profiled[path].status, profiled[path].observed)


@pytest.mark.parametrize(("kernels", "times"), [([{}, {"ATT-CUDNN": 1}], 2), ([{"ATT-CUDNN": 1}], 1), ([{}, {}], 2)])
def test_a_profile_without_a_kernel_of_the_card_is_tried_once_more(training, monkeypatch, kernels, times):
    """A session on the heels of another may come out empty; what the second holds is taken, and counted once."""
    run, seen = training(quant=None), []

    def recorded(call):
        seen.append(profiled(call))
        return dataclasses.replace(seen[-1], kernels=kernels[len(seen) - 1])

    monkeypatch.setattr(instruments, "profiled", recorded)
    monkeypatch.setattr(instruments, "is_on_cuda", lambda model: True)
    checks = _by_path(run, attention_backend="flash", base_frozen=True, lora_learning=True)
    assert len(seen) == times
    for path in ("attention.backend", "base.frozen", "lora.learning"):
        assert checks[path].met, checks[path].reason
    layers = run.model.config.num_hidden_layers
    assert checks["attention.backend"].reason.startswith(f"forward: {layers} flash; backward: {layers} flash")


class _Broken(torch.nn.Linear):
    """A layer with a statement that no graph can hold."""

    def forward(self, value):
        value = super().forward(value)
        torch._dynamo.graph_break()
        return value * 2


@pytest.mark.parametrize(("name", "sees"), [("profile", "profiled"), ("spy", "entries")])
def test_look_ups_of_the_checks_own_hooks_are_none_of_the_steps(monkeypatch, name, sees):
    """Behind a graph break torch 2.11 asks its compiler for the code of every hook of ours; a bare call counts anew."""
    layer, hooks = _Broken(4, 4), []
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    forward, original = torch.compile(layer, backend="eager", dynamic=False), getattr(instruments, sees)

    def step():
        optimizer.zero_grad()
        forward(torch.ones(3, 4)).sum().backward()
        optimizer.step()

    def seen(call):
        hooks.append(len(layer._forward_pre_hooks))
        found = original(call)
        told = found if sees == "entries" else found.compiler
        more = dataclasses.replace(told, lookups=told.lookups + 3 * (len(hooks) == 1))
        return more if sees == "entries" else dataclasses.replace(found, compiler=more)

    monkeypatch.setattr(instruments, sees, seen)
    torch._dynamo.reset()
    step()
    found = kernels_check.verify(layer, step, {"compile": True}, instrument=name)
    torch._dynamo.reset()
    check = next(check for check in found if check.path == "compile")
    assert check.met, check.reason
    assert check.reason.startswith("2 compiled regions entered, 2 compiler cache look-ups; 1 of 1 blocks ran")
    assert hooks[0] > 0
    assert hooks[1:] == [0]


def test_on_a_cpu_no_kernel_is_missed(training, monkeypatch):
    """One profile does."""
    run, seen = training(quant=None), []
    monkeypatch.setattr(instruments, "profiled", lambda call: seen.append(1) or profiled(call))
    assert _by_path(run, attention_backend="flash")["attention.backend"].met
    assert len(seen) == 1


def test_only_what_ran_elsewhere_is_unknown(training):
    """An update in a thread leaves the forward pass told."""
    run = training(make_optimizer=_fused, instrument="spy")

    def step():
        run.gradients()
        _in_thread(run.optimizer.step)

    checks = _by_path(run, step)
    assert checks["attention.backend"].status == "active"
    assert (checks["optimizer.fused"].status, "the update ran in a thread" in checks["optimizer.fused"].reason) == (
        "unknown",
        True,
    )


def test_threads_that_call_no_module_do_not_matter(training):
    """As those that load data or write logs."""
    run = training(make_optimizer=_fused, instrument="spy")

    def step():
        _in_thread(lambda: torch.ones(3).softmax(0))
        run.step()

    assert {check.status for path, check in _by_path(run, step).items() if path in OPERATORS[:3]} == {"active"}


@pytest.mark.parametrize("name", ["profile", "spy"])
def test_a_profiler_inside_the_step_keeps_its_events(training, name):
    """The spy watches in its place, and says the same of a sound step and of one that is not."""
    recorded = []
    for sound in (True, False):
        run = training(instrument=name, make_optimizer=_fused if sound else None)

        def passes(run):
            with _recorder() as own:
                loss = run.one_pass()
            recorded.append(own)
            return loss

        run.passes = passes
        checks = _by_path(run, optimizer_fused=True, attention_backend="flash", compile=False)
        assert checks["optimizer.fused"].met is sound, checks["optimizer.fused"].reason
        assert checks["attention.backend"].met
        assert checks["compile"].met
    assert all(any(event.name == "aten::mm" for event in own.events()) for own in recorded)


@pytest.mark.parametrize("name", ["profile", "spy"])
def test_a_profiler_around_the_check_keeps_its_events(training, name):
    """No other is started beside it."""
    run = training(instrument=name, make_optimizer=_fused)
    with _recorder() as own:
        assert is_recording()
        checks = _by_path(run, optimizer_fused=True, attention_backend="flash")
        torch.ones(4).cumsum(0)
    assert not is_recording()
    assert checks["optimizer.fused"].met
    assert checks["attention.backend"].met
    names = {event.name for event in own.events()}
    assert {"aten::mm", "aten::cumsum", "aten::_fused_adamw_"} <= names


@pytest.mark.parametrize("name", ["profile", "spy"])
@pytest.mark.parametrize("around", [True, False])
def test_compiled_code_beside_a_profiler_is_unknown(name, around):
    """Which code is entered is told by names that only a profiler of ours records."""
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    forward = torch.compile(layer, backend="eager", dynamic=False)

    def step():
        optimizer.zero_grad()
        with nullcontext() if around else _recorder():
            forward(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    step()
    with _recorder() if around else nullcontext():
        found = kernels_check.verify(layer, step, {"compile": True}, instrument=name)
    torch._dynamo.reset()
    check = next(check for check in found if check.path == "compile")
    assert (check.status, check.observed) == ("unknown", None)
    assert "profiler" in check.reason
