"""The optimizer is judged by its class, its operators and the home of its state."""

import bitsandbytes as bnb
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels_check
from kernels_check.judges.optimizer import is_class

ADAMW = ("torch.optim.adamw.AdamW", "torch.optim.adam.Adam", "torch.optim.optimizer.Optimizer", "builtins.object")


@pytest.mark.parametrize(
    ("classes", "required", "matches"),
    [
        (ADAMW, "torch.optim.AdamW", True),
        (ADAMW, "torch.optim.adamw.AdamW", True),
        (("mine.Tuned", *ADAMW), "torch.optim.AdamW", True),
        (("mine.Tuned", *ADAMW), "mine.Tuned", True),
        (ADAMW, "torch.optim.Adam", False),
        (ADAMW, "bitsandbytes.optim.AdamW", False),
        (ADAMW, "AdamW", False),
        (("bitsandbytes.optim.adamw.AdamW", *ADAMW[2:]), "torch.optim.AdamW", False),
    ],
)
def test_class_rule(classes, required, matches):
    """Package and last component of the most derived class decide; AdamW is no Adam although torch derives it so."""
    assert is_class(classes, required) is matches


def test_the_observed_class_is_its_full_path(training):
    """bitsandbytes' class of the same short name is told apart."""
    run = training(make_optimizer=lambda parameters: bnb.optim.PagedAdamW32bit(parameters, lr=1e-3))
    check = run.check("optimizer.class", "bitsandbytes.PagedAdamW32bit")
    assert check.met
    assert check.observed == "bitsandbytes.optim.adamw.PagedAdamW32bit"
    assert run.check("optimizer.class", "torch.optim.AdamW").status == "fallback"


def test_fused_requested_but_not_built_is_caught(training):
    """The default of a CPU is a loop."""
    check = training().check("optimizer.fused", True)
    assert (check.status, check.observed) == ("fallback", "loop")
    assert "fused=None" in check.reason


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_the_implementation_is_told_from_its_operators(training, kind):
    """One fused operator, or lists of elementwise ones."""
    run = training(make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, **{kind: True}))
    check = run.check("optimizer.fused", kind == "fused")
    assert check.met
    assert check.observed == kind


def test_foreach_outside_the_optimizer_does_not_count(training):
    """Gradient clipping uses foreach operators too."""
    run = training()

    def step():
        run.step()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0, foreach=True)

    assert run.check("optimizer.fused", False, step).observed == "loop"


def test_a_bitsandbytes_optimizer_has_no_fused_switch(training):
    """Its kernels are its own: neither true nor false."""
    run = training(make_optimizer=lambda parameters: bnb.optim.AdamW8bit(parameters, lr=1e-3))
    check = run.check("optimizer.fused", True)
    assert (check.status, check.observed) == ("not_applicable", "bitsandbytes")


def test_a_paged_optimizer_pages_nothing_on_a_cpu(training):
    """The flag says paged; the bytes say zero."""
    run = training(make_optimizer=lambda parameters: bnb.optim.PagedAdamW32bit(parameters, lr=1e-3))
    check = run.check("optimizer.paged_share", 0.5)
    assert (check.status, check.observed) == ("absent", 0.0)
    assert "Paged optimizers are not supported on CPU" in check.reason
    assert run.optimizer.is_paged is True


def test_paged_bytes_are_counted_tensor_by_tensor(training):
    """Only state that is really marked paged counts, by bytes."""

    class HalfPaged(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            for state in self.state.values():
                state["exp_avg"].is_paged = True

    run = training(make_optimizer=lambda parameters: HalfPaged(parameters, lr=1e-3))
    check = run.check("optimizer.paged_share", 0.45)
    assert check.met
    assert 0.49 < check.observed < 0.5
    assert run.check("optimizer.paged_share", 0.9).status == "fallback"


def test_no_optimizer_is_absent(training):
    """A step that updates nothing has no optimizer to judge."""
    run = training()

    def step():
        run.model(**run.inputs, labels=run.inputs["input_ids"]).loss.backward()

    assert run.check("optimizer.class", "torch.optim.AdamW", step).status == "absent"
    check = run.check("lora.learning", True, step)
    assert check.status == "unknown"
    assert "no torch.optim.Optimizer stepped in 8 calls" in check.reason
    assert "current_gradient_accumulation_steps" in check.reason


def _beside(run, own):
    """A step of the run, as far as it trains its own model, and one of another model's AdamW."""
    other = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(other.parameters(), fused=True)

    def step():
        run.step() if own else run.gradients()
        other(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    return step


def test_the_optimizer_of_another_model_is_none_of_this_one(training):
    """Neither by its class nor by what it writes."""
    run = training(quant=None, make_optimizer=lambda given: torch.optim.SGD(given, lr=1e-3))
    checks = {check.path: check for check in run.verify({"optimizer.class": "torch.optim.SGD"}, _beside(run, own=True))}
    assert (checks["optimizer.class"].met, checks["optimizer.class"].observed) == (True, "torch.optim.sgd.SGD")
    assert checks["optimizer.fused"].reason.startswith("0 of 8 parameters updated by fused kernels; 8 aten::add_ in")


def test_where_no_other_optimizer_steps_nothing_is_known_of_the_update(training):
    """It may hold a copy of master weights, or be another model's: no proof, and not said to be none."""
    run = training(quant=None)
    required = {"optimizer.class": "torch.optim.AdamW", "optimizer.fused": True, "optimizer.paged_share": 0.0}
    checks = {check.path: check for check in run.verify(required, _beside(run, own=False))}
    for path in required:
        assert checks[path].status == "unknown"
        assert checks[path].reason.startswith("torch.optim.adamw.AdamW stepped and holds no parameter of the model")
    assert checks["lora.learning"].observed is False
    assert "8 of 8 parameters not given to the optimizer" in checks["lora.learning"].reason
    watched = kernels_check.watch(run.model, required, instrument=run.instrument)
    with watched:
        _beside(run, own=False)()
    checks = {check.path: check for check in watched.checks}
    assert {checks[path].status for path in required} == {"unknown"}
    assert "; so far: torch.optim.adamw.AdamW stepped and holds no" in checks["optimizer.class"].reason


def _split(parameters, **second):
    values = list(parameters)
    return torch.optim.AdamW([{"params": values[:3], "fused": True}, {"params": values[3:], **second}], lr=1e-3)


def test_a_fused_group_beside_one_that_is_not_is_caught(training):
    """The parameters are counted, and the group is named."""
    check = training(make_optimizer=lambda given: _split(given, fused=False)).check("optimizer.fused", True)
    assert (check.status, check.observed) == ("fallback", "fused+loop")
    assert "3 of 8 parameters updated by fused kernels" in check.reason
    assert "not by fused kernels: group 1 of AdamW" in check.reason
    assert training(make_optimizer=lambda given: _split(given, fused=True)).check("optimizer.fused", True).met


def test_each_of_two_optimizers_counts(training):
    """One fused, one that loops; a sound pair passes."""
    for fused in (True, False):
        run = training(quant=None)
        values = [value for value in run.model.parameters() if value.requires_grad]
        run.optimizer = torch.optim.AdamW(values[:4], fused=True)
        other = torch.optim.SGD(values[4:], lr=1e-3, fused=fused)

        def step(run=run, other=other):
            run.step()
            other.step()

        check = run.check("optimizer.fused", True, step)
        assert check.met is fused, check.reason
        assert ("group 0 of SGD" in check.reason) is not fused


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD", "Adagrad"])
@pytest.mark.parametrize("fused", [True, False])
def test_every_optimizer_with_a_fused_version_is_told(training, kind, fused):
    """A loop of plain SGD has no operator of its own, and is seen by what it writes."""
    make = getattr(torch.optim, kind)
    run = training(quant=None, make_optimizer=lambda given: make(given, lr=1e-3, fused=True if fused else None))
    check = run.check("optimizer.fused", fused)
    assert (check.met, check.observed) == (True, "fused" if fused else "loop")


@pytest.mark.parametrize("kind", ["Adafactor", "Muon", "RMSprop"])
def test_what_has_no_fused_version_is_named(training, kind):
    """Nothing can switch it on."""
    make = getattr(torch.optim, kind)
    check = training(quant=None, make_optimizer=lambda given: make(given, lr=1e-3)).check("optimizer.fused", True)
    assert (check.status, check.observed) == ("fallback", "loop")
    assert f"{kind} has no fused version" in check.reason


@pytest.mark.parametrize("fused", [True, False])
def test_a_closure_is_no_update(training, fused):
    """Its forward and backward, and the clipping in it, run inside the optimizer's step."""
    run = training(make_optimizer=lambda given: torch.optim.AdamW(given, lr=1e-3, fused=fused))

    def passes(run):
        loss = run.one_pass()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0, foreach=True)
        return loss

    run.passes, run.by_closure = passes, True
    check = run.check("optimizer.fused", fused)
    assert (check.met, check.observed) == (True, "fused" if fused else "loop"), check.reason


def test_a_gradient_scaler_and_a_wrapper_change_nothing(training):
    """Each hands on to the optimizer that it was given."""
    accelerate = pytest.importorskip("accelerate")
    run = training(quant=None, make_optimizer=lambda given: torch.optim.AdamW(given, lr=1e-3, fused=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    wrapped = accelerate.Accelerator(cpu=True).prepare_optimizer(run.optimizer)

    def scaled():
        run.optimizer.zero_grad()
        scaler.scale(run.model(**run.inputs, labels=run.inputs["input_ids"]).loss).backward()
        scaler.step(run.optimizer)
        scaler.update()

    def accelerated():
        run.gradients()
        wrapped.step()

    for step in (scaled, accelerated):
        check = run.check("optimizer.fused", True, step)
        assert check.met, check.reason
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_an_update_that_nobody_announces_is_unknown(training):
    """By hand, or by an optimizer of another kind: neither fused nor a loop can be told."""
    run = training(quant=None)
    values = [value for value in run.model.parameters() if value.requires_grad]

    def step():
        run.gradients()
        with torch.no_grad():
            for value in values:
                value -= 0.1 * value.grad

    for path, required in {"optimizer.fused": False, "optimizer.class": "torch.optim.SGD"}.items():
        check = run.check(path, required, step)
        assert (check.status, check.observed) == ("unknown", None)
        assert "8 parameters changed" in check.reason


def test_a_step_without_gradients_updates_nothing(training):
    """Then no operator tells how it would."""
    run = training(quant=None)

    def step():
        with torch.no_grad():
            run.model(**run.inputs)
        run.optimizer.zero_grad()
        run.optimizer.step()

    check = run.check("optimizer.fused", False, step)
    assert (check.status, check.observed) == ("unknown", None)
    assert "no parameter had a gradient" in check.reason


def test_an_update_by_kernels_of_a_library_is_unknown(training):
    """An optimizer that writes in a way that no operator shows."""

    class Foreign(torch.optim.Optimizer):
        def __init__(self, given):
            super().__init__(given, {})

        def step(self, closure=None):
            for value in self.param_groups[0]["params"]:
                value.detach().numpy()[...] -= 0.001

    run = training(quant=None, prepare=True, dtype="float32", make_optimizer=Foreign)
    check = run.check("optimizer.fused", False)
    assert (check.status, check.observed) == ("unknown", None)
    assert "Foreign wrote no parameter by an operator" in check.reason


def test_a_dispatch_mode_of_the_program_is_named_where_it_hides_the_update(training):
    """The spy sees below it; a profile does not, and says why."""
    run = training(quant=None)

    def step():
        with FlopCounterMode(display=False):
            run.step()

    check = run.check("optimizer.fused", False, step)
    if run.instrument == "spy":
        assert check.met
    else:
        assert (check.status, check.observed) == ("unknown", None)
        assert "a dispatch mode of the program, as one that counts FLOPs, was active" in check.reason
        assert "wrote no parameter by an operator" not in check.reason
    assert run.check("optimizer.fused", False).met
