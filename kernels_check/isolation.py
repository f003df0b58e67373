"""Tests whether records packed into one row affect each other: changes every second record, and compares the others.

Packing relies on ``position_ids`` that restart at each record, and on a mask that the model derives from them only if
it is given no attention mask and builds no cache. If that fails, nothing crashes; the benchmark even gets faster,
because attention over the whole row is cheaper to dispatch than a block mask.

Two forward passes decide: one changes the even records and compares the odd ones with those of an unchanged forward
pass, the other does the reverse. Equality is exact: a masked position contributes an exact zero, and each row of a
matrix product depends on its own input only. Every forward pass uses the same random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from kernels_check.check import Check, PathObservation, judge_safely, passed, undecided
from kernels_check.observe.loss import ModelCall, configurations, find_tokens, special_tokens
from kernels_check.observe.modules import Modes, RandomState, without_repacking
from kernels_check.observe.padding import (
    PADDING,
    PASSED_ON,
    LayoutError,
    Records,
    find_packed_records,
    has_packed_records,
    packed_or_all,
    report_leaks,
)

if TYPE_CHECKING:
    from kernels_check.observe.observation import Observation

_LEFT_OUT = ("num_items_in_batch", "logits_to_keep")


class _UnclearError(RuntimeError):
    """Raised if the forward passes do not show whether records are isolated; the message says why."""


def probe_isolation(model: nn.Module, batch: Mapping[str, Any]) -> Check:
    """Check that the records packed in ``batch`` are isolated, in training and in evaluation.

    Args:
        model: called as ``model(**batch)``, three times in each mode.
        batch: ``input_ids`` of [rows, tokens], and ``position_ids`` that restart at each record, or another input that
            marks records (see ``find_packed_records``); further entries (such as ``use_cache``) are passed on, labels
            only if the model requires them.

    Returns:
        The check of ``packing.isolated`` against True. Parameters, modes and random numbers are left unchanged.
    """
    calls = [ModelCall(module=model, arguments=batch, training=mode, gradients=mode) for mode in (True, False)]
    return judge_safely("packing.isolated", True, lambda: _probe(model, calls))


def judge_calls(observation: Observation) -> PathObservation:
    """Judge ``packing.isolated`` by forward passes of the step's own packed calls, unless the model's inputs already
    show a leak: a model may ignore its inputs."""
    by_inputs = observation.isolation
    calls = [call for call in packed_or_all(observation.model_calls) if has_packed_records(call.arguments)]
    return _probe(observation.model, calls) if calls and by_inputs.observed is not False else by_inputs


def _probe(model: nn.Module, calls: Sequence[ModelCall]) -> PathObservation:
    modes, numbers = Modes(model), RandomState()
    leaks: list[str] = []
    counts: list[int] = []
    try:
        _refuse_unfit(model)
        for call in calls:
            records = find_packed_records(call.arguments)
            if records is None or not records.packed:
                raise LayoutError(f"no row of the batch shows two records; to show them, a batch needs {PASSED_ON}")
            counts.append(records.count)
            with ExitStack() as stack:
                stack.enter_context(_make_rows_independent(model, call.training))
                stack.enter_context(torch.set_grad_enabled(call.gradients))
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                for kind, dtype in call.autocast:
                    stack.enter_context(torch.autocast(kind, dtype=dtype))
                leaks += _find_leaks(call.module, call.arguments, records)
    except LayoutError as error:
        return undecided(str(error), present=False)
    except _UnclearError as error:
        return report_leaks(leaks) if leaks else undecided(str(error))
    finally:
        modes.restore()
        numbers.restore()
    changed = " and ".join(dict.fromkeys("in train" if call.training else "in eval" for call in calls))
    good = f"{counts[0]} records: perturbations changed no other logit, {changed}"
    return report_leaks(leaks) if leaks else passed(good)


def _find_leaks(model: nn.Module, batch: Mapping[str, Any], records: Records) -> Iterator[str]:
    """Describe each change that reached other records.

    Raises:
        _UnclearError: neither a difference nor its absence is conclusive.
    """
    name, tokens = find_tokens(batch) or ("", None)
    if tokens is None:
        raise _UnclearError("batch has no input_ids or inputs_embeds of [rows, tokens]")
    other, drawn = _other_tokens(tokens, model), RandomState()

    def logits(changed: Tensor) -> Tensor:
        drawn.restore()
        chosen = changed.unsqueeze(-1) if tokens.dim() == 3 else changed
        return _logits(model, {**batch, name: torch.where(chosen, other, tokens)}, tokens.shape)

    numbers = records.numbers.to(tokens.device)
    nothing = torch.zeros_like(numbers, dtype=torch.bool)
    reference = logits(nothing)
    inside = (numbers != PADDING) & (numbers.amax(dim=1, keepdim=True) > 0)
    differing = (other != tokens).any(-1) if tokens.dim() == 3 else other != tokens
    for words, parity in (("the odd records of each row", 0), ("the even records of each row", 1)):  # counted from one
        members = inside & (numbers % 2 == parity)
        changed = members & differing
        moved = (logits(changed) != reference).any(dim=-1)
        if not bool((moved & members).any()):
            raise _UnclearError(f"changing {words} did not change even their own logits")
        leaked = moved & (inside & ~members)
        if not bool(leaked.any()):
            continue
        if bool((logits(nothing) != reference).any()):
            raise _UnclearError("two forwards of the same batch differ even with the same random numbers")
        row = int(leaked.any(dim=1).nonzero()[0])
        outside = changed.clone()
        outside[row] = False
        if bool((logits(outside) != reference)[row].any()):
            raise _UnclearError(
                "changing one row of the batch changes the logits of another, which no attention does (experts of "
                "limited capacity, activations quantised over the batch): make the forward depend on each row alone"
            )
        first = int(numbers[row][leaked[row]].min()) + 1
        mode = "train" if model.training else "eval"
        where = f"{int(leaked.sum())} other tokens, first those of record {first} of row {row}"
        yield f"{mode}: changing {words} changed the logits of {where}"


def _other_tokens(tokens: Tensor, model: nn.Module) -> Tensor:
    """Replace each token by another token of the batch; special tokens stay, since some have effects beyond their
    embedding."""
    if tokens.is_floating_point():
        return tokens.roll(1, -1)
    special = torch.tensor(sorted(special_tokens(configurations(model))), dtype=tokens.dtype, device=tokens.device)
    is_special = torch.isin(tokens, special)
    known = tokens[~is_special].unique()
    if known.numel() < 2:  # only one distinct token: use the adjacent id
        return torch.where(is_special, tokens, torch.where(tokens > 0, tokens - 1, tokens + 1))
    following = torch.searchsorted(known, tokens.contiguous(), right=True) % known.numel()
    return torch.where(is_special, tokens, known[following])


def _logits(model: nn.Module, batch: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
    """Logits of each token, [rows, tokens, features].

    Raises:
        _UnclearError: the model raised an exception, or returned no tensor of that shape.
    """
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module  # calling the wrapper would change its synchronisation state
    whole = {key: value for key, value in batch.items() if key not in _LEFT_OUT}
    plain = {key: value for key, value in whole.items() if key != "labels"}
    problem = ""
    for arguments in (plain, whole):  # some models return logits only without labels, others require labels
        # Inputs that are consumed when read, such as a cache, are used once.
        copies = {key: copy.deepcopy(one) if hasattr(one, "get_seq_length") else one for key, one in arguments.items()}
        try:
            found = _read_token_logits(model(**copies), shape)
        except Exception as error:
            first = str(error).partition("\n")[0]
            problem = f"{type(model).__name__} given {', '.join(arguments)} raised {type(error).__name__}: {first}"
        else:
            if found is not None:
                return found
            problem = problem or (
                f"{type(model).__name__} returned nothing of [rows, tokens] = {list(shape[:2])}: pass a batch for "
                "which it returns the logits of every token"
            )
    raise _UnclearError(problem)


def _read_token_logits(output: Any, shape: Sequence[int]) -> Tensor | None:
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    others = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    )
    rows, tokens = shape[:2]
    for value in (one for one in (logits, *others) if isinstance(one, Tensor) and one.is_floating_point()):
        is_flat = value.dim() == 2 and len(value) == rows * tokens
        if is_flat or (value.dim() >= 3 and value.shape[:2] == (rows, tokens)):
            return value.detach().reshape(rows, tokens, -1)
    return None


@contextmanager
def _make_rows_independent(model: nn.Module, training: bool) -> Iterator[None]:
    """Switch off features that make a token depend on other rows, where possible; the caller restores the modes."""
    model.train(training)
    with without_repacking(model), ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                module.eval()
            state: Any = getattr(module, "state", None)
            if getattr(state, "threshold", 0.0) and type(module).__module__.startswith("bitsandbytes"):
                stack.enter_context(patch.object(state, "threshold", 0.0))
        yield


def _refuse_unfit(model: nn.Module) -> None:
    """Raise for a model that this process cannot judge by its own forward passes."""
    if any(getattr(getattr(one, "config", None), "is_encoder_decoder", False) is True for one in model.modules()):
        raise LayoutError("the inputs of an encoder-decoder show no records, so that packing is not judged")
    sharded = any(type(one).__name__ == "FullyShardedDataParallel" for one in model.modules())
    if sharded or any(type(one).__name__ == "DTensor" or hasattr(one, "ds_id") for one in model.parameters()):
        raise _UnclearError(
            "its parameters are sharded over processes, all of which would have to make the same forwards: "
            "probe_isolation(model, batch) before it is sharded"
        )
