"""Whether the adapter is there and runs, wherever it was asked for.

Every place where an adapter acts is judged: those that were asked for must be there, and each must have been called
with its adapter active, enabled and unmerged in the watched call, which flags before or after it do not show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from kernels_check.check import FLAG, Json, JudgedPath, PathObservation, format_count, join_values, name_some

if TYPE_CHECKING:
    from kernels_check.observe.adapter import AdapterLayer
    from kernels_check.observe.calls import LayerCall
    from kernels_check.observe.observation import Observation

NO_ADAPTER = "no layer carries an adapter: get_peft_model was not called, or target_modules matched no module"

_INACTIVE, _DISABLED, _MERGED = "no active adapter", "adapters disabled", "adapters merged into the base"
_REMEDIES = {
    _INACTIVE: "call set_adapter()",
    _DISABLED: "call enable_adapter_layers()",
    _MERGED: "call unmerge_adapter()",
}
_IDLE = "adapter not executed"
_ASIDE = "adapter executed in an evaluation only, which trains nothing,"
_BY_HAND = "adapter executed without gradients, and the update took some that were put there by hand,"
BY_HAND = (
    "no forward of the model recorded gradients, and the update took some that were put there by hand: whether those "
    "come of these forwards, as in zeroth-order training, or of a copy of the model was not seen"
)
_PARTLY = "part of the calls with gradients skipped the adapter"
_UNSEEN = "called, but the adapter is of bare parameters, which leave no trace where no gradient reaches them"


def judge_attached(seen: Observation, required: Json) -> PathObservation:
    """Judge ``lora.attached``: present, active, enabled, not merged, and executed, wherever it was asked for."""
    layers = seen.adapter_layers()
    if not layers:
        return PathObservation(observed=False, present=False, reason=NO_ADAPTER)
    states = _states(layers, seen)
    faults: list[str] = []
    doubts: list[str] = []
    for problem in (_INACTIVE, _DISABLED, _MERGED, _IDLE, _ASIDE, _BY_HAND, _PARTLY, _UNSEEN):
        names = [_describe(layer, problem) for layer in layers if problem in states[layer.name]]
        if names:
            remedy = f" ({_REMEDIES[problem]})" if problem in _REMEDIES else ""
            words = f"{problem} in {len(names)} of {len(layers)} layers: {name_some(names)}{remedy}"
            (doubts if problem in (_BY_HAND, _PARTLY, _UNSEEN) else faults).append(words)
    if any(_BY_HAND in state for state in states.values()):
        doubts.append(BY_HAND)
    if len(faults) == 1 and faults[0].startswith(_IDLE):
        faults.append("the step never calls these modules with it: choose target_modules that it does")
    missing = seen.unmatched_names()
    if missing:
        faults.append(f"asked for and matched nothing: {name_some(missing)} (mend the name, or leave it out)")
    adapters = join_values(name for layer in layers for name in layer.held if name)
    executed = f"executed in {format_count(len(layers), 'layer')}"
    good = f"adapter {adapters or 'of a class of its own'} enabled, unmerged and {executed}"
    if doubts and not faults:
        return PathObservation(observed=None, status="unknown", reason="; ".join(doubts))
    return PathObservation(observed=not faults, reason="; ".join([*faults, *doubts]) or good)


def _describe(layer: AdapterLayer, problem: str) -> str:
    name = layer.name or "the model itself"
    return f"{name} ({', '.join(layer.merged)})" if problem == _MERGED and layer.merged else name


def _states(layers: Sequence[AdapterLayer], seen: Observation) -> dict[str, set[str]]:
    """What is wrong with each layer, by its name."""
    names = {id(value): name for name, value in seen.tree().parameters}
    called = {layer.name: calls_that_count(layer, seen) for layer in layers}
    weights = {layer.name: {id(value) for _, value in layer.weights()} for layer in layers}
    owners = Counter(key for held in weights.values() for key in held)
    # What layers share proves nothing of one of them, unless a layer has nothing else and was called.
    alone = {name: {key for key in held if owners[key] == 1} for name, held in weights.items()}
    reached = {
        name: any(
            names.get(key) in seen.reached for key in (alone[name] or (held if seen.adapter_calls.get(name) else ()))
        )
        for name, held in weights.items()
    }
    ran = {layer.name: _parts_ran(layer, called[layer.name]) for layer in layers}
    kinds = {type(layer.module) for layer in layers if ran[layer.name]}
    compiled = bool(seen.modules.unhooked or seen.profile.compiled_regions)
    states = {}
    for layer in layers:
        calls = called[layer.name]
        state = _as_it_is(layer) if not calls else _as_called(calls)
        # A gradient may come from a penalty on the weights: where the parts of other layers ran, those of this must.
        by_gradient = reached[layer.name] and (
            type(layer.module) not in kinds or (not calls and (compiled or _is_inside(layer, layers)))
        )
        if state & {_INACTIVE, _DISABLED, _MERGED}:
            state |= {_IDLE}
        elif not ran[layer.name] and not by_gradient:
            bare = bool(calls) and not any(True for _ in layer.factors())
            trains = any(value.requires_grad for _, value in layer.weights())
            aside = _parts_ran(layer, seen.adapter_calls.get(layer.name, ()))
            unseen = bare and not (trains and seen.reached)
            state |= {_UNSEEN if unseen else _IDLE if not aside else _BY_HAND if is_trained_by_hand(seen) else _ASIDE}
        states[layer.name] = state
    return states


def _is_inside(layer: AdapterLayer, layers: Iterable[AdapterLayer]) -> bool:
    """Whether it lies in the place of another adapter."""
    return any(layer.name.startswith(f"{other.name}.") for other in layers if other is not layer)


def calls_that_count(layer: AdapterLayer, seen: Observation) -> list[LayerCall]:
    """Calls of a layer in training, with gradients where there are any: a reference or an evaluation is none of its.

    A step that trains nothing, such as an answer, has no others.
    """
    everything = seen.adapter_calls.get(layer.name, [])
    trains = seen.optimizer_steps or seen.other_optimizers or _records_gradients(seen)
    counted = [call for call in everything if not (trains and call.aside)]
    return [call for call in counted if call.with_gradients] or counted


def is_trained_by_hand(seen: Observation) -> bool:
    """Whether an update took gradients that none of the forwards through the adapter can have given."""
    by_hand = any(not gradient.produced for gradient in seen.gradients.values())
    return bool(seen.optimizer_steps and by_hand and any(seen.adapter_calls.values())) and not _records_gradients(seen)


def _records_gradients(seen: Observation) -> bool:
    return any(not call.aside for calls in seen.adapter_calls.values() for call in calls)


def _as_it_is(layer: AdapterLayer) -> set[str]:
    flags = {_INACTIVE: not layer.adapters, _DISABLED: layer.disabled, _MERGED: bool(layer.merged)}
    return {problem for problem, found in flags.items() if found}


def _as_called(calls: Sequence[LayerCall]) -> set[str]:
    if any(call.adapted for call in calls):
        return set() if all(call.adapted for call in calls) else {_PARTLY}
    flags = {
        _INACTIVE: all(not call.active for call in calls),
        _DISABLED: any(call.disabled for call in calls),
        _MERGED: any(call.merged for call in calls),
    }
    return {problem for problem, found in flags.items() if found} or {_DISABLED}


def _parts_ran(layer: AdapterLayer, calls: Iterable[LayerCall]) -> bool:
    factors = {name for name, _ in layer.factors()}
    return any(call.adapted and not factors.isdisjoint(call.ran) for call in calls)


PATHS: Mapping[str, JudgedPath] = {"lora.attached": JudgedPath(requirement=FLAG, judge=judge_attached)}
