"""The optimizer is judged by its class, its operators and the home of its state."""

import bitsandbytes as bnb
import pytest
import torch

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
