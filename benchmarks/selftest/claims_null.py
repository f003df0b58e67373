"""Does a run of identical settings support claims of effects, and are effects found that are there?

    python benchmarks/selftest/claims_null.py [--draws N]

Simulated runs of the built-in study of LoRA parameters (its settings, its control, its protocol on a CPU), because only
there the truth is known. Three sets:

null                no setting does anything; claims as the study has them
null, at the limit  the same, with every tolerance and margin at nearly zero: the truth lies at the limit of each
                    statement, and nothing but its interval protects it
planted             step time rises by 4 % from r 16 to 512, loss falls by 3 % from alpha 16 to 256, parameters grow
                    with alpha; nothing else does anything

A run errs if it supports any effect, or refutes any equality, that is not there; in the planted set, if any verdict is
the opposite of the truth. Promised is at most 5 % of such runs in each set (the bound holds unless an exact binomial
test at 1 % says otherwise), and that each planted effect is found in at least 80 %. Exit status 1, with the reasons, if
a promise does not hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import stats
from simulated_study import Truth, simulated_run

from harness.machine.provenance import probe_machine
from harness.machine.repository import git_state
from harness.studies.study import Study
from harness.studies.study_file import load_study
from harness.verdicts.claims import ClaimsReport, judge_claims

STUDY = "llama2-lora-parameters"
NOMINAL, POWER, DOUBT = 0.05, 0.8, 0.01
EFFECTS = ("trend-up", "trend-down", "differs", "highest", "lowest", "best", "largest-effect")
EQUALITIES = ("equal", "no-trend")
FOUND = ("1", "1 train", "2", "4", "5", "6", "8", "9", "12")
"""Claims that are true in the planted set."""
FALSE = ("3", "3 natural", "7", "7 natural", "10", "10 natural", "11")

NULL = Truth()
PLANTED = Truth(
    times=lambda variant: 1.04 ** (math.log2(variant.r / 16) / 5),
    losses=lambda variant: 0.97 ** (math.log2(variant.lora_alpha / 16) / 4),
    parameters=lambda variant: variant.lora_alpha / 16,
    claims=dict.fromkeys(FOUND, "supported") | dict.fromkeys(FALSE, "refuted"),
)


def at_the_limit(study: Study) -> Study:
    """The study with every limit so small that a null effect lies at it."""
    return dataclasses.replace(
        study,
        claims=tuple(
            dataclasses.replace(
                claim, parts=tuple(dataclasses.replace(part, tolerance=0.0, margin=1e-9) for part in claim.parts)
            )
            for claim in study.claims
        ),
    )


@dataclass(frozen=True)
class Cell:
    """In how many runs of a set something happened, and how often it may or must."""

    row: str
    count: int
    draws: int
    most: float | None = None
    least: float | None = None

    @property
    def share(self) -> float:
        """Of the runs."""
        return self.count / self.draws

    @property
    def interval(self) -> tuple[float, float]:
        """Clopper and Pearson's 95 % interval of the share."""
        found = stats.binomtest(self.count, self.draws).proportion_ci(0.95, "exact")
        return float(found.low), float(found.high)

    @property
    def holds(self) -> bool:
        """Whether the count can come from a share within the bounds."""
        return all(
            bound is None or stats.binomtest(self.count, self.draws, bound, side).pvalue > DOUBT
            for bound, side in ((self.most, "greater"), (self.least, "less"))
        )


@dataclass(frozen=True)
class Set:
    """Runs of one truth."""

    name: str
    study: Study
    truth: Truth
    seed: int


def sets(study: Study) -> tuple[Set, ...]:
    """The three of them."""
    return (
        Set("null", study, NULL, 1),
        Set("null, at the limit", at_the_limit(study), NULL, 2),
        Set("planted", study, PLANTED, 3),
    )


def errors(report: ClaimsReport, truth: Truth) -> set[str]:
    """The kinds of error that a run makes."""
    parts = [part for claim in report.claims for part in claim.parts]
    if not truth.claims:
        made = {"an effect is supported": [part.rule in EFFECTS and part.verdict == "supported" for part in parts]}
        made["an equality is refuted"] = [part.rule in EQUALITIES and part.verdict == "refuted" for part in parts]
        made["either"] = [*made["an effect is supported"], *made["an equality is refuted"]]
    else:
        opposite = {"supported": "refuted", "refuted": "supported"}
        made = {"a verdict is wrong": [one.verdict == opposite[truth.claims[one.id]] for one in report.claims]}
    made["a control fails"] = [not report.valid]
    return {kind for kind, found in made.items() if any(found)}


def measure(one: Set, draws: int) -> Iterator[Cell]:
    """The errors of a set, and what became of each claim where that is planted."""
    rng = np.random.default_rng([4, one.seed])
    made: Counter[str] = Counter()
    verdicts: dict[str, Counter[str]] = {claim.id: Counter() for claim in one.study.claims}
    for _ in range(draws):
        report = judge_claims(simulated_run(one.study, one.truth, rng))
        made.update(errors(report, one.truth))
        for claim in report.claims:
            verdicts[claim.id][claim.verdict] += 1
    kinds = (
        ("a verdict is wrong",) if one.truth.claims else ("an effect is supported", "an equality is refuted", "either")
    )
    for kind in kinds:
        yield Cell(f"{one.name}: {kind}", made[kind], draws, most=NOMINAL)
    # Two families of controls (the phases' and the other metrics'), each at the nominal rate.
    yield Cell(f"{one.name}: a control fails", made["a control fails"], draws, most=2 * NOMINAL)
    says = {claim.id: claim.says for claim in one.study.claims}
    yield from (_power(one, key, says[key], verdicts, draws) for key in one.truth.claims)


def _power(one: Set, key: str, says: str, verdicts: Mapping[str, Counter[str]], draws: int) -> Cell:
    right = one.truth.claims[key]
    least = POWER if right == "supported" else None
    return Cell(f"{one.name}: claim {key} is {right} ({says})", verdicts[key][right], draws, least=least)


def table(cells: list[Cell], study: Study) -> Table:
    """A row a cell, in percent."""
    replicates, turns = study.protocol.replicates, study.protocol.turns
    result = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"{len(study.variants)} settings and the control, {replicates} replicates × {turns} turns: runs in which",
        title_justify="left",
        caption="%: of the runs, with Clopper and Pearson's 95 % interval",
        caption_justify="left",
    )
    result.add_column("")
    for head in ("runs", "%", "interval", "promised"):
        result.add_column(head, justify="right")
    for cell in cells:
        low, high = cell.interval
        promised = f"≤ {100 * cell.most:g}" if cell.most is not None else ""
        promised = f"≥ {100 * cell.least:g}" if cell.least is not None else promised
        share = f"{100 * cell.share:.1f}"
        result.add_row(cell.row, str(cell.draws), share, f"{100 * low:.1f}–{100 * high:.1f}", promised)
    return result


def main(arguments: list[str]) -> int:
    """Simulate, print, judge."""
    parser = argparse.ArgumentParser(description="False statements and power of the verdicts on claims, simulated.")
    parser.add_argument("--draws", type=int, default=500, help="runs a set (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.draws < 1:
        parser.error("--draws: simulate at least one run")
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120, no_color=True)
    machine, state = probe_machine(), git_state(Path(__file__).parent)
    changes = " with local changes" if state["dirty"] else ""
    console.print(f"{machine.device_name}, {machine.cpus} CPUs; commit {str(state['commit'])[:10]}{changes}")
    study = load_study(STUDY, device="cpu")
    cells = [cell for one in sets(study) for cell in measure(one, options.draws)]
    console.print(table(cells, study))
    failed = [cell for cell in cells if not cell.holds]
    for cell in failed:
        bound = f"at most {cell.most:.0%}" if cell.most is not None else f"at least {cell.least:.0%}"
        console.print(
            f"does not hold: {cell.row}: {cell.share:.1%} of {cell.draws} runs, {bound} is promised",
            markup=False,
            soft_wrap=True,
        )
    if not failed:
        console.print("holds: every promise", markup=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
