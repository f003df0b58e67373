"""The spy sees in one call what the profiler sees in two, and says what it cannot see."""

import threading

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import kernels_check
from kernels_check.observation.attention_calls import AttentionCall
from kernels_check.observation.calls import CallRecorder
from kernels_check.observation.events import StepProfile
from kernels_check.observation.products import Product
from kernels_check.observation.spy import Spy, blind_to, spied, unseen
from kernels_check.observation.updates import Write


@pytest.fixture
def instrument():
    """These tests are the spy's own."""
    return "spy"


def _fused(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def _profile(**more):
    return StepProfile(**{"attention": (), "fourbit": (), "kernels": {}, "unclassified": {}, **more})


@pytest.mark.parametrize("warm", [False, True])
def test_a_run_is_judged_in_two_calls(training, warm):
    """While lora_B is zero the gradient of lora_A is too; and only the next call shows that an update was kept."""
    run = training()
    if warm:
        run.step()
    assert run.check("lora.learning", True).met
    assert len(run.losses) == 2 + warm


@pytest.mark.parametrize("quant", ["nf4", None])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_instruments_say_the_same(training, quant, checkpointing):
    """Status and value of every path agree, whatever was required."""
    run = training(quant=quant, targets="all-linear", make_optimizer=_fused)
    if checkpointing:
        run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run.model.enable_input_require_grads()
    run.step()
    verdicts = []
    for run.instrument in ("profile", "spy"):
        verdicts.append([(check.path, check.observed, check.status) for check in run.verify({})])
    assert verdicts[0] == verdicts[1]


def test_math_keeps_its_mask_and_its_dtype_under_autocast(training):
    """Math is no operator below autograd: its inputs are those of the function, as autocast would cast them."""
    run = training(quant=None, dtype="float32")
    mask = torch.ones_like(run.inputs["input_ids"])
    mask[1, 10:] = 0
    run.inputs["attention_mask"] = mask

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            run.step()

    verdicts = []
    for run.instrument in ("profile", "spy"):
        checks = {check.path: (check.observed, check.status) for check in run.verify({}, step)}
        verdicts.append([checks[path] for path in ("attention.backend", "attention.dtype", "attention.mask")])
    assert verdicts[0] == verdicts[1] == [("math", "active"), ("bfloat16", "active"), ("explicit", "active")]


def test_recomputation_is_told_inside_a_closure(training):
    """An optimizer that calls the step itself encloses the backward pass, and recomputation is still seen in it."""
    run = training(quant=None, make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run.model.enable_input_require_grads()

    def closure():
        run.optimizer.zero_grad()
        loss = run.model(**run.inputs, labels=run.inputs["input_ids"]).loss
        loss.backward()
        return loss

    check = run.check("checkpointing", True, lambda: run.optimizer.step(closure))
    assert check.met, check.reason
    assert "2 of 2 blocks computed again" in check.reason


def test_the_mode_follows_backward_into_other_threads():
    """The engine hands its threads the caller's modes: deeply nested backward passes leave the calling thread."""
    threads = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            threads.add(threading.get_ident())
            return func(*args, **kwargs or {})

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, depth):
            ctx.depth = depth
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            if ctx.depth:
                with torch.enable_grad():
                    Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).sum().backward()
            return gradient * 2, None

    with Watch():
        Nested.apply(torch.ones(1, requires_grad=True), 130).sum().backward()
    assert len(threads) > 1


def test_nothing_stays_behind_when_the_step_raises(training):
    """Function, hooks, stance and modes are as before."""
    run = training()
    before = torch.nn.functional.scaled_dot_product_attention

    def step():
        run.step()
        raise RuntimeError("the step broke")

    with pytest.raises(RuntimeError, match="the step broke"):
        run.verify({}, step)
    assert torch.nn.functional.scaled_dot_product_attention is before
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not any(module._forward_pre_hooks for module in run.model.modules())


def test_what_compiled_code_hides_is_left_out(training):
    """Paths that rest on operators are missing rather than failed; the others come from a bare compiled call."""
    run = training(quant=None)
    run.model = torch.compile(run.model, backend="aot_eager")
    run.step()
    required = {"attention.backend": "eager", "compile": True, "checkpointing": True, "lora.learning": True}
    checks = {check.path: check for check in run.verify({**required, "lora.dropout": 0.05})}
    torch._dynamo.reset()
    hidden = {"attention.backend", "attention.dtype", "attention.mask", "base.compute_dtype", "base.gemm_path"}
    hidden |= {"optimizer.fused", "checkpointing", "checkpointing.layers", "packing.isolated"}
    assert set(kernels_check.REQUIREMENTS) - set(checks) == hidden
    assert checks["compile"].met
    assert checks["lora.learning"].met
    assert checks["lora.dropout"].met


def test_code_that_is_not_compiled_yet_can_still_be(training):
    """A compiler that met a dispatch mode would skip the code for good, so none is started under the spy."""
    layer = torch.nn.Linear(4, 4)
    graphs = []
    compiled = torch.compile(layer, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    with spied(CallRecorder(torch.nn.Identity())) as spy:
        compiled(torch.ones(2, 4))
    assert spy.compiled_calls == 1
    assert graphs == []
    compiled(torch.ones(2, 4))
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_flex_attention_is_seen_and_compiles_afterwards():
    """A higher-order operator passes through the mode; what compiles it inside is held, not spoilt."""
    flex_attention = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    query = torch.randn(1, 2, 128, 16)
    with torch.no_grad(), spied(CallRecorder(torch.nn.Identity())) as spy:
        flex_attention(query, query, query)
    assert [call.backend for call in spy.profile(torch.nn.Identity()).attention] == ["flex"]
    assert spy.compiled_calls > 0
    with torch.no_grad():
        assert flex_attention(query, query, query).shape == query.shape
    torch._dynamo.reset()


def test_a_step_without_compiled_code_proves_that(training):
    """No entry into compiled code is evidence; requiring it fails."""
    run = training()
    assert run.check("compile", False).met
    assert run.check("compile", True).status == "absent"


def test_what_only_kernels_tell_is_left_out_on_cuda():
    """TF32 always; attention, update and recomputation where no operator of theirs was called."""
    assert set(blind_to(_profile(), on_cuda=True, compiled=False)) == {"kernels", "update", "attention"}
    call = AttentionCall(op="aten::_scaled_dot_product_flash_attention", backend="flash", direction="forward")
    product = Product(op="bitsandbytes::gemm_4bit", path="unknown", dtype="bfloat16")
    profile = _profile(attention=(call,), writes=(Write(op="aten::_fused_adamw_", tensors=()),), fourbit=(product,))
    assert set(blind_to(profile, on_cuda=True, compiled=False)) == {"kernels", "product_paths"}
    assert blind_to(_profile(), on_cuda=False, compiled=False) == {}


def test_on_a_cpu_missing_operators_stay_unknown():
    """Where a profile could not see more, nothing is left out and nothing passes."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    requirements = {"attention.backend": "flash", "lora.attached": True}
    checks = {c.path: c for c in kernels_check.verify(model, step, requirements, instrument="spy")}
    assert checks["attention.backend"].status == "unknown"
    assert checks["lora.attached"].status == "absent"


def test_arguments_left_at_their_default_are_filled_in():
    """A dispatch mode is not given trailing defaults; a mask passed by keyword is still found."""
    query = torch.randn(1, 2, 8, 16)
    with Spy(CallRecorder(torch.nn.Identity())) as spy:
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        torch.nn.functional.scaled_dot_product_attention(query, query, query, torch.zeros(8, 8))
    calls = spy.profile(torch.nn.Identity()).attention
    assert [(call.mask, call.causal, call.dropout) for call in calls] == [(False, True, 0.0), (True, False, 0.0)]


def test_an_unknown_instrument_is_refused():
    """Before anything runs, with the known ones."""
    with pytest.raises(ValueError, match="'trace' is none of profile, spy"):
        kernels_check.verify(torch.nn.Linear(2, 2), pytest.fail, {}, instrument="trace")


def test_own_work_of_the_check_is_not_seen():
    """Inside ``unseen`` a spy that is the innermost mode is off, and on again afterwards."""
    left = torch.ones(2, 2)
    with spied(CallRecorder(torch.nn.Identity())) as spy:
        left.mm(left)
        with unseen():
            left.mm(left)
        left.mm(left)
    assert [operator.name for operator in spy.operators] == ["aten::mm"] * 2
