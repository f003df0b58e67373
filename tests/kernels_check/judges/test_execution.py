"""Recomputation, compilation and modes are seen in the step, not read from flags."""

from functools import partial

import pytest
import torch
from negative_controls import execution_faults

import kernels_check
from kernels_check.observe.compile import forget_compilations


def _checkpointed(run, **options):
    run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    run.model.enable_input_require_grads()
    return run


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_every_forward(training, reentrant):
    """Every layer is called again, with either implementation; the backend check is not confused by it."""
    run = _checkpointed(training(), use_reentrant=reentrant)
    check = run.check("checkpointing", True)
    assert check.met
    assert check.reason.startswith("2 of 2 blocks computed again in the backward pass")
    assert run.check("attention.backend", "flash").met


def test_a_checkpointing_flag_that_does_nothing_is_caught(training):
    """In eval mode the flag stays on and nothing is recomputed."""
    run = _checkpointed(training(quant=None))
    run.model.eval()
    check = run.check("checkpointing", True)
    assert (check.status, check.observed) == ("fallback", False)
    assert "the flag is on but nothing recomputes in eval" in check.reason


def test_missing_checkpointing_is_absent(training):
    """Neither flag nor recomputation."""
    assert training().check("checkpointing", True).status == "absent"


def test_unwanted_checkpointing_is_a_fallback(training):
    """A step that recomputes is not a step without checkpointing."""
    check = _checkpointed(training()).check("checkpointing", False)
    assert (check.status, check.observed) == ("fallback", True)


def test_partial_checkpointing_is_named(training):
    """One layer of two is not all of them."""
    run = _checkpointed(training())
    layers = [module for module in run.model.modules() if type(module).__name__ == "LlamaDecoderLayer"]
    layers[1].gradient_checkpointing = False
    check = run.check("checkpointing", True)
    assert (check.status, check.observed) == ("fallback", True)
    assert "only part of the layers" in check.reason
    assert "1 of 2 blocks computed again in the backward pass, without base_model.model.model.layers.1" in check.reason
    assert run.check("checkpointing.layers", 0.5).met
    assert run.check("checkpointing.layers", 0.6).status == "fallback"


def test_eval_mode_is_named(training):
    """The model, and a single module left behind."""
    run = training(quant=None)
    run.model.eval()
    check = run.check("mode", "train")
    assert (check.status, check.observed) == ("fallback", "eval")
    assert "not in train mode: the model itself" in check.reason
    run.model.train()
    odd = next(module for name, module in run.model.named_modules() if name.endswith("layers.0.mlp"))
    odd.training = False
    check = run.check("mode", "train")
    assert (check.status, check.observed) == ("fallback", "mixed")
    assert "layers.0.mlp" in check.reason


def test_mode_is_that_of_the_step(training):
    """What counts is the mode while the step runs, not before or after."""
    run = training(quant=None)

    def step():
        run.model.eval()
        run.step()
        run.model.train()

    assert run.check("mode", "train", step).status == "fallback"
    assert run.check("mode", "eval", step).met


def test_tf32_cannot_run_without_cuda(training):
    """False holds, true is absent, and the flag is quoted; old and new switches mixed do not break it."""
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    run = training()
    assert run.check("tf32", False).met
    check = run.check("tf32", True)
    assert check.status == "absent"
    assert "fp32_precision" in check.reason


def test_compiled_regions_are_counted_and_checks_stay_sound(training):
    """In a compiled model, which calls no hook, the adapter is proved by gradients and nothing is recompiled."""
    from torch._dynamo.utils import counters

    run = training(quant=None)
    inner = run.model
    run.model = torch.compile(inner, backend="aot_eager")
    run.step()
    graphs = counters["stats"]["unique_graphs"]
    requirements = {
        **{"compile": True, "lora.attached": True, "lora.learning": True, "lora.dropout": 0.05, "mode": "train"},
        "attention.dtype": "bfloat16",
    }
    checks = run.verify(requirements)
    assert [(check.path, check.reason) for check in checks if check.required is not None and not check.met] == []
    run.step()
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_a_model_that_is_not_compiled_is_absent(training):
    """No region entered, no compile."""
    assert training().check("compile", True).status == "absent"


_compile = partial(torch.compile, backend="eager", dynamic=False)


class _Broken(torch.nn.Linear):
    """A layer with a statement that no graph can hold."""

    def forward(self, value):
        value = super().forward(value)
        torch._dynamo.graph_break()
        return value * 2


@pytest.fixture
def compiled():
    """Judge ``compile`` of a layer by its last step, after steps of as many rows as given."""

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


def test_a_compiled_model_that_runs_eagerly_is_caught(compiled):
    """The recompile limit sends it back to eager without a word; only look-ups remain."""
    with torch._dynamo.config.patch(recompile_limit=1):
        check = compiled(torch.nn.Linear(4, 4), 3, 4, 5)
    assert (check.status, check.observed) == ("fallback", False)
    assert "ran eagerly" in check.reason
    assert "1 recompiles refused" in check.reason


def test_a_compiled_model_that_runs_eagerly_in_part_is_caught(compiled):
    """One function is given the length for which it was compiled, the other one beyond the limit."""
    layer = torch.nn.Linear(4, 4)
    doubled, shifted = _compile(lambda value: value * 2), _compile(lambda value: value + 1)
    with torch._dynamo.config.patch(recompile_limit=1):
        check = compiled(
            layer, 3, 4, forward=lambda value: doubled(layer(value)).sum() + shifted(layer(value[:3])).sum()
        )
    assert (check.status, check.observed) == ("fallback", False)
    assert "1 compiled regions entered, 2 compiler cache look-ups; 0 of 1 blocks ran in compiled code" in check.reason
    assert "part of the code ran eagerly" in check.reason


def test_a_break_is_named_and_compiled_all_the_same(compiled):
    """In pieces, with the reason and the line; not what is required where no compilation is."""
    check = compiled(_Broken(4, 4), 3)
    assert check.met
    assert check.observed.startswith("in pieces: Call to `torch._dynamo.graph_break()` at judges/test_execution")
    assert check.reason.startswith(
        "2 compiled regions entered, 2 compiler cache look-ups; 1 of 1 blocks ran in compiled"
    )
    assert "in this process so far 1 graph breaks" in check.reason
    assert compiled(_Broken(4, 4), 3, required=False).status == "fallback"


def test_recompilations_are_counted_with_their_guards(compiled):
    """Lengths that change are compiled again, up to the limit."""
    check = compiled(torch.nn.Linear(4, 4), 3, 4, 5)
    assert (check.met, check.observed) == (True, True)
    assert "0 graph breaks, 2 recompiles" in check.reason
    assert "size mismatch at index 0. expected 4, actual 5" in check.reason


def test_one_graph_compiled_once_is_all_there_is(compiled):
    """Nothing is said of breaks where there are none."""
    check = compiled(torch.nn.Linear(4, 4), 3, 3)
    assert (check.met, check.observed) == (True, True)
    assert check.reason.endswith("in this process so far 0 graph breaks, 0 recompiles")


def test_a_layer_whose_mode_changes_between_micro_batches_is_found(training):
    """Every call counts, and not the first."""
    run = training(quant=None)
    execution_faults.two_passes(run)
    assert run.check("mode", "train").met
    execution_faults.forget_a_layer(run)
    check = run.check("mode", "train")
    assert (check.status, check.observed) == ("fallback", "mixed")
    assert "layers.1.self_attn" in check.reason


def test_an_evaluation_or_a_generation_inside_the_step_is_no_alarm(training):
    """Neither records gradients, and neither is what is trained."""
    run = training(quant=None)

    def step():
        run.step()
        run.model.eval()
        with torch.no_grad():
            run.model(**run.inputs)
        run.model.generate(run.inputs["input_ids"][:, :3], max_new_tokens=2, do_sample=False)
        run.model.train()

    requirements = {"mode": "train", "lora.dropout": 0.05, "checkpointing": False, "attention.mask": "causal"}
    checks = run.verify(requirements, step)
    assert [(check.path, check.reason) for check in checks if check.required is not None and not check.met] == []


@pytest.mark.parametrize("kind", ["one_layer", "feed_forward", "loss"])
def test_compiled_in_part_is_not_compiled(training, kind):
    """One layer of two, a part of each, or a helper beside the model."""
    run = training(quant=None)
    getattr(execution_faults, f"compile_{kind}")(run)
    check = run.check("compile", True)
    forget_compilations()
    assert (check.status, check.observed) == (("absent", False) if kind == "loss" else ("fallback", "in part"))


def test_a_compiled_helper_is_no_compiled_model(training):
    """Where none is wanted, a loss of one's own may be compiled all the same."""
    run = training(quant=None)
    execution_faults.compile_loss(run)
    check = run.check("compile", False)
    forget_compilations()
    assert check.met
    assert "1 regions outside of its blocks, as of a loss" in check.reason
