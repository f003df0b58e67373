"""Checks whether two scripts do the same training: a ratio of times is meaningless if one of them trains less.

The contents of a step and its trained parameters are counted, so they are compared exactly, or within a tolerance if
they are means. Losses are compared if both scripts see the same tokens: in the first step, in which both have the same
model, and then over all steps. A replicate's value is the median of its paired log ratios, and the interval is over
replicates. Losses are the same only if the interval supports it; a fact that was not observed is unknown, with the
reason.

The software of a script is as reported by its own processes. A script has its own interpreter: that of its command, of
a launcher in front of it, or of an environment that the command activates. Before the start, lorameter can only resolve
the word `python`, which may be another interpreter.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorameter.machine.provenance import KERNELS, kernel_libraries, normal_name
from lorameter.measurements.steps import losses_of_steps, real_tokens_of_steps
from lorameter.records.record import SIDES, Notice, Side, TrialRecord
from lorameter.records.store import Run
from lorameter.records.units import first_few, format_ratio
from lorameter.stats import compare_trials
from lorameter.studies.script import SIDE
from lorameter.studies.study import Study
from lorameter.verdicts.series import group_trials, is_difference

TOLERANCE = 0.01
"""Smallest difference of a mean token count, or of a loss, that is reported."""
MARGIN = 0.02
"""Losses within it are the same: kernels that only change the order of operations change a 16-bit loss by less."""
ROUNDING = 2.0**-8
"""Rounding error of bfloat16; losses on the same batches may differ by this much."""
MIN_STEPS = 16
"""With fewer steps, agreement of the losses over all steps is not judged."""
OTHER_PARAMETERS, LOSS_DIFFERS = "trains-other-parameters", "loss-differs"
"""Codes of notices for scripts that are not the same training."""
SOFTWARE_DIFFERS = "software-differs"
MAX_NAMED = 6
"""Maximum packages that a notice names; another interpreter may differ in hundreds."""
Found = Literal["agree", "differ", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossAgreement:
    """Whether the losses of two scripts agree, with the reason."""

    found: Found
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptPair:
    """Two scripts with the trials of their common replicates."""

    names: tuple[str, str]
    pairs: tuple[tuple[TrialRecord, TrialRecord], ...]

    @property
    def skipped(self) -> tuple[int, int]:
        """How many steps of each side precede the first step that the other side also recorded: a loop without a
        Trainer or meter is measured from its second step on (`lorameter.attach.sources`)."""
        base, candidate = (self.pairs[0][side].tokens.get("source") == "optimizer" for side in (0, 1))
        return int(candidate and not base), int(base and not candidate)

    def steps(self, values_of: Callable[[TrialRecord], tuple[float, ...]]) -> list[list[tuple[float, ...]]]:
        """A value of each step, by trial, for both sides, from the first step that both recorded."""
        if not self.pairs:
            return [[], []]
        return [[values_of(pair[side])[skip:] for pair in self.pairs] for side, skip in enumerate(self.skipped)]

    @property
    def tokens(self) -> list[list[tuple[float, ...]]] | None:
        """Real tokens of each step, by trial, for both sides; None if they were not counted."""
        found = self.steps(real_tokens_of_steps)
        return found if self.pairs and all(map(all, found)) else None

    @property
    def tokens_a_step(self) -> tuple[float, float] | None:
        """The mean tokens of a step on both sides; None if they were not counted."""
        if self.tokens is None:
            return None
        base, candidate = (sum(map(sum, side)) / sum(map(len, side)) for side in self.tokens)
        return base, candidate

    @property
    def tokens_differ(self) -> bool:
        """Whether a step of one side has more tokens than a step of the other, as far as known."""
        means = self.tokens_a_step
        return means is not None and (min(means) <= 0 or abs(math.log(means[1] / means[0])) > TOLERANCE)

    @property
    def same_tokens(self) -> bool | None:
        """Whether each step has the same number of tokens on both sides; None if they were not counted."""
        if self.tokens is None:
            return None
        return all(ours[: len(theirs)] == theirs[: len(ours)] for ours, theirs in zip(*self.tokens, strict=True))


def pair_scripts(run: Run, study: Study) -> dict[str, ScriptPair]:
    """The pairs of scripts to compare, by variant: in an A/B the candidate and the base, else each variant and the
    reference."""
    has_sides = bool(run.manifest.sides)
    sides: tuple[Side, ...] = SIDES if has_sides else ("", "")
    base, candidate = (group_trials(run.records, side) for side in sides)
    pairs = {}
    for name in (variant.name for variant in study.variants):
        ours = base.get((name if has_sides else study.reference, "variant"))
        theirs = candidate.get((name, "variant"))
        if ours is not None and theirs is not None and (has_sides or name != study.reference):
            titles = ("the base", "the candidate") if has_sides else (study.reference, name)
            others = {(record.replicate, record.attempt): record for record in theirs.ok}
            matches = ((record, others.get((record.replicate, record.attempt))) for record in ours.ok)
            pairs[name] = ScriptPair(names=titles, pairs=tuple((one, two) for one, two in matches if two))
    return pairs


def compare_losses(sides: ScriptPair) -> LossAgreement:
    """Decide whether two scripts have the same losses on the same tokens."""
    if sides.same_tokens is False:
        return LossAgreement(
            found="unknown", reason="they see different tokens, so their losses have nothing in common"
        )
    base, candidate = sides.steps(losses_of_steps)
    if not base or not all(base) or not all(candidate):
        return LossAgreement(found="unknown", reason="no trial recorded every loss of both scripts")
    steps = min(map(len, (*base, *candidate)))
    if min(map(min, (*base, *candidate))) <= 0:
        return LossAgreement(found="unknown", reason="a loss is not above 0, so they have no ratio")
    try:
        first, trend = (
            compare_trials(
                [one[begin:end] for one in base],
                [one[begin:end] for one in candidate],
                pairing="turn",
                tolerance=TOLERANCE,
                margin=MARGIN,
            )
            for begin, end in ((0, 1), (0, steps))
        )
    except ValueError as error:
        return LossAgreement(found="unknown", reason=f"they have no ratio: {error}")
    which = "first step that both report" if any(sides.skipped) else "first step"
    values = (
        f"{base[0][0]:.4g} in {sides.names[0]} and {candidate[0][0]:.4g} in {sides.names[1]} in the {which}, and "
        f"over {steps} steps {format_ratio(trend.ratio, trend.low, trend.high)} of the first"
    )
    unknown = "" if sides.same_tokens else "; it is unknown whether both see the same tokens"
    if is_difference(first) or is_difference(trend):
        return LossAgreement(found="differ", reason=values + unknown)
    if not _have_same_order(base, candidate):
        return LossAgreement(found="unknown", reason=f"{OTHER_BATCHES}: {values}")
    if trend.verdict == "equivalent":
        return LossAgreement(found="unknown" if unknown else "agree", reason=values + unknown)
    return LossAgreement(found="unknown", reason=f"{values}: {trend.reason}")


OTHER_BATCHES = "losses of the same step are no closer to each other than losses of neighbouring steps"


def _have_same_order(base: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> bool:
    """Whether losses may be of the same batches in the same order, by the distance of each from the mean of its
    neighbours. On the same batches, the losses of the same step are the closest; on other batches, half of the losses
    are closer to those of a neighbouring step. The limit is halfway between."""
    aligned: list[float] = []
    closer: list[bool] = []
    for base_logs, candidate_logs in zip(map(_scatter, base), map(_scatter, candidate), strict=True):
        for (our, our_next), (their, their_next) in zip(
            itertools.pairwise(base_logs), itertools.pairwise(candidate_logs), strict=False
        ):
            same = abs(our - their)
            aligned.append(same)
            closer += [same <= abs(our - their_next), same <= abs(our_next - their)]
    if len(aligned) < MIN_STEPS * len(base) or statistics.median(aligned) <= ROUNDING:
        return True
    return sum(closer) / len(closer) >= 0.75


def _scatter(losses: Sequence[float]) -> list[float]:
    """Log ratios of each loss to its neighbours, which removes the trend."""
    logs = [math.log(loss) for loss in losses]
    return [log - (before + after) / 2 for before, log, after in zip(logs, logs[1:], logs[2:], strict=False)]


def sameness_notices(run: Run, study: Study) -> Iterator[Notice]:
    """Notices about differences between scripts of a run; different software of the sides is intended."""
    if not study.supports("own training"):
        return
    on_purpose = any(side.get("kind") != SIDE for side in run.manifest.sides.values())
    for name, sides in pair_scripts(run, study).items():
        found = describe_script_differences(name, sides)
        yield from (notice for notice in found if not on_purpose or notice.code != SOFTWARE_DIFFERS)


def describe_script_differences(name: str, sides: ScriptPair) -> Iterator[Notice]:
    """Notices about differences between two scripts, with both values."""
    if not sides.pairs:
        return
    yield from _tokens(name, sides)
    for code, key, words, remedy in FACTS:
        # All trials of one script have the same facts.
        known = [{**record.tokens, **record.values}.get(key) for record in sides.pairs[0]]
        if None not in known and known[0] != known[1]:
            yield _differ(name, sides, [words.format(value) for value in known], remedy, code=code)
    base, candidate = zip(*sides.pairs, strict=True)
    software = [
        f"{package} {ours} in {sides.names[0]} and {theirs} in {sides.names[1]}"
        for package, ours, theirs in differing_versions(base, candidate)
    ]
    if software:
        yield Notice(
            code=SOFTWARE_DIFFERS,
            message=f"{name}: the processes use different software: {first_few(software, MAX_NAMED, '; ')}.",
            remedy="Start both with the same interpreter, unless this difference is what you compare.",
        )
    losses = compare_losses(sides)
    if losses.found == "differ":
        yield Notice(
            code=LOSS_DIFFERS,
            message=f"{name}: the losses differ: {losses.reason}.",
            remedy="Find out why before you trust the times: the two scripts do not train the same.",
        )
    elif losses.reason.startswith(OTHER_BATCHES):
        yield Notice(
            code="other-batches",
            message=f"{name}: {losses.reason}.",
            remedy="Give both the same seed and the same order of batches; else their losses cannot be compared.",
        )


FACTS: tuple[tuple[str, str, str, str], ...] = (
    (OTHER_PARAMETERS, "trainable_parameters", "{:,.0f} parameters are trained", "the same adapter"),
    (OTHER_PARAMETERS, "trainable_dtype", "the trainable parameters are {}", "the same adapter"),
    ("loss-dtype-differs", "loss_dtype", "the loss is {}", "the same precision"),
    ("threads-differ", "threads", "torch computes on {:g} threads", "the same number"),
)
"""Facts that two scripts must share: the notice's code, the key in a record, the text, and the remedy."""


def _differ(name: str, sides: ScriptPair, facts: Sequence[str], remedy: str, *, code: str) -> Notice:
    return Notice(
        code=code,
        message=f"{name}: {facts[0]} in {sides.names[0]}, and {facts[1]} in {sides.names[1]}.",
        remedy=f"Give both {remedy}, unless this difference is what you compare.",
    )


def _tokens(name: str, sides: ScriptPair) -> Iterator[Notice]:
    """Notices about a step's contents: real tokens, sequences and passes."""
    means, batches = sides.tokens_a_step, [_batch(record) for record in sides.pairs[0]]
    if means is not None and sides.tokens_differ:
        listed = "; ".join(f"{one} {words}" for one, words in zip(sides.names, batches, strict=True))
        yield Notice(
            code="tokens-differ",
            message=f"{name}: a step holds {means[0]:.1f} real tokens in {sides.names[0]} and {means[1]:.1f} in "
            f"{sides.names[1]}{f' ({listed})' if all(batches) else ''}, so step times are not comparable.",
            remedy="Read the time per real token, which is given as well, or give both the same batch.",
        )
    elif all(batches) and batches[0] != batches[1]:
        yield _differ(name, sides, batches, "the same batch and accumulation", code="batch-differs")


def _batch(record: TrialRecord) -> str:
    """Sequences of a step, and its passes if known, as text; empty if sequences were not counted."""
    steps, sequences = len(record.samples.get("step_time_s", ())), sum(record.samples.get("turn_sequences", ()))
    passes = record.values.get("accumulation")
    if not steps or not sequences:
        return ""
    return f"{sequences / steps:g} sequences" + ("" if passes is None else f" in {passes:g} passes")


OURS = "lorameter"
"""The measuring package; it is the same in every process, whatever the interpreter has installed."""
BETWEEN = " or "
"""Separates versions of one package if trials report several."""
REPORTED = ("python", "cuda", "libraries", KERNELS)
"""Fields of a run's provenance that a script's process reports when it starts; before, they are a guess."""
NONE = "none"
"""Replaces the version of a package that is not installed."""


def versions_by_name(records: Iterable[TrialRecord], side: Side | None = None) -> dict[str, str]:
    """The versions of each package that a script's trials (of one side) report, without duplicates; {} if no trial
    reports any."""
    reported = [one.software for one in records if one.software and side in (None, one.side)]
    names = sorted({name for one in reported for name in one})
    return {name: BETWEEN.join(sorted({one.get(name, NONE) for one in reported})) for name in names}


def library_versions(provenance: Mapping[str, Any], records: Iterable[TrialRecord]) -> dict[str, str | None]:
    """Versions of Python, the libraries, and the packages of an engine: as reported by the trials, else from the
    provenance. None for a package that is not installed; if there are several versions, the text has all of them."""
    stated = {"python": provenance.get("python"), **provenance.get("libraries", {}), **provenance.get("engine", {})}
    stated |= {"cuda": provenance["cuda"]} if provenance.get("cuda") else {}
    reported = versions_by_name(records)
    if not reported:
        return stated
    names = dict.fromkeys([*stated, *(["cuda"] if "cuda" in reported else [])])
    versions = {name: reported.get(normal_name(name)) for name in names}
    return versions | ({OURS: stated[OURS]} if OURS in stated else {})


def differing_versions(base: Iterable[TrialRecord], candidate: Iterable[TrialRecord]) -> Iterator[tuple[str, str, str]]:
    """Each package whose version differs between trials, with the versions of both sides; nothing if a side reports
    none."""
    ours, theirs = versions_by_name(base), versions_by_name(candidate)
    for name in sorted({*ours, *theirs} - {OURS}) if ours and theirs else ():
        base_version, candidate_version = ours.get(name, NONE), theirs.get(name, NONE)
        if base_version != candidate_version or BETWEEN in base_version:
            yield name, base_version, candidate_version


def training_facts(provenance: Mapping[str, Any], records: Iterable[TrialRecord]) -> dict[str, Any]:
    """The provenance, with the facts that the trials report in place of those found before the start."""
    records = list(records)
    reported = versions_by_name(records)
    if not reported:
        return dict(provenance)
    versions = library_versions(provenance, records)
    libraries = {name: versions.get(name) for name in provenance.get("libraries", {})}
    found = {"libraries": libraries} | {name: versions[name] for name in ("python", "cuda") if name in versions}
    if kernels := provenance.get(KERNELS):
        found[KERNELS] = kernel_libraries(reported, versions.get("cuda"), kernels["switches"])
    return {**provenance, **found}


def describe_threads(provenance: Mapping[str, Any], records: Iterable[TrialRecord]) -> str:
    """The number of threads of a process, as reported by the trials of scripts."""
    reported = sorted({record.values["threads"] for record in records if "threads" in record.values})
    counts = [f"{count:g}" for count in reported] or [str(provenance.get("threads", "unknown"))]
    return f"{BETWEEN.join(counts)} thread{'' if counts == ['1'] else 's'}"
