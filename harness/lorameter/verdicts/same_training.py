"""Whether two scripts do the same: a ratio of times means nothing where one of them trains less.

What a step holds and what it trains is counted, so it is compared exactly, or within the tolerance where it is a mean.
Losses are compared where both see the same tokens: in the first step, in which both have the same model, and then over
all steps, a replicate's value being the median of its paired log ratios, with an interval over replicates. They are
called the same only where that interval says so; what could not be seen is unknown, with the reason.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorameter.records.metrics import LOSSES, real_tokens_of_steps
from lorameter.records.record import Notice, TrialRecord
from lorameter.records.store import Run
from lorameter.records.units import first_few, format_ratio
from lorameter.stats import Comparison, compare_trials
from lorameter.studies.script import SIDE
from lorameter.studies.study import Study
from lorameter.verdicts.series import Series, group_trials, is_difference
from lorameter.verdicts.software import differing_versions, say_versions

TOLERANCE = 0.01
"""Difference of a mean number of tokens, or of a loss, that is worth a word."""
MARGIN = 0.02
"""Within it losses are the same: kernels that compute the same in another order move a loss of 16 bits by less."""
ROUNDING = 2.0**-8
"""What bfloat16 rounds to; losses on the same batches may differ by as much."""
FEWEST_STEPS = 16
"""Of fewer it is not judged whether losses follow each other."""
OTHER_PARAMETERS, LOSS_DIFFERS = "trains-other-parameters", "loss-differs"
"""Codes of notices that say that two scripts are not the same training."""
SOFTWARE_DIFFERS = "software-differs"
MOST_NAMED = 6
"""Packages that a notice names; another interpreter may have hundreds of others."""
Found = Literal["agree", "differ", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossAgreement:
    """What is said of the losses of two scripts."""

    found: Found
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptPair:
    """Two scripts with the trials that both have of a replicate."""

    names: tuple[str, str]
    pairs: tuple[tuple[TrialRecord, TrialRecord], ...]

    @property
    def begins(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Each side with which of its steps is the first that the other shows as well: a loop without a Trainer or
        meter is seen from its second step on (`lorameter.attach.sources`)."""
        late = [bool(self.pairs) and self.pairs[0][side].tokens.get("source") == "optimizer" for side in (0, 1)]
        return (0, int(late[1] and not late[0])), (1, int(late[0] and not late[1]))

    @property
    def tokens(self) -> tuple[tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]] | None:
        """Real tokens of each step, by trial, of both; None where they were not seen."""
        found = tuple(
            tuple(real_tokens_of_steps(pair[side])[begin:] for pair in self.pairs) for side, begin in self.begins
        )
        return None if not self.pairs or not all(all(side) for side in found) else (found[0], found[1])

    @property
    def tokens_a_step(self) -> tuple[float, float] | None:
        """The means of both; None where they were not seen."""
        seen = self.tokens
        if seen is None:
            return None
        base, candidate = (sum(map(sum, side)) / sum(map(len, side)) for side in seen)
        return base, candidate

    @property
    def tokens_differ(self) -> bool:
        """Whether a step of the one holds more than a step of the other, as far as that is known."""
        means = self.tokens_a_step
        return means is not None and (min(means) <= 0 or abs(math.log(means[1] / means[0])) > TOLERANCE)

    @property
    def same_tokens(self) -> bool | None:
        """Whether each step of the one holds as many tokens as that of the other; None where they were not seen."""
        seen = self.tokens
        if seen is None:
            return None
        return all(ours[: len(theirs)] == theirs[: len(ours)] for ours, theirs in zip(seen[0], seen[1], strict=True))


def sides_of_run(run: Run, study: Study) -> dict[str, ScriptPair]:
    """What is compared with what, by variant: in an A/B the candidate with the base, else each with the reference."""
    if run.manifest.sides:
        base, candidate = group_trials(run.records, "base"), group_trials(run.records, "candidate")
        return {
            variant.name: _sides(("the base", "the candidate"), base[key], candidate[key])
            for variant in study.variants
            if (key := (variant.name, "variant")) in base and key in candidate
        }
    groups = group_trials(run.records)
    reference = groups.get((study.reference, "variant"))
    return {
        name: _sides((study.reference, name), reference, series)
        for (name, role), series in groups.items()
        if reference is not None and role == "variant" and name != study.reference
    }


def _sides(names: tuple[str, str], base: Series, candidate: Series) -> ScriptPair:
    others = {(record.replicate, record.attempt): record for record in candidate.ok}
    pairs = [
        (ours, others[ours.replicate, ours.attempt]) for ours in base.ok if (ours.replicate, ours.attempt) in others
    ]
    return ScriptPair(names=names, pairs=tuple(pairs))


def losses_of_run(run: Run, study: Study) -> dict[str, LossAgreement]:
    """Whether the losses agree, by variant."""
    return {name: compare_losses(sides) for name, sides in sides_of_run(run, study).items()}


def compare_losses(sides: ScriptPair) -> LossAgreement:
    """Whether two scripts have the same losses on the same tokens."""
    if sides.same_tokens is False:
        return LossAgreement(
            found="unknown", reason="they see different tokens, so their losses have nothing in common"
        )
    base, candidate = ([_losses(pair[side])[begin:] for pair in sides.pairs] for side, begin in sides.begins)
    if not base or not all(base) or not all(candidate):
        return LossAgreement(found="unknown", reason="no trial of both in which every loss was seen")
    steps = min(map(len, (*base, *candidate)))
    try:
        first, trend = (
            _compare([one[begin:end] for one in base], [one[begin:end] for one in candidate])
            for begin, end in ((0, 1), (0, steps))
        )
    except ValueError as error:
        return LossAgreement(found="unknown", reason=f"they have no ratio: {error}")
    which = "first step that both show" if any(begin for _, begin in sides.begins) else "first step"
    said = (
        f"{base[0][0]:.4g} in {sides.names[0]} and {candidate[0][0]:.4g} in {sides.names[1]} in the {which}, and "
        f"over {steps} steps {format_ratio(trend.ratio, trend.low, trend.high)} of the first"
    )
    unknown = "" if sides.same_tokens else "; whether both see the same tokens is not known"
    if is_difference(first) or is_difference(trend):
        return LossAgreement(found="differ", reason=said + unknown)
    if not _follow_each_other(sides):
        return LossAgreement(found="unknown", reason=f"{OTHER_BATCHES}: {said}")
    if trend.verdict == "equivalent":
        return LossAgreement(found="unknown" if unknown else "agree", reason=said + unknown)
    return LossAgreement(found="unknown", reason=f"{said}: {trend.reason}")


OTHER_BATCHES = "losses of the same step are no closer to each other than losses of neighbouring steps"


def _follow_each_other(sides: ScriptPair) -> bool:
    """Whether losses may be of the same batches in the same order, by how far each is from the mean of its neighbours.
    Of the same batches those of the same step are the closest; of other batches half of them are closer to those of a
    neighbouring step. What lies between is the border."""
    aligned: list[float] = []
    closer: list[bool] = []
    for pair in sides.pairs:
        base, candidate = (_scatter(_losses(pair[side])[begin:]) for side, begin in sides.begins)
        for place in range(min(len(base), len(candidate)) - 1):
            same = abs(base[place] - candidate[place])
            aligned.append(same)
            closer.append(same <= abs(base[place] - candidate[place + 1]))
            closer.append(same <= abs(base[place + 1] - candidate[place]))
    if len(aligned) < FEWEST_STEPS * len(sides.pairs) or statistics.median(aligned) <= ROUNDING:
        return True
    return sum(closer) / len(closer) >= 0.75


def _scatter(losses: Sequence[float]) -> list[float]:
    """Log ratios of each loss to those beside it, in which no trend is."""
    logs = [math.log(loss) for loss in losses]
    return [logs[place] - (logs[place - 1] + logs[place + 1]) / 2 for place in range(1, len(logs) - 1)]


def _losses(record: TrialRecord) -> tuple[float, ...]:
    return tuple(loss for name in LOSSES for loss in record.samples.get(name, ()))


def _compare(base: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> Comparison:
    return compare_trials(base, candidate, pairing="turn", tolerance=TOLERANCE, margin=MARGIN)


def sameness_notices(run: Run, study: Study) -> Iterator[Notice]:
    """What two scripts do not have in common, each with both numbers; sides are other software on purpose."""
    if not study.of_scripts:
        return
    on_purpose = any(side.get("kind") != SIDE for side in run.manifest.sides.values())
    for name, sides in sides_of_run(run, study).items():
        found = notices_of_sides(name, sides)
        yield from (notice for notice in found if not on_purpose or notice.code != SOFTWARE_DIFFERS)


def notices_of_sides(name: str, sides: ScriptPair) -> Iterator[Notice]:
    """The same of two scripts by themselves."""
    if not sides.pairs:
        return
    yield from _tokens(name, sides)
    yield from _parameters(name, sides)
    yield from _dtypes(name, sides)
    yield from _software(name, sides)
    losses = compare_losses(sides)
    if losses.found == "differ":
        yield Notice(
            code=LOSS_DIFFERS,
            message=f"{name}: the losses differ: {losses.reason}.",
            remedy="Find out why before believing the time: it is not that of the same training.",
        )
    elif losses.reason.startswith(OTHER_BATCHES):
        yield Notice(
            code="other-batches",
            message=f"{name}: {losses.reason}.",
            remedy="Give both the same seed and the same order of batches; else their losses cannot be compared.",
        )


def _tokens(name: str, sides: ScriptPair) -> Iterator[Notice]:
    means, batches = sides.tokens_a_step, _batches(sides)
    held = "; ".join(
        f"{one} {words}" for one, words in zip(sides.names, batches, strict=False)
    )  # none are known at times
    if means is not None and sides.tokens_differ:
        yield Notice(
            code="tokens-differ",
            message=f"{name}: a step holds {means[0]:.1f} real tokens in {sides.names[0]} and {means[1]:.1f} in "
            f"{sides.names[1]}{f' ({held})' if held else ''}, so step times are not comparable.",
            remedy="Read the time per real token, which is given as well, or give both the same batch.",
        )
    elif batches and batches[0] != batches[1]:
        yield Notice(
            code="batch-differs",
            message=f"{name}: the same tokens a step, as far as they were seen, in other batches: {held}.",
            remedy="Give both the same batch and accumulation, unless this is what is compared.",
        )


def _batches(sides: ScriptPair) -> list[str]:
    """Sequences and passes of a step, of both, in words; without passes where one does not tell them, and nothing where
    sequences were not seen."""
    counts, every = [], []
    for side in zip(*sides.pairs, strict=True):
        record = side[0]
        steps, sequences = len(record.samples.get("step_time_s", ())), record.samples.get("turn_sequences")
        if not sequences or not steps:
            return []
        counts.append(sum(sequences) / steps)
        every.append(record.values.get("accumulation"))
    known = None not in every
    passes = [f" in {count:g} passes" if known else "" for count in every]
    return [f"{count:g} sequences{words}" for count, words in zip(counts, passes, strict=True)]


def _parameters(name: str, sides: ScriptPair) -> Iterator[Notice]:
    counts = _both(sides, lambda record: record.values.get("trainable_parameters"))
    types = _both(sides, lambda record: record.tokens.get("trainable_dtype"))
    if (counts and counts[0] != counts[1]) or (types and types[0] != types[1]):
        numbers = [f"{count:,.0f}" for count in counts] if counts else ["an unknown number", "an unknown number"]
        words = [f" ({kind})" for kind in types] if types else ["", ""]
        yield Notice(
            code=OTHER_PARAMETERS,
            message=f"{name}: {numbers[0]} parameters{words[0]} are trained in {sides.names[0]}, and "
            f"{numbers[1]}{words[1]} in {sides.names[1]}.",
            remedy="Give both the same adapter, unless this is what is compared.",
        )


def _dtypes(name: str, sides: ScriptPair) -> Iterator[Notice]:
    types = _both(sides, lambda record: record.tokens.get("loss_dtype"))
    if types and types[0] != types[1]:
        yield Notice(
            code="loss-dtype-differs",
            message=f"{name}: the loss is {types[0]} in {sides.names[0]} and {types[1]} in {sides.names[1]}.",
            remedy="Give both the same precision, unless this is what is compared.",
        )


def _software(name: str, sides: ScriptPair) -> Iterator[Notice]:
    """What their processes have installed, and on how many threads they compute."""
    base, candidate = zip(*sides.pairs, strict=True)
    differing = [
        f"{package} {say_versions(ours)} in {sides.names[0]} and {say_versions(theirs)} in {sides.names[1]}"
        for package, ours, theirs in differing_versions(base, candidate)
    ]
    if differing:
        yield Notice(
            code=SOFTWARE_DIFFERS,
            message=f"{name}: the processes have not the same software: {first_few(differing, MOST_NAMED, '; ')}.",
            remedy="Start both with the same interpreter, unless this is what is compared.",
        )
    threads = [
        sorted({record.values["threads"] for record in side if "threads" in record.values})
        for side in (base, candidate)
    ]
    if all(threads) and threads[0] != threads[1]:
        said = [" or ".join(f"{count:g}" for count in counts) for counts in threads]
        yield Notice(
            code="threads-differ",
            message=f"{name}: torch computes on {said[0]} threads in {sides.names[0]} and on {said[1]} in "
            f"{sides.names[1]}.",
            remedy="Give both as many, unless this is what is compared.",
        )


def _both(sides: ScriptPair, value: Callable[[TrialRecord], Any]) -> tuple[Any, Any] | None:
    """What the first trial of either says; None where one does not. All trials of one script say the same."""
    ours, theirs = (value(record) for record in sides.pairs[0])
    return None if ours is None or theirs is None else (ours, theirs)
