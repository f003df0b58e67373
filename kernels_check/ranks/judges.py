"""What the facts of all ranks say of each other: whether they are one training, and whether each holds its part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from kernels_check.check import Check, PathObservation, judge_safely, name_some

if TYPE_CHECKING:
    from kernels_check.ranks.facts import RankFacts

Strategy = Literal["ddp", "fsdp2"]
PATHS = ("ranks.data", "ranks.sharded", "ranks.steady")
WHOLE_SHARE = 0.02
"""Share of the base that may lie whole on every rank: norms and biases that are left out cost nothing."""
STEADY = 1e-4
"""How far two losses of the same batch by the same weights may be apart, over the loss: a device may add in any order.
The fault that this is there for moves them by 3e-4 and more."""

NF4_BY_FSDP2 = (
    "FSDP2 gathers 4-bit weights anew for each forward, and bitsandbytes registers them anew inside it "
    "(fix_4bit_weight_quant_state_from_module): what it then does to them, as in eval mode on a CPU with AVX512_BF16, "
    "is lost to the next gathering, but not to their state, and another model computes. "
    'Write repair = "quant_state" in [workload], which sets the quantisation state on the weight that is there, or '
    'use strategy = "ddp"'
)
"""What is known of losses that move under a base in 4 bits that FSDP2 has sharded."""


def judge_ranks(facts: Sequence[RankFacts], strategy: Strategy) -> list[Check]:
    """Judge a training of several ranks by what each says of it, in the order of the ranks; one check a path."""
    judges: dict[str, Callable[[Sequence[RankFacts]], PathObservation]] = {
        "ranks.data": judge_data,
        "ranks.steady": judge_steady,
    }
    if strategy == "fsdp2":
        judges["ranks.sharded"] = judge_sharded
    return [judge_safely(path, True, partial(judges[path], facts)) for path in PATHS if path in judges]


def judge_data(facts: Sequence[RankFacts]) -> PathObservation:
    """Whether the ranks together train on each sequence of a step once, and each on those of the same step."""
    strangers = [one.rank for one in facts if one.whole != facts[0].whole]
    if strangers:
        return _fault(f"{_named(strangers)} trains on other data than rank 0: the sequences of a step are not the same")
    wanted = Counter(facts[0].whole)
    for one in facts:
        foreign = [row for row in one.rows if row not in wanted]
        if foreign:
            return _fault(
                f"rank {one.rank} was given other data: {len(foreign)} of its {len(one.rows)} sequences are none of "
                "the step's"
            )
    for index, one in enumerate(facts):
        for other in facts[index + 1 :]:
            twice = sum((Counter(one.rows) & Counter(other.rows)).values())
            if twice and Counter(one.rows) + Counter(other.rows) - wanted:
                return _fault(
                    f"ranks {one.rank} and {other.rank} train on the same data: {twice} of their {len(one.rows)} "
                    "sequences, which is what no share of its own by rank looks like"
                )
    given = sum((Counter(one.rows) for one in facts), Counter[str]())
    if given != wanted:
        missing = sum((wanted - given).values())
        return _fault(f"{missing} of the {sum(wanted.values())} sequences of a step were given to no rank")
    return _good(f"{sum(wanted.values())} sequences of a step, each on one of {len(facts)} ranks")


def judge_sharded(facts: Sequence[RankFacts]) -> PathObservation:
    """Whether each rank holds its part of the base, and in 4 bits what was in 4 bits."""
    ranks, total = len(facts), sum(whole for _, whole in facts[0].base.values())
    whole = [name for name in facts[0].base if all(one.base.get(name, (0, 0))[0] == one.base[name][1] for one in facts)]
    left = sum(facts[0].base[name][1] for name in whole)
    if left > WHOLE_SHARE * total:
        return _fault(
            f"{len(whole)} of {len(facts[0].base)} parameters of the base lie whole on every rank, {left / total:.0%} "
            f"of its bytes: {name_some(whole)}"
        )
    for name, (_, size) in facts[0].base.items():
        if name not in whole and sum(one.base[name][0] for one in facts) != size:
            return _fault(f"the parts of {name} on {ranks} ranks are not its whole")
    swollen = [name for name, weights in facts[0].four_bit.items() if 2 * facts[0].base[name][1] > weights + 1]
    if swollen:
        return _fault(
            f"{len(swollen)} of {len(facts[0].four_bit)} weights in 4 bits take more since they are sharded: "
            f"{name_some(swollen)}"
        )
    most = max(sum(here for here, _ in one.base.values()) for one in facts)
    kept = f", {len(facts[0].four_bit)} weights still in 4 bits" if facts[0].four_bit else ""
    return _good(f"each of {ranks} ranks holds {most / total:.0%} of the base's bytes or less{kept}")


def judge_steady(facts: Sequence[RankFacts]) -> PathObservation:
    """Whether weights that are not updated go on computing what they computed before ranks shared them: the base alone
    over some steps, and all of the model over forwards and backwards of one batch."""
    for one in facts:
        sharded = any(here < size for here, size in one.base.values())
        why = f". {NF4_BY_FSDP2}" if one.four_bit and sharded else ""
        for losses, of in (
            (one.base_losses, "by the frozen base alone, before it was shared and then over steps,"),
            (one.repeated, "in one forward and backward after the other, with nothing updated,"),
        ):
            if any(not abs(loss - losses[0]) <= STEADY * abs(losses[0]) for loss in losses):
                said = ", ".join(f"{loss:.5f}" for loss in losses)
                return _fault(
                    f"rank {one.rank}: silently wrong from the second forward on: the loss of one batch {of} is "
                    f"{said}{why}"
                )
    kept = f"the model keeps the loss of one batch over {len(facts[0].repeated)} forwards and backwards"
    if facts[0].base_losses:
        kept += f", and the base over {len(facts[0].base_losses) - 1} forwards since before it was shared"
    return _good(kept)


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"each of ranks {name_some(map(str, ranks))}"


def _fault(reason: str) -> PathObservation:
    return PathObservation(observed=False, status="fallback", reason=reason)


def _good(reason: str) -> PathObservation:
    return PathObservation(observed=True, reason=reason)


def merge_checks(by_rank: Sequence[Sequence[Check]]) -> list[Check]:
    """The checks of all ranks as those of one training: of each path that of the rank that fares worst, and where ranks
    differ in a path that is required, who found what."""
    found: list[Check] = []
    paths = dict.fromkeys(check.path for checks in by_rank for check in checks)
    tables: list[Mapping[str, Check]] = [{check.path: check for check in checks} for checks in by_rank]
    for path in paths:
        known = [(rank, table[path]) for rank, table in enumerate(tables) if path in table]
        worst = max(known, key=lambda pair: _WORSE.index(pair[1].status))[1]
        lacking = [str(rank) for rank, table in enumerate(tables) if path not in table]
        differing = {(check.observed, check.status) for _, check in known}
        if lacking and worst.required is not None:
            reason = f"no row of rank {', '.join(lacking)} is about it; {worst.reason}"
            worst = Check(path=path, required=worst.required, observed=None, status="unknown", reason=reason)
        elif len(differing) > 1 and worst.required is not None and not worst.met:
            said = "; ".join(f"rank {rank}: {check.observed} ({check.status})" for rank, check in known)
            reason = f"the ranks differ: {said}. {worst.reason}"
            worst = Check(
                path=path, required=worst.required, observed=worst.observed, status=worst.status, reason=reason
            )
        found.append(worst)
    return found


_WORSE = ("not_applicable", "active", "unknown", "absent", "fallback")
"""From the best to the worst; a path that does not apply on one rank applies on the one where it does."""
