"""Whether the records that a step packs are isolated, by the calls that it made and by a batch that stands for them.

A batch says how the model ought to be called. What the step really passes decides: with a mask of ones or a cache more,
the same tokens leak. So the step's own calls are made once more and perturbed, and the batch adds what the step does
not show, evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.check import name_some
from kernels_check.observe.inputs import ModelCall, find_tokens, names_tokens, training_calls
from kernels_check.observe.packing_isolation import IsolationResult, perturb_records
from kernels_check.observe.records import CUMULATED, PASSED_ON, LayoutError, Records, find_records

_NO_DIFFERENCE = ("labels", "num_items_in_batch", "logits_to_keep", "return_dict", "input_ids", "inputs_embeds")
"""Arguments that may be others without other attention."""
_OWN = "the step's own call"


def isolation_of_batch(
    model: nn.Module, batch: Mapping[str, Any], as_called: ModelCall | None = None
) -> IsolationResult:
    """Perturb a batch of its own, in training and in evaluation.

    Args:
        model: called as ``model(**batch)``.
        batch: packed inputs.
        as_called: a call of the step, whose autocast is used; that of the surroundings where there is none.
    """
    return perturb_records(model, _as_calls(model, batch, as_called))


def isolation_of_step(
    model: nn.Module, calls: Sequence[ModelCall], batch: Mapping[str, Any] | None = None
) -> IsolationResult:
    """Perturb the packed calls of a step, one of each way of calling, and the batch."""
    trained = [one for call in training_calls(calls) for one in call.told(_packs) or call.told(names_tokens) or [call]]
    packed, problem = _packed_calls(trained, batch)
    found = [_named(_perturbed(model, call, records)) for call, records in packed]
    if batch is not None:
        both = _as_calls(model, batch, trained[0] if trained else None)
        found.append(perturb_records(model, both[1:] if packed else both))
    elif not trained:
        return IsolationResult(
            unclear="no call of the model itself was seen: pass batch=, its packed inputs", packed=False
        )
    if not packed and trained:
        found.append(_unpacked(trained, batch, problem))
    joined = _joined(found)
    left = len(trained) - len(packed)
    if packed and left:
        probed = f"{len(packed)} of {len(trained)} calls of the step were probed"
        note = f"{probed}, the others pack nothing or are called alike"
        joined = replace(joined, notes=(*joined.notes, note))
    return joined


def _perturbed(model: nn.Module, call: ModelCall, records: Records | None = None) -> IsolationResult:
    """Perturb a call, or those inside it where it returns nothing to compare, as a model that returns its loss.

    TRL's trainers let a model return log-probabilities of all tokens but one; the model below the head returns its
    hidden states.
    """
    seen = perturb_records(model, [call], records)
    if seen.unclear is None or seen.leaks:
        return seen
    found = [_perturbed(model, one) for inner in call.inside for one in inner.told(_packs)]
    return _joined(found) if found and all(one.unclear is None or one.leaks for one in found) else seen


def _packs(arguments: Mapping[str, Any]) -> bool:
    try:
        records = _records(arguments)
    except LayoutError:
        return False
    return records is not None and records.packed


def _as_calls(model: nn.Module, batch: Mapping[str, Any], as_called: ModelCall | None) -> list[ModelCall]:
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    surroundings = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)
    autocast = surroundings if as_called is None else as_called.autocast
    return [
        ModelCall(module=model, arguments=dict(batch), training=mode, gradients=mode, autocast=autocast)
        for mode in (True, False)
    ]


def _packed_calls(
    calls: Sequence[ModelCall], batch: Mapping[str, Any] | None
) -> tuple[list[tuple[ModelCall, Records]], str | None]:
    """Calls with two records in a row, of each way of calling the one with the most, and what could not be read."""
    chosen: dict[Any, tuple[ModelCall, Records]] = {}
    problem = None
    for place, call in enumerate(calls):
        try:
            records = _records(call.arguments)
            if (records is None or not records.packed) and batch is not None:
                records = _borrowed(call.arguments, batch)
        except LayoutError as error:
            problem = str(error)
            continue
        if records is None or not records.packed:
            continue
        way = _way(call, place)
        if way not in chosen or chosen[way][1].count < records.count:
            chosen[way] = call, records
    return list(chosen.values()), problem


def _records(arguments: Mapping[str, Any]) -> Records | None:
    tokens = find_tokens(arguments)
    return None if tokens is None else find_records(arguments, *tokens[1].shape[:2])


def _borrowed(arguments: Mapping[str, Any], batch: Mapping[str, Any]) -> Records | None:
    """The batch's records for a call of the same tokens."""
    own, given = find_tokens(arguments), find_tokens(batch)
    if own is None or given is None or own[1].shape != given[1].shape or own[1].device != given[1].device:
        return None
    return _records(batch) if torch.equal(own[1], given[1]) else None


def _way(call: ModelCall, place: int) -> Any:
    """What two calls have in common if the model treats the records of both alike."""
    arguments: list[tuple[Any, ...]] = []
    for name, value in sorted(call.arguments.items()):
        if isinstance(value, Tensor):
            blocks = name in CUMULATED or (name == "attention_mask" and value.dim() > 2)  # each is made by hand
            ones = name == "attention_mask" and bool(value.all())
            arguments.append((name, value.dtype, value.dim(), ones, place if blocks else -1))
        else:
            plain = isinstance(value, int | float | str | None)
            arguments.append((name, value if plain else type(value).__name__))
    return id(call.module), call.training, call.gradients, call.autocast, tuple(arguments)


def _unpacked(calls: Sequence[ModelCall], batch: Mapping[str, Any] | None, problem: str | None) -> IsolationResult:
    """The step's calls tell no records: it does not pack, or does not tell the model, or just happened not to."""
    reason = problem or f"no call of the step tells of two records in a row, which takes {PASSED_ON}"
    if batch is None:
        return IsolationResult(unclear=reason, packed=False)
    differences = list(dict.fromkeys(one for call in calls for one in _differences(call.arguments, batch)))
    if problem is None and not differences:
        return IsolationResult(notes=("the step's own rows held a record each",))
    return IsolationResult(
        unclear=f"the step calls the model otherwise than batch: {name_some([*differences, reason], '; ')}"
    )


def _differences(arguments: Mapping[str, Any], batch: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*arguments, *batch} - set(_NO_DIFFERENCE)):
        own, given = (_spelled(one.get(name)) for one in (arguments, batch))
        if own != given and not name.startswith("output_"):
            yield f"{name} is {own} in the step and {given} in batch"


def _spelled(value: Any) -> str:
    if isinstance(value, Tensor):
        ones = " of ones" if not value.is_floating_point() and bool((value == 1).all()) else ""
        return f"a tensor of {value.dim()} dimensions{ones}"
    return (
        "not given" if value is None else repr(value) if isinstance(value, int | float | str) else type(value).__name__
    )


def _named(seen: IsolationResult) -> IsolationResult:
    unclear = None if seen.unclear is None else f"{_OWN}, {seen.unclear}"
    return replace(seen, leaks=tuple(f"{_OWN}, {leak}" for leak in seen.leaks), unclear=unclear)


def _joined(found: Sequence[IsolationResult]) -> IsolationResult:
    return IsolationResult(
        records=next((seen.records for seen in found if seen.records), 0),
        leaks=tuple(leak for seen in found for leak in seen.leaks),
        unclear="; ".join(seen.unclear for seen in found if seen.unclear is not None) or None,
        packed=any(seen.packed for seen in found),
        probed=tuple(dict.fromkeys(mode for seen in found for mode in seen.probed)),
        notes=tuple(dict.fromkeys(note for seen in found for note in seen.notes)),
    )
