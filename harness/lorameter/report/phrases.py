"""The words of findings, for people: programs get the verdicts of the contract.

Variants are slower or faster than each other, larger or smaller, higher or lower; a candidate has regressed or improved
on its base. What is inconclusive is a sentence: what the effect may be, what would have been seen, and what to
do, which is never "measure hundreds of replicates".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, NamedTuple

from lorameter.records.metrics import METRICS
from lorameter.records.record import Interleaving
from lorameter.records.units import format_percent
from lorameter.report.blocks import Cell
from lorameter.stats import MOST_ADVISED, Comparison

if TYPE_CHECKING:
    from lorameter.studies.workload import Workload

Between = Literal["variants", "sides"]
"""What is compared: variants of a study, or a candidate with its base."""


class VerdictWords(NamedTuple):
    """The words for a ratio above 1, which is worse, and for one below."""

    worse: str
    better: str


_BASIS = re.compile(r" \((\d[^()]*replicate[^()]*)\)")
_TIMES = VerdictWords("slower", "faster")
_BYTES = VerdictWords("larger", "smaller")
_LEVELS = VerdictWords("higher", "lower")
_PHASES = {"train": "training", "generate": "generation", "cold": "cold start"}


def ways_of(metric: str) -> VerdictWords:
    """In which words a metric gets worse and better; what no metric of ours is, another project's, is a time."""
    if metric.endswith("_bytes"):
        return _BYTES
    if metric not in METRICS or METRICS[metric].unit in ("s", "1/s"):
        return _TIMES
    return VerdictWords(*reversed(_LEVELS)) if METRICS[metric].higher_is_better else _LEVELS


def title_of(metric: str) -> str:
    """What a metric or a kind of memory is called; of one that another program measured, its name."""
    if metric in METRICS:
        return METRICS[metric].title
    for phase, words in _PHASES.items():
        for where in ("host", "device"):
            for kind in ("peak", "peak_allocated", "peak_reserved"):
                if metric == f"{where}_{kind}_{phase}_bytes":
                    return f"{where} {kind.replace('_', ' ')}, {words}"
    return metric


def say_request(workload: Workload) -> str:
    """Tokens of a request: of its prompt and new ones, each as often as it has prompts."""
    tokens = f"{workload.prompt_tokens} + {workload.new_tokens}"
    return tokens if workload.request_batch == 1 else f"{workload.request_batch} × ({tokens})"


def say_adapters(workload: Workload) -> str:
    """How many adapters a base has while it answers; empty where it is the trained one alone."""
    return "" if workload.adapters == 1 else f" by {workload.adapters} adapters on one base"


def title_of_ratio(metric: str) -> str:
    """The same of its ratio: that of a rate is turned, so that above 1 is a slow-down."""
    turned = metric in METRICS and METRICS[metric].higher_is_better
    return f"{title_of(metric)}, slow-down" if turned else title_of(metric)


def verdict_cell(found: Comparison, metric: str, margin: float, between: Between) -> Cell:
    """The verdict in a word; that two things count as equal says within what."""
    worse, better = ways_of(metric)
    said = {
        "regressed": worse if between == "variants" else "",
        "improved": better if between == "variants" else "",
        "equivalent": f"equivalent ±{format_percent(margin)}" if margin else "equal",
        "no_baseline": "no baseline",
        "not_comparable": "not comparable",
    }
    return Cell(verdict=found.verdict, said=said.get(found.verdict, ""))


def format_inconclusive(found: Comparison, metric: str, interleaving: Interleaving, *, ab: bool = False) -> str:
    """What an inconclusive verdict says: what the effect may be, what would have been seen, and what to do."""
    if found.low is None or found.high is None:
        return "Inconclusive: one replicate gives no interval. Measure 5."
    ways = ways_of(metric)
    seen = "" if found.mde80 is None else f"; smallest detectable difference: {format_percent(found.mde80)}"
    return f"Inconclusive: {_between(found.low, found.high, ways)}{seen}. {_advice(found, metric, interleaving, ab=ab)}"


def split_basis(reason: str) -> tuple[str, str]:
    """A verdict's reason without what it rests on ("3 replicates, paired turn by turn"), and that; several verdicts
    share it."""
    found = _BASIS.search(reason)
    return (reason, "") if found is None else (reason[: found.start()] + reason[found.end() :], found[1])


def format_effect(found: Comparison, metric: str) -> str:
    """The effect in per cent, with its interval: "3.9 % slower [+3.7 %, +4.2 %]". Empty without a ratio; without the
    interval where both ends read the same, as those of computed bytes do."""
    if found.ratio is None:
        return ""
    ways = ways_of(metric)
    said = _effect(found.ratio, ways)
    if found.low is None or found.high is None or _signed(found.low) == _signed(found.high):
        return said
    return f"{said} [{_signed(found.low)}, {_signed(found.high)}]"


def _between(low: float, high: float, ways: VerdictWords) -> str:
    return f"between {_effect(low, ways)} and {_effect(high, ways)}"


def _effect(ratio: float, ways: VerdictWords) -> str:
    return f"{format_percent(abs(ratio - 1))} {ways.worse if ratio >= 1 else ways.better}"


def _signed(ratio: float) -> str:
    return f"{'+' if ratio >= 1 else '−'}{format_percent(abs(ratio - 1))}"


def _advice(found: Comparison, metric: str, interleaving: Interleaving, *, ab: bool) -> str:
    if interleaving == "separate":
        return "Use `lorameter ab`, or stop other work."
    if found.replicates_needed is not None and found.replicates_needed <= MOST_ADVISED:
        return f"Measure {found.replicates_needed} replicates, or stop other work."
    if metric in METRICS and METRICS[metric].phase == "cold":
        return "Stop other work: a cold start is a process of its own, and takes turns with no other."
    if interleaving == "replicates":
        return "Let processes take turns (--interleave lockstep), or stop other work."
    return f"Stop other work, or take more turns (turns in [protocol]){'' if ab else ', or use `lorameter ab`'}."
