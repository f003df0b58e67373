"""Whether the adapter is there, ran, and learns.

With lora_B at zero the gradient of lora_A is exactly zero at the very first step, so learning is judged over the
watched steps together: a gradient must have reached every factor at some step, and every lora_B must have moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kernels_check.check import DTYPE, FLAG, SHARE, Finding, Json, JudgedPath, count_values, join_values, name_some

if TYPE_CHECKING:
    from kernels_check.observation.adapter_layers import LoraLayer
    from kernels_check.observation.observe import Observation

_NO_ADAPTER = "no layer carries a LoRA adapter: get_peft_model was not called, or target_modules matched no module"


def judge_attached(seen: Observation, required: Json) -> Finding:
    """Judge ``lora.attached``: present, active, enabled, not merged, and executed."""
    layers = seen.lora_layers()
    if not layers:
        return Finding(observed=False, present=False, reason=_NO_ADAPTER)
    merged = [f"{layer.name} {layer.merged}" for layer in layers if layer.merged]
    faults = [
        f"{problem} in {len(names)} of {len(layers)} layers: {name_some(names)} ({remedy})"
        for problem, names, remedy in (
            ("no active adapter", [layer.name for layer in layers if not layer.adapters], "call set_adapter()"),
            ("adapters disabled", [layer.name for layer in layers if layer.disabled], "call enable_adapter_layers()"),
            ("adapters merged into the base", merged, "call unmerge_adapter()"),
        )
        if names
    ]
    idle = [layer.name for layer in layers if not _ran(layer, seen)]
    if idle:
        faults.append(f"lora_A not executed in {len(idle)} of {len(layers)} layers: {name_some(idle)}")
        if len(faults) == 1:
            faults.append("the step never calls these modules: choose target_modules that it does")
    adapters = join_values(name for layer in layers for name in layer.adapters)
    good = f"adapter {adapters} enabled, unmerged and executed in {len(layers)} layers"
    return Finding(observed=not faults, reason="; ".join(faults) or good)


def judge_learning(seen: Observation, required: Json) -> Finding:
    """Judge ``lora.learning``."""
    layers = seen.lora_layers()
    if not layers:
        return Finding(observed=False, present=False, reason=_NO_ADAPTER)
    factors = {name: weight for layer in layers for letter in "AB" for name, weight in layer.weights(letter)}
    second = [name for layer in layers for name, _ in layer.weights("B")]
    updated = {identity for optimizer in seen.optimizers for identity in optimizer.parameters}
    groups = (
        ("no active factor", [] if factors else [layer.name for layer in layers]),
        ("frozen", [name for name, weight in factors.items() if not weight.requires_grad]),
        ("without gradient", [name for name in factors if name not in seen.gradients]),
        ("gradient always zero", [n for n in factors if n in seen.gradients and not seen.gradients[n].nonzero]),
        ("gradient not finite", [n for n in factors if n in seen.gradients and not seen.gradients[n].finite]),
        ("not given to the optimizer", [name for name, weight in factors.items() if id(weight) not in updated]),
    )
    total = len(factors)
    faults = [f"{len(names)} of {total} factors {problem}: {name_some(names)}" for problem, names in groups if names]
    unmoved = [name for name in second if name not in seen.changed]
    if not faults and unmoved and all(rate == 0 for seen_by in seen.optimizers for rate in seen_by.learning_rates):
        reason = f"gradients reach all {len(factors)} factors, but the learning rate is 0 so that lora_B cannot move"
        return Finding(observed=None, status="unknown", reason=reason)
    if unmoved:
        faults.append(f"lora_B unchanged in {len(unmoved)} of {len(second)} layers: {name_some(unmoved)}")
    if any(not weight.requires_grad for weight in factors.values()):
        faults.append("remedy: load the adapter with is_trainable=True, and freeze the base before it is attached")
    good = f"gradients reached all {len(factors)} factors and every lora_B moved in {seen.optimizer_steps} updates"
    return Finding(observed=not faults, reason="; ".join(faults) or good)


def judge_dtype(seen: Observation, required: Json) -> Finding:
    """Judge ``lora.dtype``."""
    layers = seen.lora_layers()
    dtypes = [
        str(weight.dtype).removeprefix("torch.")
        for layer in layers
        for letter in "AB"
        for _, weight in layer.weights(letter)
    ]
    if not dtypes:
        return Finding(observed=None, present=False, reason=_NO_ADAPTER if not layers else "no adapter is active")
    return Finding(observed=join_values(dtypes), reason=f"adapter weights: {count_values(dtypes)}")


def judge_dropout(seen: Observation, required: Json) -> Finding:
    """Judge ``lora.dropout``: the probability that was really applied, not the configured one."""
    applied: dict[str, float] = {}
    notes: dict[str, str] = {}
    for layer in seen.lora_layers():
        for name, dropout in layer.dropouts():
            applied[name], notes[name] = _applied(name, dropout, seen)
    if not applied:
        return Finding(observed=None, present=False, reason=_NO_ADAPTER)
    values = set(applied.values())
    expected = float(required) if isinstance(required, int | float) else max(values)
    odd = [f"{name} ({notes[name]})" for name, value in applied.items() if value != expected]
    observed: Json = values.pop() if len(values) == 1 else join_values(str(value) for value in values)
    reason = f"{len(applied) - len(odd)} of {len(applied)} layers apply dropout {expected}"
    reason += f"; exceptions: {name_some(odd)}" if odd else f" ({join_values(notes.values())})"
    if any("eval mode" in notes[name] for name in applied):
        reason += "; call model.train() before the step"
    return Finding(observed=observed, reason=reason, satisfies=not odd)


def _ran(layer: LoraLayer, seen: Observation) -> bool:
    """Counted calls prove it; in a compiled model, which calls no hook, gradients do."""
    reached = any(name in seen.gradients for name, _ in layer.weights("B"))
    return not layer.disabled and not layer.merged and (layer.was_called(seen.modules) or reached)


def _applied(name: str, part: Any, seen: Observation) -> tuple[float, str]:
    probability = float(getattr(part, "p", 0.0))
    if probability == 0.0:
        return 0.0, type(part).__name__
    if not seen.modes.get(name, False):
        return 0.0, f"p={probability} but in eval mode"
    if seen.modules.ran(name):
        return probability, "called in train mode"
    if seen.profile.compiled_regions and seen.drew_random:
        return probability, "compiled, in train mode, and random numbers were drawn"
    return 0.0, f"p={probability} but not called"


PATHS: Mapping[str, JudgedPath] = {
    "lora.attached": JudgedPath(requirement=FLAG, judge=judge_attached),
    "lora.learning": JudgedPath(requirement=FLAG, judge=judge_learning),
    "lora.dtype": JudgedPath(requirement=DTYPE, judge=judge_dtype),
    "lora.dropout": JudgedPath(requirement=SHARE, judge=judge_dropout),
}
