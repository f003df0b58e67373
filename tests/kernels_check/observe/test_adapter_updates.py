"""Tests that usual training code counts as adapter learning, and that code which undoes the update does not."""

import peft
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

BOTH = ("peft.attached", "peft.learning")


def loss(run):
    return run.model(**run.inputs, labels=run.inputs["input_ids"]).loss


def trained(run):
    return {name: value for name, value in run.model.named_parameters() if value.requires_grad}


def judged(run, step=None):
    checks = {check.path: check for check in run.verify(dict.fromkeys(BOTH, True), step)}
    return checks["peft.learning"]


def accumulate(run, every, after=lambda: None):
    done = []

    def step():
        loss(run).backward()
        done.append(1)
        if len(done) % every == 0:
            run.optimizer.step()
            after()
            run.optimizer.zero_grad()

    return step


def warm_up(run):
    return LambdaLR(run.optimizer, lambda step: min(1.0, step / 10)).step


def in_closure(run, keep):
    def closure():
        if not keep:
            run.optimizer.zero_grad()
        found = loss(run)
        found.backward()
        return found

    def step():
        run.optimizer.step(closure)
        if keep:
            run.optimizer.zero_grad()

    return step


def in_backward(run):
    optimizers = {id(value): torch.optim.AdamW([value], lr=1e-3) for value in trained(run).values()}

    def update(value):
        optimizers[id(value)].step()
        optimizers[id(value)].zero_grad()

    for value in trained(run).values():
        value.register_post_accumulate_grad_hook(update)
    return lambda: loss(run).backward()


def lbfgs(run):
    run.optimizer = torch.optim.LBFGS(list(trained(run).values()), lr=1e-2, max_iter=3)
    return in_closure(run, keep=False)


def by_hand(run):
    def step():
        values = list(trained(run).values())
        for value, gradient in zip(values, torch.autograd.grad(loss(run), values), strict=True):
            value.grad = gradient
        run.optimizer.step()

    return step


HEALTHY = {
    "LBFGS": lbfgs,
    "optimizers in the backward pass": in_backward,
    "gradients put there by hand": by_hand,
    "warm-up and accumulation": lambda run: accumulate(run, 2, warm_up(run)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HEALTHY)
def test_usual_training_code_is_active(training, name):
    """Usual training code is active, not a fallback and not unknown."""
    run = training(lora_dropout=0.0)
    check = judged(run, HEALTHY[name](run))
    assert check.met, check.reason


def test_a_state_that_is_reloaded_every_other_step_is_found(training):
    """The first update alone could be a projection."""
    run, done = training(), []
    run.step()
    kept = {name: value.detach().clone() for name, value in trained(run).items()}

    def step():
        done.append(1)
        if len(done) % 2 == 0:
            for name, value in trained(run).items():
                value.data.copy_(kept[name])
        run.step()

    assert "lost what an update had written" in judged(run, step).reason


def test_master_weights_that_are_copied_back_are_unknown(training):
    """The optimizer steps copies of the parameters."""
    run = training()
    masters = {name: value.detach().clone().requires_grad_() for name, value in trained(run).items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-3)

    def step():
        run.model.zero_grad()
        loss(run).backward()
        for name, value in trained(run).items():
            masters[name].grad = value.grad.clone()
        optimizer.step()
        with torch.no_grad():
            for name, value in trained(run).items():
                value.copy_(masters[name])

    check = judged(run, step)
    assert check.status == "unknown"
    assert "copy of master weights" in check.reason


def test_ranks_that_adalora_takes_away_are_no_loss(training):
    """AdaLoRA itself masks ranks between updates."""
    adapter = peft.AdaLoraConfig(
        **{"init_r": 4, "target_r": 2, "total_step": 100, "tinit": 0, "tfinal": 90, "deltaT": 1},
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    run, done = training(quant=None, dtype="float32", adapter=lambda: adapter), []

    def step():
        run.step()
        done.append(1)
        run.model.base_model.update_and_allocate(len(done))

    check = judged(run, step)
    assert check.met, check.reason
