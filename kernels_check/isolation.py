"""Whether records packed into one row see each other: change every second one, and compare the others.

Packing relies on ``position_ids`` that restart at each record, and on a mask that the model derives from them only if
it is given no attention mask and builds no cache. When that fails nothing crashes; the benchmark even gets faster,
because attention over the whole row is cheaper to dispatch than a block mask.

Two forwards decide: in one the even records are changed and the odd ones compared with those of a plain forward, in
the other the reverse. Equality is exact: a masked position contributes an exact zero, and each row of a matrix
product depends on its own input only. Every forward draws the same random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.observe.loss import (
    ModelCall,
    configurations,
    find_tokens,
    special_tokens,
)
from kernels_check.observe.modules import Modes, RandomState, without_repacking
from kernels_check.observe.padding import (
    PADDING,
    PASSED_ON,
    IsolationResult,
    LayoutError,
    Records,
    packed_or_all,
    packs,
    records_of,
)

_LEFT_OUT = ("num_items_in_batch", "logits_to_keep")


class _UnclearError(RuntimeError):
    """Why nothing is known."""


def isolation_of(
    model: nn.Module, calls: Sequence[ModelCall], batch: Mapping[str, Any] | None = None
) -> IsolationResult:
    """Change the records of packed calls, one of each way of calling; the model is left as found.

    Args:
        model: the one that ``calls`` are calls of.
        calls: those of a step, or none.
        batch: packed inputs of ``model(**batch)``, for evaluation, and for training where no call was made.
    """
    if (unfit := _unfit(model)) is not None:
        return IsolationResult(unclear=unfit)
    leaks: list[str] = []
    modes, numbers = Modes(model), RandomState()
    try:
        packed = _packed_calls(model, packed_or_all(calls), batch)
        for call, records in packed:
            with _by_row(model, call.training), torch.compiler.set_stance("force_eager"):
                leaks += _leaks_at(call, records)
    except LayoutError as error:
        return IsolationResult(unclear=str(error), packed=False)
    except _UnclearError as error:
        return IsolationResult(unclear=str(error), leaks=tuple(leaks))
    finally:
        modes.restore()
        numbers.restore()
    if not packed:
        reason = f"no call of the step shows two records in a row, which takes {PASSED_ON}"
        return IsolationResult(unclear=reason, packed=False)
    changed = " and ".join(dict.fromkeys("in train" if call.training else "in eval" for call, _ in packed))
    proof = f"perturbations changed no other logit, {changed}"
    return IsolationResult(records=packed[0][1].count, leaks=tuple(leaks), proof=proof)


def _packed_calls(
    model: nn.Module, calls: Sequence[ModelCall], batch: Mapping[str, Any] | None
) -> list[tuple[ModelCall, Records]]:
    """Calls with two records in a row, one of each way of calling, and those of the batch.

    Raises:
        LayoutError: the batch shows no records, or the step shows none of those that the batch does.
    """
    given = None if batch is None else find_tokens(batch)
    chosen: dict[Any, tuple[ModelCall, Records]] = {}
    for call in calls:
        tokens = find_tokens(call.arguments)
        same = tokens is not None and given is not None and torch.equal(tokens[1].cpu(), given[1].cpu())
        records = records_of(batch if same and batch is not None else call.arguments)
        if records is not None and records.packed:
            way = id(call.module), call.training, call.autocast, tuple(map(_kind, sorted(call.arguments.items())))
            chosen.setdefault(way, (call, records))
    packed = list(chosen.values())
    if batch is None:
        return packed
    records = records_of(batch)
    if records is None or not records.packed:
        raise LayoutError(f"batch shows no two records in a row, which takes {PASSED_ON}")
    if calls and not packed:
        raise LayoutError("no call of the step shows two records in a row, as the batch does: the step packs otherwise")
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    autocast = calls[0].autocast if calls else tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)
    for training in (False,) if packed else (True, False):
        call = ModelCall(module=model, arguments=dict(batch), training=training, gradients=training, autocast=autocast)
        packed.append((call, records))
    return packed


def _kind(argument: tuple[str, Any]) -> Any:
    """What an argument of two calls has in common if the model treats the records of both alike."""
    name, value = argument
    if isinstance(value, Tensor):
        return name, value.dtype, value.dim(), name == "attention_mask" and bool(value.all())
    return name, value if isinstance(value, int | float | str | None) else type(value).__name__


def _leaks_at(call: ModelCall, records: Records) -> list[str]:
    """What leaks in a call, else in those inside it where it returns nothing to compare.

    TRL's trainers let a model return log-probabilities of all tokens but one; the one below its head returns hidden
    states.
    """
    try:
        return list(_leaks(call, records))
    except _UnclearError:
        inside = [one for inner in call.inside for one in inner.matching(packs)]
        if not inside:
            raise
        return [leak for one in inside for leak in _leaks_at(one, records_of(one.arguments) or records)]


def _leaks(call: ModelCall, records: Records) -> Iterator[str]:
    """Phrases for the records that others reach.

    Raises:
        _UnclearError: a difference, or none, proves nothing here.
    """
    found = find_tokens(call.arguments)
    if found is None:
        raise _UnclearError("the model was given no input_ids or inputs_embeds of [rows, tokens]")
    name, tokens = found
    other, drawn = _other_tokens(tokens, call.module), RandomState()

    def logits(changed: Tensor) -> Tensor:
        drawn.restore()
        chosen = changed.unsqueeze(-1) if tokens.dim() == 3 else changed
        return _logits(call, {name: torch.where(chosen, other, tokens)}, tokens.shape)

    numbers = records.numbers.to(tokens.device)
    nothing = torch.zeros_like(numbers, dtype=torch.bool)
    reference = logits(nothing)
    inside = (numbers != PADDING) & (numbers.amax(dim=1, keepdim=True) > 0)
    differing = (other != tokens).any(-1) if tokens.dim() == 3 else other != tokens
    place, size = _places(numbers)
    later = place >= ((size + 1) // 2).clamp(min=1)
    parts = {"the odd records of each row": numbers % 2 == 0, "the even records of each row": numbers % 2 == 1}
    parts |= {"the second half of each record": later} if _is_causal(call.module) else {}
    for words, part in parts.items():  # counted from one
        members = inside & part
        changed = members & differing
        moved = (logits(changed) != reference).any(dim=-1)
        if not bool((moved & members).any()):
            raise _UnclearError(f"changing {words} did not even change its own logits")
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
        mode = "train" if call.training else "eval"
        where = f"{int(leaked.sum())} other tokens, first those of record {first} of row {row}"
        yield f"{mode}: changing {words} changed the logits of {where}"


def _places(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Place of each token in its record, and length of the record, both [rows, tokens]."""
    index = torch.arange(numbers.shape[1], device=numbers.device).expand_as(numbers)
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    place = index - torch.where(begins, index, 0).cummax(dim=1).values
    columns = numbers - PADDING
    lengths = torch.zeros(len(columns), int(columns.max()) + 1, dtype=torch.long, device=columns.device)
    lengths.scatter_add_(1, columns, torch.ones_like(columns))
    return place, lengths.gather(1, columns)


def _is_causal(model: nn.Module) -> bool:
    """Whether later tokens must not reach earlier ones, by the model's own word."""
    causal = any(getattr(one, "is_causal", None) is True for one in model.modules())
    asks = (getattr(type(one), "can_generate", None) for one in model.modules())
    return causal or any(bool(ask()) for ask in asks if callable(ask))


def _other_tokens(tokens: Tensor, model: nn.Module) -> Tensor:
    """Another token of the batch in the place of each; special ones stay, since some mean more than their embedding."""
    if tokens.is_floating_point():
        return tokens.roll(1, -1)
    special = torch.tensor(sorted(special_tokens(configurations(model))), dtype=tokens.dtype, device=tokens.device)
    kept = torch.isin(tokens, special)
    known = tokens[~kept].unique()
    if known.numel() < 2:  # one token over and over: its neighbour must do
        return torch.where(kept, tokens, torch.where(tokens > 0, tokens - 1, tokens + 1))
    following = torch.searchsorted(known, tokens.contiguous(), right=True) % known.numel()
    return torch.where(kept, tokens, known[following])


def _logits(call: ModelCall, changed: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """Logits of each token, [rows, tokens, features].

    Raises:
        _UnclearError: the model raised, or returned nothing of that shape.
    """
    module = _unwrapped(call.module)
    whole = {key: value for key, value in call.arguments.items() if key not in _LEFT_OUT} | dict(changed)
    plain = {key: value for key, value in whole.items() if key != "labels"}
    problem = ""
    for arguments in (plain, whole):  # some models return logits only without labels, others do not run without
        try:
            found = _per_token(_called(module, call, arguments), shape)
        except Exception as error:
            first = str(error).partition("\n")[0]
            problem = f"{type(module).__name__} given {', '.join(arguments)} raised {type(error).__name__}: {first}"
            continue
        if found is not None:
            return found
        problem = problem or (
            f"{type(module).__name__} returned nothing of [rows, tokens] = {list(shape[:2])}: pass a batch for which "
            "it returns the logits of every token"
        )
    raise _UnclearError(problem)


def _unwrapped(module: nn.Module) -> nn.Module:
    """Without what synchronises the processes around it, whose own state a call would move."""
    while isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        module = module.module
    return module


def _called(module: nn.Module, call: ModelCall, arguments: Mapping[str, Any]) -> Any:
    # What fills up as it is read, such as a cache, is used once.
    given = {key: copy.deepcopy(one) if hasattr(one, "get_seq_length") else one for key, one in arguments.items()}
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(call.gradients))
        for kind in ("cpu", "cuda"):
            dtype = dict(call.autocast).get(kind)
            if dtype is not None or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=dtype is not None))
        return module(**given)


def _per_token(output: Any, shape: Sequence[int]) -> Tensor | None:
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    others = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    )
    for value in (logits, *others):
        if isinstance(value, Tensor) and value.is_floating_point():
            if value.dim() >= 3 and tuple(value.shape[:2]) == tuple(shape[:2]):
                return value.detach().flatten(2)
            if value.dim() == 2 and value.shape[0] == shape[0] * shape[1]:
                return value.detach().reshape(shape[0], shape[1], -1)
    return None


@contextmanager
def _by_row(model: nn.Module, training: bool) -> Iterator[None]:
    """Let a token depend on its own row alone, as far as that can be switched; modes are the caller's to put back."""
    model.train(training)
    states = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            module.eval()
        state: Any = getattr(module, "state", None)
        if getattr(state, "threshold", 0.0) and type(module).__module__.startswith("bitsandbytes"):
            states.append((state, state.threshold))
    with without_repacking(model):
        try:
            for state, _ in states:
                state.threshold = 0.0
            yield
        finally:
            for state, threshold in states:
                state.threshold = threshold


def _unfit(model: nn.Module) -> str | None:
    """Why a model cannot be asked by forwards of this process alone."""
    if any(getattr(getattr(one, "config", None), "is_encoder_decoder", False) is True for one in model.modules()):
        return "the inputs of an encoder-decoder show no records, so that packing is not judged"
    sharded = any(type(one).__name__ == "FullyShardedDataParallel" for one in model.modules())
    if sharded or any(type(one).__name__ == "DTensor" or hasattr(one, "ds_id") for one in model.parameters()):
        return (
            "its parameters are sharded over processes, all of which would have to make the same forwards: "
            "probe_isolation(model, batch) before it is sharded"
        )
    return None
