"""Decides whether records packed into one row affect each other: forward passes change some records, and compare the
others with an unchanged forward pass.

The form of the inputs decides nothing: a model may ignore a mask, read record numbers as ones and zeros, or carry a
recurrent state over a boundary. If isolation fails, nothing crashes; the benchmark even gets faster, because attention
over the whole row is cheaper to dispatch than a block mask.

For each binary digit of the record numbers, one forward pass changes the records with a zero, another those with a one.
Any two records differ in a digit, so the effect of each record on each other one is seen. Equality is exact: a masked
position contributes an exact zero, and each row of a matrix product depends on its own input only. Every forward pass
uses the same random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from kernels_check.check import Check, PathObservation, failed, judge_safely, name_some, passed, undecided
from kernels_check.observe.loss import ModelCall, configurations, find_tokens, special_tokens
from kernels_check.observe.modules import Buffers, Modes, RandomState, without_repacking
from kernels_check.observe.padding import PADDING, LayoutError, Records, find_packed_records

_LEFT_OUT = ("num_items_in_batch", "logits_to_keep")
_SHOWN_BY = "position_ids that restart at each record, seq_idx, cu_seq_lens_q, or an attention_mask of blocks"
_REMEDY = (
    "positions separate records only without a cache (by default there is one) and without a two-dimensional mask: "
    "pass use_cache=False and no attention_mask, or a mask of blocks to a model whose mask ignores positions (OPT); a "
    "recurrent or convolutional state crosses records unless its kernels get their boundaries"
)


class _UnclearError(RuntimeError):
    """Raised if the forward passes do not show whether records are isolated; the message says why."""


def probe_isolation(model: nn.Module, batch: Mapping[str, Any]) -> Check:
    """Check that the records packed in ``batch`` are isolated, in training and in evaluation.

    Args:
        model: called as ``model(**batch)`` in each mode: once, and twice for each binary digit of the record numbers.
        batch: ``input_ids`` of [rows, tokens], and ``position_ids`` that restart at each record, or another input that
            marks records (see ``find_packed_records``); further entries (such as ``use_cache``) are passed on, labels
            only if the model requires them.

    Returns:
        The check of ``packing.isolated`` against True. Parameters, buffers, modes and random numbers are left
        unchanged.
    """
    calls = [ModelCall(module=model, arguments=batch, training=mode, gradients=mode) for mode in (True, False)]
    return judge_safely("packing.isolated", True, lambda: probe_calls(model, calls))


def probe_calls(model: nn.Module, calls: Sequence[ModelCall]) -> PathObservation:
    """The finding of ``packing.isolated``: repeats the ``calls`` with packed records, with some of them changed."""
    leaks: list[str] = []
    counts: list[int] = []
    with ExitStack() as stack:
        for state in (RandomState(), Modes(model), Buffers(model)):
            stack.callback(state.restore)
        try:
            _refuse_unfit(model)
            for call in calls:
                records = find_packed_records(call.arguments)
                if records is not None and records.packed:
                    counts.append(records.count)
                    with _as_called(model, call):
                        leaks += _find_leaks(call.module, call.arguments, records)
        except LayoutError as error:
            return undecided(str(error), present=False)
        except _UnclearError as error:
            if not leaks:
                return undecided(str(error))
    if leaks:
        return failed("; ".join([*leaks, _REMEDY]))
    if not counts:
        return undecided(f"no row of a call that was seen shows two records: a call needs {_SHOWN_BY}", present=False)
    modes = " and ".join(dict.fromkeys("in train" if call.training else "in eval" for call in calls))
    return passed(f"{counts[0]} records: perturbations changed no other logit, {modes}")


def _find_leaks(model: nn.Module, batch: Mapping[str, Any], records: Records) -> Iterator[str]:
    """Describe the first change that reached another record, if there is one.

    Raises:
        _UnclearError: neither a difference nor its absence is conclusive.
    """
    name, tokens = cast("tuple[str, Tensor]", find_tokens(batch))  # the records were read from them
    other, drawn = _other_tokens(tokens, model), RandomState()
    differing = (other != tokens).any(-1) if tokens.dim() == 3 else other != tokens

    def logits(inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        drawn.restore()
        return _logits(model, {**inputs, name: values}, values.shape)

    numbers = records.numbers.to(tokens.device)
    inside = (numbers != PADDING) & (numbers.amax(dim=1, keepdim=True) > 0)
    reference = logits(batch, tokens)
    if not bool((inside & differing).any()) or bool(reference[inside].isnan().any()):
        raise _UnclearError("no token can be changed, or some logits are not a number, so that no change shows")
    for digit, value in product(range(int(numbers.max()).bit_length()), (0, 1)):
        members = inside & ((numbers >> digit) % 2 == value)
        changed, others = members & differing, inside & ~members
        if not bool(changed.any()):  # padding that has positions of its own
            continue
        values = torch.where(changed.unsqueeze(-1) if tokens.dim() == 3 else changed, other, tokens)
        moves = _difference(logits(batch, values), reference)
        moved = moves.any(dim=-1)
        which = name_some(str(number + 1) for number in numbers[members].unique().tolist())
        if not bool((moved & members).any()):
            raise _UnclearError(f"changing records {which} of each row did not change even their own logits")
        suspected = (moved & others).any(dim=1).nonzero().flatten().tolist()
        if suspected and bool(_difference(logits(batch, tokens), reference)[inside].any()):
            raise _UnclearError("two forwards of the same batch differ even with the same random numbers")
        for row in suspected:
            pair, rest = _repeat_row(batch, row, *tokens.shape[:2]), others[row]
            again = _exchange(partial(logits, pair), torch.stack([tokens[row], values[row]]), rest, moves[row, rest])
            if bool(again.any()):
                first = int(numbers[row][moved[row] & rest].min()) + 1
                yield (
                    f"{'train' if model.training else 'eval'}: changing records {which} of row {row} changed the "
                    f"logits of {int(again.any(dim=-1).sum())} other tokens by up to {float(again.abs().max()):.2g}, "
                    f"first those of record {first}"
                )
                return


def _exchange(logits: Callable[[Tensor], Tensor], rows: Tensor, others: Tensor, moves: Tensor) -> Tensor:
    """The moves of the tokens outside the changed records that a change within their own row causes.

    A change may also move them through the batch: experts get groups of another size, which round differently. In a
    batch of the row and the changed row, exchanging both makes a difference only by an effect within the row. If it
    makes none, each row must depend on the other one, or the model treats a batch of two rows in another way.

    Args:
        logits: the logits of a batch of two such rows.
        rows: tokens of the row and of the changed row.
        others: which of its tokens are in other records.
        moves: how their logits moved in the batch itself.

    Raises:
        _UnclearError: neither an effect within the row nor one through the batch explains ``moves``.
    """
    beside = logits(rows)
    again = _difference(logits(rows.flip(0)), beside)[0, others]
    if bool(again.any()):
        is_explained = float((again - moves).norm()) < float(moves.norm())
    else:
        alone = [logits(one.expand_as(rows)) for one in rows.split(1)]
        is_explained = any(bool(_difference(beside[at], one[at]).any()) for at, one in enumerate(alone))
    if not is_explained:
        raise _UnclearError(
            f"a change moved the logits of other records by up to {float(moves.abs().max()):.2g}, but differently in a "
            "batch of two rows: make the forward depend on each row alone"
        )
    return again


def _difference(left: Tensor, right: Tensor) -> Tensor:
    """The difference in float32, zero where both are the same infinity or not a number."""
    is_same = (left == right) | (left.isnan() & right.isnan())
    return torch.where(is_same, 0.0, left.float() - right.float())


def _repeat_row(batch: Mapping[str, Any], row: int, rows: int, tokens: int) -> dict[str, Any]:
    """A batch of twice the given row of a batch."""

    def repeat(name: str, value: Any) -> Any:
        if isinstance(value, dict):  # a mask for each kind of layer
            return {key: repeat(key, one) for key, one in value.items()}
        if isinstance(value, Tensor) and name.startswith("cu_seq"):
            ends = value[(value > row * tokens) & (value <= (row + 1) * tokens)] - row * tokens
            return torch.cat([value[value == 0], ends, ends + tokens])
        axis = 1 if name == "position_ids" and isinstance(value, Tensor) and value.dim() == 3 else 0
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[axis] != rows:
            return value
        return value.index_select(axis, torch.tensor([row, row], device=value.device))

    return {name: repeat(name, value) for name, value in batch.items()}


def _other_tokens(tokens: Tensor, model: nn.Module) -> Tensor:
    """Replace each token by another token of the batch; special tokens that do not begin or end texts stay, since they
    have effects beyond their embedding: padding, and placeholders of images."""
    if tokens.is_floating_point():
        return tokens.roll(1, -1)
    special = sorted(special_tokens(configurations(model), but=("bos", "eos")))
    is_special = torch.isin(tokens, tokens.new_tensor(special))
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
def _as_called(model: nn.Module, call: ModelCall) -> Iterator[None]:
    """The modes and contexts of a call, without features that make a token depend on other rows, where possible; the
    caller restores the modes."""
    if call.module.training != call.training:
        model.train(call.training)
    with without_repacking(model), ExitStack() as stack:
        for module in model.modules():
            # Dropout inside experts would depend on the routing of all tokens.
            if isinstance(module, _BatchNorm | _DropoutNd):
                module.eval()
            state: Any = getattr(module, "state", None)
            if getattr(state, "threshold", 0.0) and type(module).__module__.startswith("bitsandbytes"):
                stack.enter_context(patch.object(state, "threshold", 0.0))
        stack.enter_context(torch.set_grad_enabled(call.gradients))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for kind, dtype in call.autocast:
            stack.enter_context(torch.autocast(kind, dtype=dtype))
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
