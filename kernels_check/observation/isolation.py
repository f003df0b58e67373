"""Whether records packed into one row see each other: change one, and look at the others.

Packing relies on ``position_ids`` that restart at each record, and on a mask that the model derives from them only if
it is given no attention mask and builds no cache. When that fails nothing crashes; the benchmark even gets faster,
because attention over the whole row is cheaper to dispatch than a block mask. No flag shows it, so the model is asked.
Equality is exact: a masked position contributes an exact zero, and each row of a matrix product depends on its own
input only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.observation.random_state import RandomState
from kernels_check.observation.restore import Modes

_NOT_INPUTS = ("labels", "num_items_in_batch", "logits_to_keep")
"""With labels some models return no logits at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IsolationSeen:
    """What perturbing the records of one batch showed."""

    records: int
    leaks: tuple[str, ...] = ()
    """Perturbations that reached other logits, each as a phrase."""
    unclear: str | None = None
    """Why nothing can be told."""
    packed: bool = True
    """Whether any row holds two records."""


def perturb_records(model: nn.Module, batch: Mapping[str, Any]) -> IsolationSeen:
    """Forward the batch as it is and perturbed, in training and in evaluation; everything is left as found."""
    inputs = {key: value for key, value in batch.items() if key not in _NOT_INPUTS}
    tokens, positions = inputs["input_ids"], inputs["position_ids"]
    records = record_numbers(positions)
    count = int((records.amax(dim=1) + 1).sum())
    if int(records.max()) == 0:
        return IsolationSeen(records=count, unclear="no row of the batch packs two records", packed=False)
    packed_rows = (records.amax(dim=1, keepdim=True) > 0).expand_as(records)
    first = (records == 0) & packed_rows
    last = torch.zeros_like(first)
    last[:, -1] = True
    leaks = []
    with _as_found(model):
        for mode, training in (("train", True), ("eval", False)):
            _set_mode(model, training)
            with torch.set_grad_enabled(training):
                reference = _logits(model, inputs)
                if bool(reference.ne(_logits(model, inputs)).any()):
                    reason = f"{mode}: two forwards of the same batch differ, so a leak cannot be told from noise"
                    return IsolationSeen(records=count, unclear=reason)
                for what, changed in (("the first record", first), ("the last token", last)):
                    perturbed = _logits(model, {**inputs, "input_ids": _perturb(tokens, changed, reference.shape[-1])})
                    difference = (perturbed - reference).abs().amax(dim=-1)
                    if not bool(difference[changed].any()):
                        reason = f"{mode}: changing {what} did not even change its own logits"
                        return IsolationSeen(records=count, unclear=reason)
                    elsewhere = difference.masked_fill(changed, 0.0)
                    leaked = elsewhere.ne(0)  # a NaN counts as a leak
                    if bool(leaked.any()):
                        leaks.append(
                            f"{mode}: changing {what} changed the logits of {int(leaked.sum())} other tokens "
                            f"by up to {float(elsewhere.max()):.2g}"
                        )
    return IsolationSeen(records=count, leaks=tuple(leaks))


def record_numbers(positions: Tensor) -> Tensor:
    """Number the records of each row from 0; a record starts wherever the position does not continue.

    Args:
        positions: position ids, [rows, tokens].
    """
    starts = torch.zeros_like(positions, dtype=torch.long)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return starts.cumsum(dim=1)


def _perturb(tokens: Tensor, where: Tensor, vocabulary: int) -> Tensor:
    return torch.where(where, (tokens + 1) % vocabulary, tokens)


def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    output: Any = model(**inputs)
    logits: Tensor = output.logits
    return logits.detach()


def _set_mode(model: nn.Module, training: bool) -> None:
    """Random masks would hide the comparison, so dropout stays off in both modes."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Put modes and random numbers back, and keep bitsandbytes from repacking weights.

    On a CPU with AVX512_BF16 an eval forward rewrites Linear4bit weights in place, after which gradients no longer pass
    through the layer; the switch is an attribute of each module.
    """
    switches = [module for module in model.modules() if "support_avx512bf16_for_cpu" in vars(module)]
    before: list[Any] = [module.support_avx512bf16_for_cpu for module in switches]
    modes, generators = Modes(model), RandomState()
    try:
        for module in switches:
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module.support_avx512bf16_for_cpu = value
        modes.restore()
        generators.restore()
