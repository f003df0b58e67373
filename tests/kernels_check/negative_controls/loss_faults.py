"""Faults and variations of the loss of several passes for one update."""

from __future__ import annotations

from types import MethodType, SimpleNamespace
from typing import Any

from negative_controls.small_run import SmallRun

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
    import peft

    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


def search_along_a_line(run: SmallRun) -> None:
    """Give the optimizer a closure that it evaluates several times for one update."""
    import torch

    parameters = [value for value in run.model.parameters() if value.requires_grad]
    run.optimizer, run.by_closure = torch.optim.LBFGS(parameters, lr=1e-3, max_iter=3), True
