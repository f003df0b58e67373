"""Whether every trainable parameter of the adapter learns: of each method, of copies trained with it, of magnitudes.

While lora_B is zero the gradient of lora_A is exactly zero, and other methods begin at zeros of their own. So learning
is judged over the watched calls together, and a gradient of zero counts against a parameter only if it arrived after an
update that moved something.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kernels_check.check import FLAG, Json, JudgedPath, PathObservation, format_count, name_some
from kernels_check.judges.attached import NO_ADAPTER

if TYPE_CHECKING:
    from torch import Tensor

    from kernels_check.observe.learning import ParameterUpdates
    from kernels_check.observe.observation import Observation

_LORA_FA = "peft.optimizers.lorafa.LoraFAOptimizer"
"""Freezes lora_A and is given it all the same: the update of lora_B needs its value."""
_COMPARABLE = 1e-3
"""Share of the highest learning rate: below it, the rate and not a small gradient keeps a parameter in place."""
_REPACKED = (
    "bitsandbytes repacked them for AVX512-BF16 in an evaluating forward, and a product with repacked weights has no "
    "backward pass: load the base again, and set support_avx512bf16_for_cpu=False on every Linear4bit before the first "
    "evaluation"
)
_NO_STEP = (
    "whether the adapter learns is unknown; let the step end in optimizer.step(): Trainer wants "
    "current_gradient_accumulation_steps set, and Accelerate's optimizer does not step until accelerator.sync_gradients"
)


def judge_learning(seen: Observation, required: Json) -> PathObservation:
    """Judge ``lora.learning``."""
    if not seen.adapter_layers():
        return PathObservation(observed=False, present=False, reason=NO_ADAPTER)
    everything = seen.trained_parameters()
    frozen = [name for name, value in everything.items() if not value.requires_grad]
    by_optimizer = [name for name in frozen if _kept_by_lora_fa(everything[name], seen)]
    judged = {name: value for name, value in everything.items() if name not in by_optimizer}
    if not judged:
        return PathObservation(observed=False, reason="0 parameters of the adapter are trainable: no adapter is active")
    note = f"; {len(by_optimizer)} of {len(everything)} kept frozen by LoRA-FA" if by_optimizer else ""
    faults, doubts = _gradient_faults(judged, seen)
    faults = [*_lost_in_the_base(seen), *faults]
    if seen.after.packed and not _shows_every_layer(seen):
        doubts.append(f"4-bit weights are repacked, and whether a gradient passes through was not seen; {_REPACKED}")
    if not seen.optimizer_steps and not seen.other_optimizers:
        return _without_optimizer(judged, faults, seen)
    more = _update_faults(judged, seen)
    faults, doubts = [*faults, *more[0]], [*doubts, *more[1]]
    if faults:
        if any(not value.requires_grad for value in judged.values()):
            doubts.append("remedy: load the adapter with is_trainable=True, and freeze the base before it is attached")
        return PathObservation(observed=False, reason="; ".join([*faults, *doubts]) + note)
    if doubts:
        return PathObservation(observed=None, status="unknown", reason="; ".join(doubts) + note)
    count = f"{len(judged)} of {len(everything)} trainable parameters"
    reason = f"gradients reached {count} and updates moved all of them, in {seen.optimizer_steps} updates"
    faint = [name for name in judged if not seen.updates[name].learnt]
    if faint:
        reason += (
            f"; {len(faint)} of {len(judged)} by less than float32 shows, next to a factor that has just left zero"
        )
    return PathObservation(observed=True, reason=reason + note)


def _kept_by_lora_fa(value: Tensor, seen: Observation) -> bool:
    return any(_LORA_FA in optimizer.classes and id(value) in optimizer.parameters for optimizer in seen.optimizers)


def _gradient_faults(judged: Mapping[str, Tensor], seen: Observation) -> tuple[list[str], list[str]]:
    trainable = [name for name, value in judged.items() if value.requires_grad]
    reached = [name for name in trainable if name in seen.gradients]
    zero = [name for name in reached if not seen.gradients[name].nonzero]
    rare = {name for name in zero if name in seen.token_parameters()}
    unproven = [name for name in zero if name not in rare and not seen.gradients[name].after_updates]
    faults = _count(
        judged,
        ("frozen", [name for name in judged if name not in trainable]),
        ("without gradient", [name for name in trainable if name not in seen.gradients]),
        ("gradient always zero", [name for name in zero if name not in unproven and name not in rare]),
        ("gradient not finite", [name for name in reached if not seen.gradients[name].finite]),
    )
    doubts = _count(
        judged,
        (
            "gradient zero in every call before an update moved anything, as next to a factor that starts at zero",
            unproven,
        ),
        ("gradient zero: none of their tokens was in the batches", sorted(rare)),
        (
            "gradient put there by hand: what it comes from was not seen",
            [name for name in reached if not seen.gradients[name].produced],
        ),
    )
    return faults, doubts


def _lost_in_the_base(seen: Observation) -> list[str]:
    """What is wrong with the gradients of whatever is below a base layer that lets none through."""
    calls = seen.modules
    names = dict.fromkeys(calls.all[number].name for number in sorted(calls.cut & calls.relevant))
    return [f"the gradient was lost in {len(names)} 4-bit layers: {name_some(names)}; {_REPACKED}"] if names else []


def _shows_every_layer(seen: Observation) -> bool:
    """Whether hooks on all modules were called: code that is compiled calls none."""
    return seen.modules.taken and not seen.modules.unhooked and not seen.profile.compiled_regions


def _without_optimizer(judged: Mapping[str, Tensor], faults: list[str], seen: Observation) -> PathObservation:
    changed = [name for name in judged if name in seen.changed]
    reason = f"no torch.optim.Optimizer stepped in {format_count(seen.calls, 'call')}"
    if faults:
        return PathObservation(observed=False, reason="; ".join([*faults, reason]))
    if changed:
        reason += (
            f", although {len(changed)} of {len(judged)} parameters changed: an optimizer of another kind, whose "
            "updates cannot be distinguished from other writing"
        )
        return PathObservation(observed=None, status="unknown", reason=reason)
    return PathObservation(observed=None, status="unknown", reason=f"{reason}: {_NO_STEP}")


def _update_faults(judged: Mapping[str, Tensor], seen: Observation) -> tuple[list[str], list[str]]:
    """What the updates leave to be said of parameters that a gradient reached."""
    given = {identity for optimizer in seen.optimizers for identity in optimizer.parameters}
    live = [name for name, value in judged.items() if value.requires_grad]
    fed = [name for name in live if name in seen.gradients and seen.gradients[name].nonzero]
    known: dict[str, ParameterUpdates] = {name: seen.updates[name] for name in live if name in seen.updates}
    missing = [name for name in live if id(judged[name]) not in given]
    elsewhere = [name for name in missing if name in known and known[name].written and name in seen.changed]
    unreadable = [name for name in live if name in known and known[name].unreadable]
    taken = [name for name in fed if name not in missing and name in known and name not in unreadable]
    resting = [name for name in live if name not in missing and name in known and known[name].resting]
    all_rest = bool(resting) and all(rate == 0 for one in seen.optimizers for rate in one.learning_rates)
    idling = [name for name in taken if known[name].idling]
    moving = [name for name in taken if name not in (*resting, *idling)]
    highest = max((one.rate for one in known.values()), default=0.0)
    faint = [name for name in moving if known[name].faint and known[name].rate >= highest * _COMPARABLE]
    still = [name for name in moving if not known[name].moved and name not in faint]
    rounded = [name for name in moving if known[name].stuck and not known[name].learnt and name not in faint]
    starved = [name for name in moving if not known[name].fed]
    decayed = [name for name in starved if known[name].moved]
    faults = _count(
        judged,
        ("not given to the optimizer", [name for name in missing if name not in elsewhere]),
        ("learning rate 0", [] if all_rest else resting),
        (
            "unchanged, or nearly, by updates that had a gradient and a learning rate: they round away in "
            f"{_dtypes(judged, rounded)}, keep the adapter in float32",
            rounded,
        ),
        ("unchanged by updates", [name for name in still if name not in rounded and name not in starved]),
        ("moved only by weight decay or momentum, their gradient was gone or zero when it was to be used", decayed),
        ("gradient gone or zero when the update was to use it", [name for name in starved if name not in decayed]),
        (
            "lost what an update had written before the next (reloaded, set to zero or written over)",
            [name for name in live if name in known and known[name].lost],
        ),
    )
    doubts = _count(
        judged,
        (
            "unchanged, as all others, by updates that had a gradient and a learning rate and do not round away in "
            "float32: the optimizer may be warming up, as RAdamScheduleFree does for four updates, or makes none",
            idling,
        ),
        ("changed outside of every optimizer that was seen, such as by a copy of master weights", elsewhere),
        ("not there when the step began", [name for name in live if name not in known]),
        ("not comparable with what they were before", unreadable),
    )
    if all_rest:
        doubts.append(
            f"the learning rate is 0 for {len(resting)} of {len(judged)} parameters, so that they cannot move"
        )
    return faults, doubts


def _dtypes(judged: Mapping[str, Tensor], names: list[str]) -> str:
    return ", ".join(sorted({str(judged[name].dtype).removeprefix("torch.") for name in names}))


def _count(judged: Mapping[str, Tensor], *groups: tuple[str, list[str]]) -> list[str]:
    return [f"{len(names)} of {len(judged)} parameters {words}: {name_some(names)}" for words, names in groups if names]


PATHS: Mapping[str, JudgedPath] = {
    "lora.learning": JudgedPath(
        requirement=FLAG,
        judge=judge_learning,
        by_modules=False,
        takes_update=True,
        further_steps=(
            "one step does not show whether its update is kept, nor what learns once lora_B has left zero: open the "
            "same watch around the next step, too"
        ),
    )
}
