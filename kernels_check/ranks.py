"""Observes a few steps of a distributed trial on each rank, and judges the ranks together: data, shards, losses, times.

All ranks observe at the same time, since their steps are collective. ``judges.ranks`` judges the ranks of a watched
step in any training.

Ranks wait for each other in communication, so their step times are similar even if one of them is slow. A rank's own
time is the time outside of communication. Communication that overlaps with computation costs nothing, so only the
exposed part is subtracted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from kernels_check.check import Check, PathObservation, failed, judge_safely, name_some, passed
from kernels_check.observe.base import quant_state
from kernels_check.observe.digest import Fingerprinter
from kernels_check.observe.modules import RandomState, restore_training
from kernels_check.observe.ranks import is_sharded, trained_parameters
from kernels_check.trace.events import Floats, union_length

REPEATS = 4
"""Number of forward and backward passes of the same batch: wrongly gathered weights are correct at first."""
_EXCHANGES = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel", "mpi:", "ucc:", "xccl:")
"""Name prefixes of communication: the ranges of torch's process groups, and NCCL's kernels."""
_STEP = "kernels_check.ranks step"
STEPS = 3
"""Number of profiled steps: other load on the machine delays a rank in one of them, but seldom in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTime:
    """Times of some steps on one rank, in seconds a step."""

    step_s: float
    exchange_s: float
    """Time during which communication ran or was waited for."""
    exposed_s: float
    """The part of it without computation."""
    own_s: float
    """The time of the rank without waiting for others: the minimum over the steps."""


def profile_steps(step: Callable[[], object], barrier: Callable[[], object]) -> RankTime | None:
    """Run some steps under the profiler. Returns None if CUDA is in use and no kernel was recorded, which can happen
    right after another session; it is not retried, because all ranks would have to agree.

    Args:
        step: one step, together with all other ranks.
        barrier: waits for all ranks before each step, so that a profiler that starts late adds nothing to the step.
    """
    activities = [ProfilerActivity.CPU]
    on_device = torch.cuda.is_available() and torch.cuda.is_initialized()
    if on_device:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        for _ in range(STEPS):
            barrier()
            with record_function(_STEP):
                step()
                if on_device:
                    torch.cuda.synchronize()
    return read_times(recorded.events(), on_device=on_device)


def read_times(events: Sequence[Any], *, on_device: bool) -> RankTime | None:
    """Read the times of the steps from the profiler's events: `on_device` from GPU kernels, else from the operators of
    the training thread; None if there are no GPU events. Annotations (such as step marks) do not count as work."""
    on_gpu = ["CUDA" in str(event.device_type) for event in events]
    if on_device and not any(on_gpu):
        return None
    steps = [event for event, is_gpu in zip(events, on_gpu, strict=True) if event.name == _STEP and not is_gpu]
    exchanged, computed = [], []
    for event, is_gpu in zip(events, on_gpu, strict=True):
        if event.name.startswith(_EXCHANGES):
            exchanged.append(event)
        elif on_device and is_gpu and not event.is_user_annotation:
            computed.append(event)
        elif not on_device and event.thread == steps[0].thread and event.name.startswith("aten::"):
            computed.append(event)  # threads of gloo also call operators
    lasted = _sum_covered_seconds(steps, steps)
    exchange = _sum_covered_seconds(exchanged, steps)
    exposed = _sum_covered_seconds([*exchanged, *computed], steps) - _sum_covered_seconds(computed, steps)
    exposed = np.clip(exposed, 0.0, exchange)  # rounding
    return RankTime(
        step_s=float(lasted.mean()),
        exchange_s=float(exchange.mean()),
        exposed_s=float(exposed.mean()),
        own_s=float((lasted - exposed).min()),
    )


def _sum_covered_seconds(events: Sequence[Any], steps: Sequence[Any]) -> Floats:
    """Seconds of each step in which any of the events ran; overlaps count once."""
    begin, end = (np.array([getattr(event.time_range, edge) for event in events]) for edge in ("start", "end"))
    covered = []
    for step in steps:
        first, last = (np.clip(times, step.time_range.start, step.time_range.end) for times in (begin, end))
        covered.append(union_length(first, last - first) * 1e-6)
    return np.array(covered)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """Facts about one rank; every field is a JSON value."""

    rank: int
    rows: tuple[str, ...] = ()
    """Hashes of the sequences that its model received in a step."""
    whole: tuple[str, ...] = ()
    """Hashes of the sequences for all ranks together."""
    base: dict[str, tuple[int, int]] = field(default_factory=dict)
    """For each frozen parameter, the bytes on this rank and the bytes of the whole."""
    four_bit: dict[str, int] = field(default_factory=dict)
    """Number of weights in each 4-bit weight tensor, which must take half a byte for each in total."""
    repeated: tuple[float, ...] = ()
    """Losses of the same batch with the same random numbers and without updates in between."""
    base_losses: tuple[float, ...] = ()
    """Losses of one batch with the base only: before the base was shared among ranks, at the start, and after each
    step."""
    activity: RankTime | None = None
    """Time breakdown of the profiled steps."""


def observe_rank(
    model: nn.Module,
    gradients: Callable[[], Tensor],
    update: Callable[[], object],
    rewind: Callable[[], object],
    barrier: Callable[[], object],
    base_loss: Callable[[], float] | None,
    *,
    before: float,
    whole: Iterable[Tensor],
    rank: int,
) -> RankFacts:
    """Run steps with all other ranks, and restore everything except the position in the data stream.

    Args:
        model: the trained model, as PEFT returned it; it may be wrapped or sharded.
        gradients: runs the forward and backward passes of a step, and returns this rank's part of the loss.
        update: clips, lets the optimizer step, and drops the gradients.
        rewind: makes the next call of `gradients` use the same batch as the first call.
        barrier: waits for all ranks.
        base_loss: the loss of a fixed batch, without the adapter and without gradients; None if parts of the base
            train.
        before: the same loss right after loading, before the model was shared among ranks.
        whole: the token ids of each sequence of that batch on all ranks together, shape (tokens,).
        rank: rank of this process.

    Raises:
        Exception: any exception of a step, after everything has been restored.
    """
    expected = tuple(Fingerprinter()(row) for row in whole)
    rows: list[str] = []

    def record_rows(module: nn.Module, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids")
        if isinstance(ids, Tensor):
            rows.extend(Fingerprinter()(row) for row in ids)

    def step() -> None:
        gradients()
        update()

    with restore_training(model):
        base_losses = [] if base_loss is None else [before, base_loss()]
        random, repeated = RandomState(), []
        for _ in range(REPEATS):
            rewind()
            random.restore()
            repeated.append(float(gradients()))
            for parameter in trained_parameters(model).values():
                parameter.grad = None
        rewind()
        with model.register_forward_pre_hook(record_rows, with_kwargs=True):
            gradients()
        base = {name: _bytes(parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad}
        four_bit = _four_bit(model)
        update()
        base_losses += [] if base_loss is None else [base_loss()]
        activity = profile_steps(step, barrier)
        base_losses += [] if base_loss is None else [base_loss()]
    return RankFacts(
        rank=rank,
        rows=tuple(rows),
        whole=expected,
        base=base,
        four_bit=four_bit,
        repeated=tuple(repeated),
        base_losses=tuple(base_losses),
        activity=activity,
    )


def _bytes(parameter: Tensor) -> tuple[int, int]:
    here = parameter.to_local() if is_sharded(parameter) else parameter  # type: ignore[attr-defined]
    return here.numel() * here.element_size(), parameter.numel() * parameter.element_size()


def _four_bit(model: nn.Module) -> dict[str, int]:
    """The number of weights in each 4-bit weight tensor, by name; for weights sharded by FSDP2 it comes from the
    layer."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "_parameters", {}).get("weight")
        state = None if weight is None else quant_state(module, weight)
        if state is not None:
            found[f"{name}.weight"] = int(torch.Size(state.shape).numel())
    return found


# --- judging the facts of all ranks ----------------------------------------------------------------------------------

Strategy = Literal["ddp", "fsdp2"]
WHOLE_SHARE = 0.02
"""Maximum share of the base that may be replicated on every rank: small norms and biases may be left unsharded."""
STEADY = 1e-4
"""Allowed relative difference of two losses with the same batch and weights, since a device may add in any order. The
fault for which this limit exists changes losses by at least 3e-4."""

NF4_BY_FSDP2 = (
    "FSDP2 gathers the 4-bit weights again for each forward pass, and bitsandbytes registers each gathered weight "
    "(fix_4bit_weight_quant_state_from_module). If bitsandbytes then rearranges it, as in eval mode on a CPU with "
    "AVX512_BF16, the next gathering restores the weight but not its quantisation state, and the results are wrong. "
    'Write repair = "quant_state" in [workload], which sets the state on the weight in the layer, or '
    'use strategy = "ddp"'
)
"""Explanation of changing losses with a 4-bit base sharded by FSDP2."""


def judge_ranks(facts: Sequence[RankFacts], strategy: Strategy) -> list[Check]:
    """Judge a training on several ranks by the facts of each, in rank order; one check per path."""
    judges = {"ranks.data": judge_data, "ranks.sharded": judge_sharded, "ranks.steady": judge_steady}
    if strategy == "ddp":
        del judges["ranks.sharded"]
    return [judge_safely(path, True, partial(judge, facts)) for path, judge in judges.items()]


def judge_data(facts: Sequence[RankFacts]) -> PathObservation:
    """Judge whether the ranks together train on each sequence of a step once, and all on sequences of the same step."""
    deviating = [str(one.rank) for one in facts if one.whole != facts[0].whole]
    if deviating:
        named = f"each of ranks {name_some(deviating)}" if len(deviating) > 1 else f"rank {deviating[0]}"
        return failed(f"{named} trains on other data than rank 0: the sequences of a step are not the same")
    expected = Counter(facts[0].whole)
    for one in facts:
        foreign = [row for row in one.rows if row not in expected]
        if foreign:
            return failed(
                f"rank {one.rank} was given other data: {len(foreign)} of its {len(one.rows)} sequences do not "
                "belong to the step"
            )
    for one, other in combinations(facts, 2):
        rows, other_rows = Counter(one.rows), Counter(other.rows)
        twice = (rows & other_rows).total()
        if twice and rows + other_rows - expected:
            return failed(
                f"ranks {one.rank} and {other.rank} train on the same data: {twice} of their {len(one.rows)} "
                "sequences, so the data is not divided among the ranks"
            )
    actual = Counter(row for one in facts for row in one.rows)
    if actual != expected:
        missing = (expected - actual).total()
        return failed(f"{missing} of the {expected.total()} sequences of a step were given to no rank")
    return passed(f"{expected.total()} sequences of a step, each on one of {len(facts)} ranks")


def judge_sharded(facts: Sequence[RankFacts]) -> PathObservation:
    """Judge whether each rank holds its part of the base, and 4-bit weights still have 4 bits."""
    base, four_bit = facts[0].base, facts[0].four_bit
    ranks, total = len(facts), sum(whole for _, whole in base.values())
    whole = [name for name in base if all(one.base.get(name, (0, 0))[0] == one.base[name][1] for one in facts)]
    left = sum(base[name][1] for name in whole)
    if left > WHOLE_SHARE * total:
        return failed(
            f"{len(whole)} of {len(base)} parameters of the base are whole on every rank, {left / total:.0%} "
            f"of its bytes: {name_some(whole)}"
        )
    for name, (_, size) in base.items():
        if name not in whole and sum(one.base[name][0] for one in facts) != size:
            return failed(f"the parts of {name} on {ranks} ranks do not add up to the whole")
    enlarged = [name for name, weights in four_bit.items() if 2 * base[name][1] > weights + 1]
    if enlarged:
        return failed(
            f"{len(enlarged)} of {len(four_bit)} 4-bit weights take more than 4 bits after sharding: "
            f"{name_some(enlarged)}"
        )
    most = max(sum(here for here, _ in one.base.values()) for one in facts)
    four_bit_note = f", {len(four_bit)} weights still in 4 bits" if four_bit else ""
    return passed(f"each of {ranks} ranks holds {most / total:.0%} of the base's bytes or less{four_bit_note}")


def judge_steady(facts: Sequence[RankFacts]) -> PathObservation:
    """Judge whether frozen weights still compute the same results as before the model was shared among ranks: the base
    alone over some steps, and the whole model over repeated passes of one batch."""
    for one in facts:
        sharded = any(here < size for here, size in one.base.values())
        why = f". {NF4_BY_FSDP2}" if one.four_bit and sharded else ""
        for losses, of in (
            (one.base_losses, "by the frozen base alone, before it was shared and then over steps,"),
            (one.repeated, "in one forward and backward after the other, with nothing updated,"),
        ):
            if any(not abs(loss - losses[0]) <= STEADY * abs(losses[0]) for loss in losses):
                listed = ", ".join(f"{loss:.5f}" for loss in losses)
                return failed(
                    f"rank {one.rank}: silently wrong from the second forward on: the loss of one batch {of} is "
                    f"{listed}{why}"
                )
    summary = f"the model keeps the loss of one batch over {len(facts[0].repeated)} forwards and backwards"
    if facts[0].base_losses:
        summary += f", and the base over {len(facts[0].base_losses) - 1} forwards since before it was shared"
    return passed(summary)


def merge_checks(by_rank: Sequence[Sequence[Check]]) -> list[Check]:
    """Merge the checks of all ranks: each path gets the worst result of any rank and, if ranks differ in a required
    path, the result of each rank."""
    by_path: dict[str, dict[int, Check]] = {}
    for rank, checks in enumerate(by_rank):
        for check in checks:
            by_path.setdefault(check.path, {})[rank] = check
    return [_merge(found, len(by_rank)) for found in by_path.values()]


def _merge(found: Mapping[int, Check], ranks: int) -> Check:
    worst = max(found.values(), key=lambda check: _WORSE.index(check.status))
    if worst.required is None:
        return worst
    if lacking := [str(rank) for rank in range(ranks) if rank not in found]:
        reason = f"rank {', '.join(lacking)} has no check of it; {worst.reason}"
        return replace(worst, observed=None, status="unknown", reason=reason)
    if not worst.met and len({(check.observed, check.status) for check in found.values()}) > 1:
        listed = "; ".join(f"rank {rank}: {check.observed} ({check.status})" for rank, check in found.items())
        return replace(worst, reason=f"the ranks differ: {listed}. {worst.reason}")
    return worst


_WORSE = ("not_applicable", "active", "unknown", "absent", "fallback")
"""From best to worst; a path that applies on any rank applies."""
