"""Whether the adapter is present, runs and learns, with which dtype and which dropout.

The judges cover every PEFT method and every module with an adapter. The modules that the configuration names must have
one, and each module must have been called with its adapter active, enabled and unmerged. Flags read before or after the
call do not prove that.

While lora_B is zero the gradient of lora_A is exactly zero, and other methods also start from zeros. So learning is
judged over all watched calls together, and a zero gradient counts against a parameter only if it arrived after an
update that changed some parameter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kernels_check.check import (
    DTYPE,
    FLAG,
    SHARE,
    Json,
    JudgedPath,
    PathObservation,
    absent,
    count_values,
    failed,
    format_count,
    join_clauses,
    join_values,
    name_some,
    passed,
    undecided,
)

if TYPE_CHECKING:
    from torch import Tensor

    from kernels_check.observe.adapter import AdapterLayer
    from kernels_check.observe.calls import LayerCall
    from kernels_check.observe.learning import ParameterUpdates
    from kernels_check.observe.observation import Observation

NO_ADAPTER = "no layer carries an adapter: get_peft_model was not called, or target_modules matched no module"

_INACTIVE, _DISABLED, _MERGED = "no active adapter", "adapters disabled", "adapters merged into the base"
_REMEDIES = {
    _INACTIVE: "call set_adapter()",
    _DISABLED: "call enable_adapter_layers()",
    _MERGED: "call unmerge_adapter()",
}
_IDLE = "adapter not executed"
_EVALUATED = "adapter executed only in an evaluation, which does not train it,"
_BY_HAND = "adapter executed without gradients, and the update used gradients that were assigned directly,"
BY_HAND = (
    "no forward of the model recorded gradients, and the update used gradients that were assigned directly: whether "
    "they come from these forwards, as in zeroth-order training, or from a copy of the model is unknown"
)
_PARTLY = "part of the calls with gradients skipped the adapter"
_UNSEEN = "called, but the adapter has only parameters and no modules, so without a gradient its use cannot be observed"


def judge_attached(observation: Observation, required: Json) -> PathObservation:
    """Judge ``peft.attached``: every configured adapter is present, active, enabled, not merged, and executed."""
    layers = observation.adapter_layers
    if not layers:
        return PathObservation(observed=False, present=False, reason=NO_ADAPTER)
    states = _find_problems(layers, observation)
    faults: list[str] = []
    doubts: list[str] = []
    for problem in (_INACTIVE, _DISABLED, _MERGED, _IDLE, _EVALUATED, _BY_HAND, _PARTLY, _UNSEEN):
        names = [_describe(layer, problem) for layer in layers if problem in states[layer.name]]
        if names:
            remedy = f" ({_REMEDIES[problem]})" if problem in _REMEDIES else ""
            words = f"{problem} in {len(names)} of {len(layers)} layers: {name_some(names)}{remedy}"
            (doubts if problem in (_BY_HAND, _PARTLY, _UNSEEN) else faults).append(words)
    if any(_BY_HAND in state for state in states.values()):
        doubts.append(BY_HAND)
    if len(faults) == 1 and faults[0].startswith(_IDLE):
        faults.append("the step never calls these modules: choose target_modules that it calls")
    if missing := observation.unmatched_names:
        faults.append(f"requested, but matched nothing: {name_some(missing)} (correct the name, or leave it out)")
    if doubts and not faults:
        return undecided(join_clauses(*doubts))
    adapters = join_values(name for layer in layers for name in layer.held if name) or "of another class"
    good = f"adapter {adapters} enabled, unmerged and executed in {format_count(len(layers), 'layer')}"
    return PathObservation(observed=not faults, reason=join_clauses(*faults, *doubts) or good)


def _describe(layer: AdapterLayer, problem: str) -> str:
    name = layer.name or "the model itself"
    return f"{name} ({', '.join(layer.merged)})" if problem == _MERGED and layer.merged else name


def _find_problems(layers: Sequence[AdapterLayer], observation: Observation) -> dict[str, set[str]]:
    """Problems of each layer, by layer name."""
    names = {id(value): name for name, value in observation.tree.parameters}
    called = {layer.name: calls_that_count(layer, observation) for layer in layers}
    weights = {layer.name: {id(value) for _, value in layer.weights()} for layer in layers}
    owners = Counter(key for held in weights.values() for key in held)
    # A shared parameter proves nothing about one layer, unless the layer has no other parameter and was called.
    alone = {name: {key for key in held if owners[key] == 1} for name, held in weights.items()}
    reached = {
        name: any(
            names.get(key) in observation.reached
            for key in (alone[name] or (held if observation.adapter_calls.get(name) else ()))
        )
        for name, held in weights.items()
    }
    ran = {layer.name: _parts_ran(layer, called[layer.name]) for layer in layers}
    kinds = {type(layer.module) for layer in layers if ran[layer.name]}
    compiled = bool(observation.modules.unhooked or observation.profile.compiled_regions)
    states = {}
    for layer in layers:
        calls = called[layer.name]
        state = _problems(layer, calls)
        is_nested = any(layer.name.startswith(f"{other.name}.") for other in layers if other is not layer)
        # A gradient may come from a penalty on the weights: if the parts of other layers ran, this layer's must run
        # too.
        by_gradient = reached[layer.name] and (
            type(layer.module) not in kinds or (not calls and (compiled or is_nested))
        )
        if state & {_INACTIVE, _DISABLED, _MERGED}:
            state |= {_IDLE}
        elif not ran[layer.name] and not by_gradient:
            bare = bool(calls) and not any(True for _ in layer.factors())
            trains = any(value.requires_grad for _, value in layer.weights())
            ran_parts = _parts_ran(layer, observation.adapter_calls.get(layer.name, ()))
            unseen = bare and not (trains and observation.reached)
            state |= {
                _UNSEEN
                if unseen
                else _IDLE
                if not ran_parts
                else _BY_HAND
                if is_trained_by_hand(observation)
                else _EVALUATED
            }
        states[layer.name] = state
    return states


def calls_that_count(layer: AdapterLayer, observation: Observation) -> list[LayerCall]:
    """The calls that train a layer: those with gradients if there are any. References and evaluations are left out.

    A step that trains nothing, such as answering a request, keeps all its calls.
    """
    everything = observation.adapter_calls.get(layer.name, [])
    trains = observation.optimizer_steps or observation.other_optimizers or _records_gradients(observation)
    counted = [call for call in everything if not (trains and call.without_training)]
    return [call for call in counted if call.with_gradients] or counted


def is_trained_by_hand(observation: Observation) -> bool:
    """Whether an update used gradients that no forward pass through the adapter can have produced."""
    by_hand = any(not gradient.produced for gradient in observation.gradients.values())
    return bool(
        observation.optimizer_steps and by_hand and any(observation.adapter_calls.values())
    ) and not _records_gradients(observation)


def _records_gradients(observation: Observation) -> bool:
    return any(not call.without_training for calls in observation.adapter_calls.values() for call in calls)


def _problems(layer: AdapterLayer, calls: Sequence[LayerCall]) -> set[str]:
    """Why the calls of a layer did not use the adapter; if no call was recorded, why the layer would not use it."""
    if any(call.adapted for call in calls):
        return set() if all(call.adapted for call in calls) else {_PARTLY}
    flags = {
        _INACTIVE: not any(call.active for call in calls) if calls else not layer.adapters,
        _DISABLED: any(call.disabled for call in calls) if calls else layer.disabled,
        _MERGED: any(call.merged for call in calls) if calls else bool(layer.merged),
    }
    return {problem for problem, found in flags.items() if found} or ({_DISABLED} if calls else set())


def _parts_ran(layer: AdapterLayer, calls: Iterable[LayerCall]) -> bool:
    factors = {name for name, _ in layer.factors()}
    return any(call.adapted and not factors.isdisjoint(call.ran) for call in calls)


_LORA_FA = "peft.optimizers.lorafa.LoraFAOptimizer"
"""Freezes lora_A but still receives it as a parameter: the update of lora_B needs its value."""
_COMPARABLE = 1e-3
"""Share of the highest learning rate. Below it, the low rate, not a small gradient, keeps a parameter unchanged."""
_REPACKED = (
    "bitsandbytes repacked them for AVX512-BF16 in an evaluating forward, and a product with repacked weights has no "
    "backward pass: load the base again, and set support_avx512bf16_for_cpu=False on every Linear4bit before the first "
    "evaluation"
)
_NO_STEP = (
    "whether the adapter learns is unknown; let the step end in optimizer.step(): Trainer wants "
    "current_gradient_accumulation_steps set, and Accelerate's optimizer does not step until accelerator.sync_gradients"
)


def judge_learning(observation: Observation, required: Json) -> PathObservation:
    """Judge ``peft.learning``."""
    if not observation.adapter_layers:
        return PathObservation(observed=False, present=False, reason=NO_ADAPTER)
    everything = observation.trained_parameters
    of_lora_fa = {
        key for optimizer in observation.optimizers if _LORA_FA in optimizer.classes for key in optimizer.parameters
    }
    by_optimizer = [name for name, value in everything.items() if not value.requires_grad and id(value) in of_lora_fa]
    judged = {name: value for name, value in everything.items() if name not in by_optimizer}
    if not judged:
        return failed("0 parameters of the adapter are trainable: no adapter is active")
    note = f"; {len(by_optimizer)} of {len(everything)} kept frozen by LoRA-FA" if by_optimizer else ""
    faults, doubts = _gradient_faults(judged, observation)
    calls = observation.modules
    cut = dict.fromkeys(calls.all[number].name for number in sorted(calls.relevant) if calls.all[number].cut)
    if cut:
        faults.insert(0, f"the gradient was lost in {len(cut)} 4-bit layers: {name_some(cut)}; {_REPACKED}")
    if observation.after.packed and (
        observation.modules.unhooked or observation.profile.compiled_regions
    ):  # compiled code calls no hooks
        doubts.append(f"4-bit weights are repacked, and it is unknown whether a gradient passes through; {_REPACKED}")
    if not observation.optimizer_steps and not observation.other_optimizers:
        return _judge_without_optimizer(judged, faults, observation)
    update_faults, update_doubts = _update_faults(judged, observation)
    faults += update_faults
    doubts += update_doubts
    if faults:
        if any(not value.requires_grad for value in judged.values()):
            doubts.append("remedy: load the adapter with is_trainable=True, and freeze the base before it is attached")
        return failed(join_clauses(*faults, *doubts) + note)
    if doubts:
        return undecided(join_clauses(*doubts) + note)
    not_learnt = [name for name in judged if not observation.updates[name].learnt]
    hidden = f"{len(not_learnt)} of {len(judged)} by less than float32 shows, as another factor has just left zero"
    reason = (
        f"gradients reached {len(judged)} of {len(everything)} trainable parameters and updates moved all of them, in "
        f"{observation.optimizer_steps} updates"
    )
    return passed(join_clauses(reason, hidden if not_learnt else "") + note)


def _gradient_faults(judged: Mapping[str, Tensor], observation: Observation) -> tuple[list[str], list[str]]:
    trainable = [name for name, value in judged.items() if value.requires_grad]
    reached = [name for name in trainable if name in observation.gradients]
    zero = [name for name in reached if not observation.gradients[name].nonzero]
    rare = {name for name in zero if name in observation.token_parameters}
    unproven = [name for name in zero if name not in rare and not observation.gradients[name].after_updates]
    faults = _count(
        judged,
        ("frozen", [name for name in judged if name not in trainable]),
        ("without gradient", [name for name in trainable if name not in observation.gradients]),
        ("gradient always zero", [name for name in zero if name not in unproven and name not in rare]),
        (
            "gradient from outside their layers, such as a penalty on the weights, and none from the loss",
            [name for name in reached if name in observation.reached_outside],
        ),
        ("gradient not finite", [name for name in reached if not observation.gradients[name].finite]),
    )
    doubts = _count(
        judged,
        (
            "gradient zero in all calls before the first effective update, as if another factor starts at zero",
            unproven,
        ),
        ("gradient zero: none of their tokens was in the batches", sorted(rare)),
        (
            "gradient assigned directly: its origin is unknown",
            [name for name in reached if not observation.gradients[name].produced],
        ),
    )
    return faults, doubts


def _judge_without_optimizer(
    judged: Mapping[str, Tensor], faults: list[str], observation: Observation
) -> PathObservation:
    changed = [name for name in judged if name in observation.changed]
    reason = f"no torch.optim.Optimizer stepped in {format_count(observation.calls, 'call')}"
    if faults:
        return failed(join_clauses(*faults, reason))
    if changed:
        return undecided(
            f"{reason}, although {len(changed)} of {len(judged)} parameters changed: an optimizer of another kind, "
            "whose updates cannot be distinguished from other writes"
        )
    return undecided(f"{reason}: {_NO_STEP}")


def _update_faults(judged: Mapping[str, Tensor], observation: Observation) -> tuple[list[str], list[str]]:
    """Faults and doubts about the updates of parameters that a gradient reached."""
    live = [name for name, value in judged.items() if value.requires_grad]
    with_gradient = [name for name in live if name in observation.gradients and observation.gradients[name].nonzero]
    known: dict[str, ParameterUpdates] = {
        name: observation.updates[name] for name in live if name in observation.updates
    }
    missing = [name for name in live if id(judged[name]) not in observation.optimized]
    elsewhere = [name for name in missing if name in known and known[name].written and name in observation.changed]
    unreadable = [name for name in live if name in known and known[name].unreadable]
    updated = [name for name in with_gradient if name not in missing and name in known and name not in unreadable]
    zero_rate = [name for name in live if name not in missing and name in known and known[name].has_zero_rate]
    all_rates_zero = bool(zero_rate) and all(
        rate == 0 for optimizer in observation.optimizers for rate in optimizer.learning_rates
    )
    idling = [name for name in updated if known[name].idling]
    moving = [name for name in updated if name not in (*zero_rate, *idling)]
    highest = max((updates.rate for updates in known.values()), default=0.0)
    rounded_away = [name for name in moving if known[name].rounded_away and known[name].rate >= highest * _COMPARABLE]
    rounded = [
        name for name in moving if known[name].ineffective and not known[name].learnt and name not in rounded_away
    ]
    without_gradient = [name for name in moving if not known[name].updates_with_gradient]
    decayed = [name for name in without_gradient if known[name].moved]
    excused = {*rounded_away, *rounded, *without_gradient}
    faults = _count(
        judged,
        ("not given to the optimizer", [name for name in missing if name not in elsewhere]),
        ("learning rate 0", [] if all_rates_zero else zero_rate),
        (
            "unchanged, or nearly, by updates that had a gradient and a learning rate: they round away in "
            f"{join_values(_dtype(judged[name]) for name in rounded)}, keep the adapter in float32",
            rounded,
        ),
        ("unchanged by updates", [name for name in moving if not known[name].moved and name not in excused]),
        ("moved only by weight decay or momentum: their gradient was missing or zero at the update", decayed),
        (
            "gradient missing or zero at the update",
            [name for name in without_gradient if name not in decayed],
        ),
        (
            "changed back after an update (reloaded, set to zero or overwritten)",
            [name for name in live if name in known and known[name].is_reverted],
        ),
    )
    doubts = _count(
        judged,
        (
            "unchanged, like all others, by updates that had a gradient and a learning rate and do not round away in "
            "float32: the optimizer may be warming up, as RAdamScheduleFree does for four updates, or does nothing",
            idling,
        ),
        ("changed outside of every observed optimizer, such as by a copy of master weights", elsewhere),
        ("missing when the step began", [name for name in live if name not in known]),
        ("not comparable with their earlier values", unreadable),
    )
    if all_rates_zero:
        doubts.append(
            f"the learning rate is 0 for {len(zero_rate)} of {len(judged)} parameters, so that they cannot move"
        )
    return faults, doubts


def _count(judged: Mapping[str, Tensor], *groups: tuple[str, list[str]]) -> list[str]:
    return [f"{len(names)} of {len(judged)} parameters {words}: {name_some(names)}" for words, names in groups if names]


def judge_dtype(observation: Observation, required: Json) -> PathObservation:
    """Judge ``peft.dtype``; copies of base modules that train with the adapter keep the dtype of the base."""
    layers = observation.adapter_layers
    if not layers:
        return absent(NO_ADAPTER)
    copies = _dtypes(layer for layer in layers if layer.copied)
    own = [layer for layer in layers if not layer.copied]
    dtypes = _dtypes(own) if own else copies
    if not dtypes:
        return absent("no adapter is active")
    reason = f"adapter weights: {count_values(dtypes)}"
    reason += f"; copies trained with it: {count_values(copies)}" if own and copies else ""
    return PathObservation(observed=join_values(dtypes), reason=reason)


def _dtypes(layers: Iterable[AdapterLayer]) -> list[str]:
    """The dtype of each weight of these layers; a shared weight counts once."""
    weights = {id(value): value for layer in layers for _, value in layer.weights()}
    return [_dtype(value) for value in weights.values()]


def _dtype(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")


def judge_dropout(observation: Observation, required: Json) -> PathObservation:
    """Judge ``peft.dropout``: the probability that was applied, not the configured one."""
    layers = [layer for layer in observation.adapter_layers if not layer.copied]
    if not layers:
        return absent(NO_ADAPTER)
    if is_trained_by_hand(observation):
        return undecided(BY_HAND)
    unseen = [f"{name}={probability}" for layer in layers for name, probability in layer.unseen_dropouts()]
    if unseen:
        return undecided(f"drawn inside the method's product, where it cannot be observed: {name_some(unseen)}")
    applied = {
        name: _read_dropout(name, dropout, layer, observation) for layer in layers for name, dropout in layer.dropouts()
    }
    if not applied:
        kinds = join_values({type(layer.module).__name__ for layer in layers})
        reason = f"{len(layers)} of {len(layers)} layers have no dropout: {kinds}"
        return PathObservation(observed=0.0, present=False, reason=reason, satisfies=required in (None, 0))
    values = {value for value, _ in applied.values()}
    notes = {note for _, note in applied.values()}
    expected = float(required) if isinstance(required, int | float) else max(values)
    odd = [f"{name} ({note})" for name, (value, note) in applied.items() if value != expected]
    reason = f"{len(applied) - len(odd)} of {len(applied)} layers apply dropout {expected}"
    reason += f"; exceptions: {name_some(odd)}" if odd else f" ({join_values(notes)})"
    reason += "; call model.train() before the step" if any("eval mode" in note for note in notes) else ""
    return PathObservation(
        observed=max(values) if len(values) == 1 else join_values(map(str, values)), reason=reason, satisfies=not odd
    )


def _read_dropout(name: str, part: Any, layer: AdapterLayer, observation: Observation) -> tuple[float, str]:
    calls = [call for call in calls_that_count(layer, observation) if name in call.ran]
    probability = float(getattr(part, "p", 0.0))
    dropped = [call.ran[name] for call in calls]
    if len(set(dropped)) > 1:
        return min(dropped), f"p={max(dropped)} in {dropped.count(max(dropped))} of {len(dropped)} calls only"
    if dropped and dropped[0]:
        return dropped[0], "called in train mode"
    if probability == 0.0:
        return 0.0, type(part).__name__
    if dropped or not part.training:
        return 0.0, f"p={probability} but in eval mode"
    if observation.profile.compiled_regions and observation.drew_random:
        return probability, "compiled, in train mode, and random numbers were drawn"
    return 0.0, f"p={probability} but not called"


PATHS: Mapping[str, JudgedPath] = {
    "peft.attached": JudgedPath(requirement=FLAG, judge=judge_attached),
    "peft.learning": JudgedPath(
        requirement=FLAG,
        judge=judge_learning,
        by_modules=False,
        needs_update=True,
        further_steps=(
            "one step does not show whether its update is kept, nor what learns once lora_B has left zero: open the "
            "same watch around the next step, too"
        ),
    ),
    "peft.dtype": JudgedPath(requirement=DTYPE, judge=judge_dtype, by_modules=False),
    "peft.dropout": JudgedPath(requirement=SHARE, judge=judge_dropout),
}
