"""In which dtype the adapter is kept, and with which dropout it ran, by every method of PEFT.

The probability of a dropout is that of its calls: a module that drops by configuration may be in evaluation, or never
be called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from kernels_check.check import DTYPE, SHARE, Json, JudgedPath, PathObservation, count_values, join_values, name_some
from kernels_check.judges.attached import BY_HAND, NO_ADAPTER, calls_that_count, is_trained_by_hand

if TYPE_CHECKING:
    from kernels_check.observe.adapter import AdapterLayer
    from kernels_check.observe.observation import Observation


def judge_dtype(seen: Observation, required: Json) -> PathObservation:
    """Judge ``lora.dtype``; copies of parts of the base that are trained with the adapter keep the base's."""
    layers = seen.adapter_layers()
    if not layers:
        return PathObservation(observed=None, present=False, reason=NO_ADAPTER)
    copies = [layer for layer in layers if layer.copied]
    own = [layer for layer in layers if not layer.copied] or copies
    dtypes = _dtypes(own)
    if not dtypes:
        return PathObservation(observed=None, present=False, reason="no adapter is active")
    reason = f"adapter weights: {count_values(dtypes)}"
    if copies and own is not copies:
        reason += f"; copies trained with it: {count_values(_dtypes(copies))}"
    return PathObservation(observed=join_values(dtypes), reason=reason)


def _dtypes(layers: Iterable[AdapterLayer]) -> list[str]:
    weights = {id(value): value for layer in layers for _, value in layer.weights()}
    return [str(value.dtype).removeprefix("torch.") for value in weights.values()]


def judge_dropout(seen: Observation, required: Json) -> PathObservation:
    """Judge ``lora.dropout``: the probability that was really applied, not the configured one."""
    layers = [layer for layer in seen.adapter_layers() if not layer.copied]
    if not layers:
        return PathObservation(observed=None, present=False, reason=NO_ADAPTER)
    if is_trained_by_hand(seen):
        return PathObservation(observed=None, status="unknown", reason=BY_HAND)
    unseen = [f"{name}={probability}" for layer in layers for name, probability in layer.unseen_dropouts()]
    if unseen:
        reason = f"drawn inside the method's product, where nothing shows it: {name_some(unseen)}"
        return PathObservation(observed=None, status="unknown", reason=reason)
    applied: dict[str, float] = {}
    notes: dict[str, str] = {}
    for layer in layers:
        for name, dropout in layer.dropouts():
            applied[name], notes[name] = _applied(name, dropout, layer, seen)
    if not applied:
        kinds = join_values({type(layer.module).__name__ for layer in layers})
        reason = f"{len(layers)} of {len(layers)} layers have no dropout: {kinds}"
        return PathObservation(observed=0.0, present=False, reason=reason, satisfies=required in (None, 0))
    values = set(applied.values())
    expected = float(required) if isinstance(required, int | float) else max(values)
    odd = [f"{name} ({notes[name]})" for name, value in applied.items() if value != expected]
    observed: Json = values.pop() if len(values) == 1 else join_values(str(value) for value in values)
    reason = f"{len(applied) - len(odd)} of {len(applied)} layers apply dropout {expected}"
    reason += f"; exceptions: {name_some(odd)}" if odd else f" ({join_values(notes.values())})"
    if any("eval mode" in notes[name] for name in applied):
        reason += "; call model.train() before the step"
    return PathObservation(observed=observed, reason=reason, satisfies=not odd)


def _applied(name: str, part: Any, layer: AdapterLayer, seen: Observation) -> tuple[float, str]:
    calls = [call for call in calls_that_count(layer, seen) if name in call.ran]
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
    if seen.profile.compiled_regions and seen.drew_random:
        return probability, "compiled, in train mode, and random numbers were drawn"
    return 0.0, f"p={probability} but not called"


PATHS: Mapping[str, JudgedPath] = {
    "lora.dtype": JudgedPath(requirement=DTYPE, judge=judge_dtype, by_modules=False),
    "lora.dropout": JudgedPath(requirement=SHARE, judge=judge_dropout),
}
