"""Faults that train an adapter in part or not at all, and usual code that looks similar and trains all of it.

Faults and healthy variations of training embeddings and norms with an adapter.

Faults and variations of the loss of several passes for one update.
"""

from __future__ import annotations

import threading
from types import MethodType, SimpleNamespace
from typing import Any

import peft
import torch

from kernels_check.observe.adapter import adapter_layers
from kernels_check.selftest import silence_dropout
from negative_controls.small_run import SmallRun, replace_step


def disable_dropout_in_one_pass(run: SmallRun) -> None:
    """Disable the adapter's dropout for the second of two micro-batches only."""

    def passes(run: SmallRun) -> Any:
        run.one_pass()
        silence_dropout(run)
        loss = run.one_pass()
        run.model.train()
        return loss

    run.passes = passes


def multiply_gradient_by_nan(run: SmallRun) -> None:
    """Multiply a gradient by NaN."""
    value = next(value for value in run.model.parameters() if value.requires_grad)
    value.register_hook(lambda gradient: gradient * float("nan"))


def freeze_lora_a(run: SmallRun) -> None:
    """Freeze one of the factors."""
    for name, value in run.model.named_parameters():
        if ".lora_A." in name:
            value.requires_grad_(False)


def use_lora_fa(run: SmallRun) -> None:
    """Train with PEFT's LoRA-FA, whose optimizer freezes lora_A and needs its value."""
    from peft.optimizers import create_lorafa_optimizer

    run.optimizer = create_lorafa_optimizer(run.model, r=4, lora_alpha=8, lr=1e-3)


def minimise_sharpness(run: SmallRun, *, undone: bool = False) -> None:
    """Train with SAM around a torch optimizer; undone: also reload the weights before each step."""

    class Sharpness(torch.optim.Optimizer):
        """Takes the gradient at an uphill point, then steps the base optimizer from the original point."""

        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})
            self.base = torch.optim.SGD(self.param_groups, lr=0.1)
            self.param_groups = self.base.param_groups

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            """Take two passes and an update."""
            with torch.enable_grad():
                loss = closure()
            values = [value for group in self.param_groups for value in group["params"]]
            before = [value.clone() for value in values]
            for value in values:
                value.add_(value.grad, alpha=0.05)
            with torch.enable_grad():
                closure()
            for value, old in zip(values, before, strict=True):
                value.copy_(old)
            self.base.step()
            return loss

    parameters = [value for value in run.model.parameters() if value.requires_grad]
    run.optimizer, run.by_closure = Sharpness(parameters), True
    if undone:
        start, passes = [value.detach().clone() for value in parameters], run.step

        def reloaded() -> None:
            with torch.no_grad():
                for value, old in zip(parameters, start, strict=True):
                    value.copy_(old)
            passes()

        replace_step(run, reloaded)


def step_in_a_thread(run: SmallRun) -> None:
    """Execute the whole step in another thread."""
    original = run.step

    def step() -> None:
        thread = threading.Thread(target=original)
        thread.start()
        thread.join()

    replace_step(run, step)


def share_a_factor(run: SmallRun) -> None:
    """Let two query layers share their lora_A."""
    first, second = _queries(run)
    second.lora_A["default"] = first.lora_A["default"]
    run.optimizer = torch.optim.AdamW([value for value in run.model.parameters() if value.requires_grad], lr=1e-3)


def skip_one_adapter_layer(run: SmallRun) -> None:
    """Share a factor, and call the base layer in place of the second adapter layer."""
    share_a_factor(run)
    _, second = _queries(run)
    second.forward = second.base_layer.forward


def _queries(run: SmallRun) -> list[Any]:
    return [layer.module for layer in adapter_layers(run.model) if layer.name.endswith("q_proj")]


def with_embeddings() -> Any:
    """Return LoRA with fully trained copies of both embeddings, as used for new tokens."""
    return peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", modules_to_save=["embed_tokens", "lm_head"]
    )


def train_the_embedding(run: SmallRun, *, masked: bool = False) -> None:
    """Let both embeddings train, with weight decay.

    Args:
        run: to be changed.
        masked: whether a hook multiplies their gradients by zero, as a token mask without a match does.
    """
    weights = [run.model.get_input_embeddings().weight, run.model.get_output_embeddings().weight]
    for weight in weights:
        weight.requires_grad_(True)
        if masked:
            weight.register_hook(lambda gradient: gradient * 0)
    run.optimizer.add_param_group({"params": weights, "lr": 0.01, "weight_decay": 0.1})


def train_norms(run: SmallRun, *, only: str = "norm.weight", forgotten: bool = False, rate: float = 0.01) -> None:
    """Let norms train, and give them to the optimizer or forget to.

    Args:
        run: to be changed.
        only: suffix of the names of the trained norms.
        forgotten: whether the optimizer is left unchanged.
        rate: their learning rate.
    """
    norms = [value for name, value in run.model.named_parameters() if name.endswith(only)]
    for value in norms:
        value.requires_grad_(True)
    if not forgotten:
        run.optimizer.add_param_group({"params": norms, "lr": rate})


_FIRST, _SECOND = 12, 4
"""Labelled tokens in each row of the two passes."""


def accumulate(
    run: SmallRun,
    *,
    counted: bool = False,
    weighed: bool = False,
    divided: bool = True,
    even: bool = False,
    shifted: bool = True,
) -> None:
    """Take two passes before each update, the second with fewer labelled tokens.

    Args:
        run: to be changed.
        counted: whether each forward gets the number of tokens of both passes.
        weighed: whether each loss is multiplied by its share of the tokens.
        divided: whether each loss is divided by the number of passes, if it is neither counted nor weighed.
        even: whether both passes have the same number of labelled tokens.
        shifted: whether the first token of each row is not a target.
    """
    ids = run.inputs["input_ids"]
    batches = []
    for count in (_FIRST, _FIRST if even else _SECOND):
        labels = ids.clone()
        labels[:, count + shifted :] = -100
        batches.append({"input_ids": ids, "labels": labels})
    total = sum(_targets(batch["labels"], shifted=shifted) for batch in batches)

    def passes(run: SmallRun) -> Any:
        for batch in batches:
            more = {"num_items_in_batch": total} if counted else {}
            loss = run.model(**batch, **more).loss
            share = _targets(batch["labels"], shifted=shifted) / total if weighed else 1.0
            whole = counted or weighed or not divided
            (loss * share if whole else loss / len(batches)).backward()
        return loss

    run.passes = passes


def return_log_probs(run: SmallRun, *, counted: bool = True, weigh: Any = None) -> None:
    """Let the model return log-probabilities of all tokens but one, and compute the loss from them, as TRL's trainers
    do.

    Args:
        run: a run of a PEFT model, after ``accumulate`` or ``pack``.
        counted: whether the loss is over the tokens of all passes; else it is the mean of the means of the passes.
        weigh: a function from log-probabilities to their weights.
    """
    base = run.model.get_base_model()

    def forward(self: Any, *given: Any, labels: Any, **named: Any) -> Any:
        hidden, labels = self.model(*given, **named).last_hidden_state[:, :-1], labels[:, 1:]
        mask = labels != -100
        scores = self.lm_head(hidden).float().log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1))
        return SimpleNamespace(log_probs=scores.squeeze(-1).masked_fill(~mask, 0), label_mask=mask)

    base.forward = MethodType(forward, base)

    def passes(run: SmallRun) -> Any:
        batches = [{"labels": inputs["input_ids"]} | inputs for inputs in (*run.accumulated, run.inputs)]
        total = sum(_targets(batch["labels"], shifted=True) for batch in batches)
        for batch in batches:
            output = run.model(**batch)
            scores = output.log_probs if weigh is None else output.log_probs * weigh(output.log_probs)
            loss = -scores.sum() / (total if counted else output.label_mask.sum() * len(batches))
            loss.backward()
        return loss

    run.passes = passes


def _targets(labels: Any, *, shifted: bool) -> int:
    return int((labels[:, int(shifted) :] != -100).sum())


def prompt() -> Any:
    """Return a learned prompt, after which the first token of each row is a target as well."""
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


def search_along_a_line(run: SmallRun) -> None:
    """Give the optimizer a closure that it evaluates several times for one update."""
    parameters = [value for value in run.model.parameters() if value.requires_grad]
    run.optimizer, run.by_closure = torch.optim.LBFGS(parameters, lr=1e-3, max_iter=3), True
