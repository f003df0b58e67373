"""What an A/B's effect is laid to, in words: sides, level, packages, other facts, and the ratio of each part."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from harness.records.store import Manifest, Run
from harness.report.attribution import MOST_PACKAGES, describe_attribution
from harness.report.terminal import show
from harness.stats import compare_trials
from harness.verdicts.ab import Attribution, Part
from harness.verdicts.comparand import Difference


def run_of(**changes):
    sides = {
        "base": {"label": "peft[extra]==0.19.1", "worker": "1.0 sha256:0123"},
        "candidate": {"label": "topic", "worker": None},
    }
    fields = {"interleaving": "lockstep", "why": "three [live] processes fit", "stopped": None} | changes
    manifest = Manifest(
        run="ab", study={}, phases=("train",), order=(), seed=0, created_unix_s=1.0, provenance={}, fingerprint="f",
        sides=sides, **fields,
    )  # fmt: skip
    return Run(path=Path("ab"), manifest=manifest, records=())


@pytest.fixture
def said():
    """A function that prints an attribution and returns its lines."""

    def text(packages=None, differing=(), parts=(), **changes):
        out = io.StringIO()
        attribution = Attribution(packages=packages or {}, differing=tuple(differing), parts=tuple(parts))
        show(describe_attribution(attribution, run_of(**changes)), Console(file=out, width=120))
        return [line.rstrip() for line in out.getvalue().splitlines()]

    return text


def part(metric, *ratios):
    comparison = compare_trials([[1.0]] * len(ratios), [[ratio] for ratio in ratios], pairing="replicate")
    return Part(variant="nf4", metric=metric, comparison=comparison)


def test_both_sides_are_named_with_their_harness(said):
    """As they were written, brackets and all, whether or not a version is known."""
    lines = said()
    assert lines[2].split() == ["base", "peft[extra]==0.19.1,", "harness", "1.0", "sha256:0123"]
    assert lines[3].split() == ["candidate", "topic,", "harness", "None"]


def test_the_level_and_its_reason_stand_above_every_ratio(said):
    """And why the run ended early, only where it did."""
    assert "  level      lockstep: three [live] processes fit" in said()
    assert not any("stopped" in line for line in said())
    assert "  stopped    within ±1 % [of it]" in said(stopped="within ±1 % [of it]")


def test_packages_are_shown_with_both_versions(said):
    """One that a side lacks is not installed there."""
    lines = said({"peft": ("0.19.1", "0.20.0"), "torchao": (None, "0.1"), "triton": ("3.0", None)})
    assert "  package    peft: 0.19.1 → 0.20.0" in lines
    assert "  package    torchao: not installed → 0.1" in lines
    assert "  package    triton: 3.0 → not installed" in lines


@pytest.mark.parametrize(("count", "more"), [(MOST_PACKAGES, 0), (MOST_PACKAGES + 30, 30)])
def test_hundreds_of_packages_do_not_bury_the_rest(said, count, more):
    """The first are listed and the others counted."""
    lines = [line for line in said({f"p{i}": ("1", "2") for i in range(count)}) if "package" in line]
    assert len(lines) == MOST_PACKAGES + (more > 0)
    assert (f"and {more} more" in lines[-1]) == (more > 0)


def test_other_facts_that_differ_are_named(said):
    """Both values, as in a comparison of two runs."""
    lines = said(differing=[Difference(field="python", base="3.11.0", candidate="3.12.0")])
    assert "  differs    python: '3.11.0' in the base, '3.12.0' in the candidate" in lines


def test_each_part_stands_with_its_interval(said):
    """By its title, and said not to be corrected for looking at all of them."""
    lines = said(parts=[part("first_token_time_s", 1.49, 1.5, 1.51), part("step_time_s", 1.5)])
    text = "\n".join(lines)
    assert "not corrected" in text
    row = next(line for line in lines if "time to first token" in line)
    assert "nf4" in row
    assert "1.500 [1.475, 1.525]" in row
    assert "1.5 [no interval]" in next(line for line in lines if "step time" in line)
