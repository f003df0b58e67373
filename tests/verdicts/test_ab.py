"""Tests of the verdicts of A/B runs with exact numbers: by turn, by variant, by the control, and the exit code."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest

from lorameter.cli import main
from lorameter.errors import UsageError
from lorameter.records import codec, store
from lorameter.records.record import Failure, TrialRecord
from lorameter.records.store import Manifest, RunWriter
from lorameter.verdicts.ab import attribute_difference, build_report

TURNS = 30
MIB = 2**20
FACTS = {"python": "3.11.0", "cuda": None, "git": {"commit": None, "dirty": None}, "packages": {"peft": "0.19.1"}}
ARMS = (("base", "variant"), ("candidate", "variant"), ("base", "control"))


@pytest.fixture
def write_ab(tmp_path, small_study):
    """A function that writes an A/B run as the runner would and reads it back.

    In each replicate and turn the machine's noise affects all arms equally and is far larger than `noise`, each arm's
    own. `ratios` are the candidate's step times over the base's by variant; the first variant has the control, whose
    ratio is `control`; each may be a list with one value for each replicate. `change` changes each record before it is
    written and drops it by returning None; such a trial was never planned.
    """

    def write(
        ratios, *, control=1.0, replicates=8, noise=0.02, phases=("train",), status="complete", stopped=None,
        change=lambda record: record, sides=(FACTS, FACTS), level="lockstep", peaks=((MIB,), (MIB,)),
    ):  # fmt: skip
        study = dataclasses.replace(
            small_study, variants=tuple(variant for variant in small_study.variants if variant.name in ratios)
        )
        records = []

        def add(variant, side, role, replicate, suffix="", **fields):
            trial = f"r{replicate}-{variant}-{side}{'-control' if role == 'control' else ''}{suffix}"
            defaults = {"interleaving": "replicates" if suffix else level, "status": "ok"}
            records.append(TrialRecord(
                trial=trial, name=variant, variant=study.variant(variant).id, side=side, role=role, seed=replicate,
                replicate=replicate, position=len(records), started_unix_s=1.0 + replicate, wall_time_s=1.0,
                **defaults | fields,
            ))  # fmt: skip

        for replicate in range(replicates):
            for index, (variant, ratio) in enumerate(ratios.items()):
                rng = random.Random(f"{replicate} {variant}")
                level_s = 0.1 * math.exp(rng.gauss(0, 0.3))
                machine = [level_s * math.exp(rng.gauss(0, 0.3)) for _ in range(TURNS)]
                for side, role in ARMS if index == 0 else ARMS[:2]:
                    factor = {"candidate": ratio, "base": control if role == "control" else 1.0}[side]
                    factor = factor[replicate] if isinstance(factor, list) else factor
                    steps = tuple(turn * factor * math.exp(rng.gauss(0, noise)) for turn in machine)
                    counts = {"turn_tokens": (64.0,) * TURNS, "turn_sequences": (2.0,) * TURNS}
                    samples = {"step_time_s": steps, "step_cpu_time_s": steps} | counts
                    if "generate" in phases:
                        samples["request_time_s"] = tuple(3 * step for step in steps)
                    add(variant, side, role, replicate, samples=samples, turn_lengths=(1,) * TURNS)
                for side, sizes in zip(("base", "candidate"), peaks, strict=True):
                    if replicate < len(sizes):
                        add(
                            variant,
                            side,
                            "variant",
                            replicate,
                            "-isolated",
                            memory={"host_peak_train_bytes": sizes[replicate]},
                        )
        kept = [changed for record in records if (changed := change(record)) is not None]
        writer = RunWriter(tmp_path / "runs", Manifest(
            run="ab", study=codec.to_json(study), phases=phases, interleaving=level, seed=0, created_unix_s=1.0,
            order=tuple(record.trial for record in kept), fingerprint="f", why="they fit",
            provenance={"device": "cpu", "device_name": "Test CPU"},
            sides={
                side: {"label": label, "worker": "1.0 sha256:0", "facts": facts}
                for side, label, facts in zip(("base", "candidate"), ("main", "topic"), sides, strict=True)
            },
        ))  # fmt: skip
        (writer.path / "trials.jsonl").unlink(missing_ok=True)
        for record in kept:
            writer.append(record)
        writer.finish(status, stopped=stopped)
        return store.read_run(str(writer.path), tmp_path / "runs")

    return write


@pytest.fixture
def report(tmp_path, capsys):
    """A function that runs `lorameter report ab` and returns its exit code and output, a document with --json."""

    def run(*options):
        code = main(["report", "ab", "--runs-dir", str(tmp_path / "runs"), *options])
        text = capsys.readouterr().out
        return code, json.loads(text) if "--json" in options else text

    return run


def verdicts_of(report, metric="step_time_s"):
    return {row.variant: row.verdict for row in report.comparisons if row.metric == metric}


def alternating(size, count=8):
    """Return ratios around 1, one for each replicate, with too much scatter for a verdict."""
    return [math.exp(size if index % 2 else -size) for index in range(count)]


# --- verdicts and exit codes ------------------------------------------------------------------------------------------


def test_a_slower_candidate_is_a_regression(write_ab, report):
    """A slow-down of 5 % is found although the machine varies by 30 % between turns; the other variant is equivalent;
    the exit code is 1."""
    write_ab({"plain": 1.0, "nf4": 1.05})
    code, document = report("--json")
    assert code == document["exit"] == 1
    times = {row["variant"]: row for row in document["comparisons"] if row["metric"] == "step_time_s"}
    assert {name: row["verdict"] for name, row in times.items()} == {"plain": "equivalent", "nf4": "regressed"}
    assert 1.03 < times["nf4"]["low"] < 1.05 < times["nf4"]["high"] < 1.07
    assert {row["interleaving"] for row in times.values()} == {"lockstep"}
    assert (document["base"], document["candidate"], document["run"]) == ("main", "topic", "ab")
    assert document["control"]["train"]["verdict"] == "equivalent"


def test_an_inconclusive_control_forbids_equivalent(write_ab, report):
    """Equivalent verdicts become inconclusive (3), and the reason names the control; memory peaks keep their
    verdicts."""
    run = write_ab({"plain": 1.0, "nf4": 1.0}, control=alternating(0.1))
    found = build_report(run)
    assert found.control["train"].verdict == "inconclusive"
    assert set(verdicts_of(found).values()) == {"inconclusive"}
    assert "base against itself" in found.comparisons[0].reason
    assert set(verdicts_of(found, "host_peak_train_bytes").values()) == {"equivalent"}
    code, text = report()
    assert code == 3
    assert "Gate failed (exit 3)" in text


def test_a_base_that_differs_from_itself_makes_everything_invalid(write_ab, report):
    """For any candidate the exit code is 4, and there is no ratio."""
    run = write_ab({"plain": 1.5, "nf4": 1.0}, control=1.1)
    found = build_report(run)
    assert found.control["train"].verdict == "regressed"
    assert {row.verdict for row in found.comparisons} == {"invalid"}
    assert all(row.ratio is None and "control regressed" in row.reason for row in found.comparisons)
    code, text = report()
    assert code == 4
    assert "Gate failed (exit 4)" in text


def oom(record):
    failure = Failure(phase="build", kind="MemoryError", message="no memory left")
    return record.replaced(status="oom", samples={}, failure=failure)


def fallback(record):
    check = {"path": "base.bits", "required": 4, "observed": 16, "status": "fallback", "reason": "seen"}
    return record.replaced(checks=(check,))


@pytest.mark.parametrize(
    ("side", "fault", "words"),
    [
        ("base", oom, "r2-nf4-base: oom in build: no memory left"),
        ("candidate", oom, "r2-nf4-candidate: oom in build: no memory left"),
        ("candidate", fallback, "base.bits is fallback"),
    ],
)
def test_a_faulty_trial_makes_only_its_variant_invalid(write_ab, report, side, fault, words):
    """A failed trial, or one with an inactive required path, exits with 4 although the other variant regressed."""

    def change(record):
        return fault(record) if record.trial == f"r2-nf4-{side}" else record

    found = build_report(write_ab({"plain": 1.2, "nf4": 1.0}, change=change))
    assert verdicts_of(found) == {"plain": "regressed", "nf4": "invalid"}
    assert words in next(row.reason for row in found.comparisons if row.variant == "nf4")
    assert report("--json")[0] == 4


def test_a_control_that_was_not_measured_or_died_makes_the_run_invalid(write_ab):
    """Without a control the run does not show what "no difference" looks like."""

    def without(record):
        return None if record.role == "control" else record

    def died(record):
        return record.replaced(status="timeout", samples={}) if record.trial == "r1-plain-base-control" else record

    for change, message in ((without, "was not measured"), (died, "r1-plain-base-control of the control is timeout")):
        found = build_report(write_ab({"plain": 1.0, "nf4": 1.0}, change=change))
        assert {row.verdict for row in found.comparisons} == {"invalid"}
        assert message in found.comparisons[0].reason


def test_a_run_without_sides_is_refused(write_run, tmp_path):
    """The error names the command that compares two runs."""
    run = store.read_run(str(write_run("a", {"plain": [0.1, 0.1], "nf4": [0.2, 0.2]})), tmp_path / "runs")
    for read in (build_report, attribute_difference):
        with pytest.raises(UsageError, match=r"run a: it has no sides.*lorameter compare"):
            read(run)


# --- how it is computed -----------------------------------------------------------------------------------------------


def test_trials_are_paired_turn_by_turn(write_ab):
    """The medians of a replicate differ threefold by chance but the turns always by 3 %: the interval is that of the
    turns."""

    def bimodal(record):
        """Make 5 of 11 turns three times as slow for all arms, and a sixth turn for one arm, another one in every
        replicate."""
        if "step_time_s" not in record.samples:
            return record
        slow_arm = ("base", "candidate", "control")[record.replicate % 3]
        steps = [0.1] * 6 + [0.3] * 5
        if slow_arm == ("control" if record.role == "control" else record.side):
            steps[0] = 0.3
        factor = 1.03 if record.side == "candidate" else 1.0
        # replicates differ by a thousandth, so that there is some scatter
        times = tuple(step * factor * (1 + record.replicate / 1000) for step in steps)
        return record.replaced(samples=record.samples | {"step_time_s": times})

    row = build_report(write_ab({"plain": 1.0}, change=bimodal, replicates=9)).comparisons[0]
    assert row.verdict == "regressed"
    assert 1.0299 < row.low <= 1.03 <= row.high < 1.0301
    assert "paired turn by turn" in row.reason


def test_every_phase_has_its_metric_and_its_control(write_ab):
    """A control that fails in one phase makes the run invalid; its intervals share the error rate over the phases."""
    run = write_ab({"plain": 1.0}, phases=("train", "generate"))
    assert {row.metric for row in build_report(run).comparisons} == {
        "step_time_s", "request_time_s", "host_peak_train_bytes",
    }  # fmt: skip
    assert set(build_report(run).control) == {"train", "generate"}

    def slow_requests(record):
        if record.role != "control":
            return record
        slow = tuple(1.2 * time for time in record.samples["request_time_s"])
        return record.replaced(samples=record.samples | {"request_time_s": slow})

    found = build_report(write_ab({"plain": 1.0}, phases=("train", "generate"), change=slow_requests))
    assert {phase: result.verdict for phase, result in found.control.items()} == {
        "train": "equivalent", "generate": "regressed",
    }  # fmt: skip
    assert "97.5 % interval" in found.control["generate"].reason
    assert {row.verdict for row in found.comparisons} == {"invalid"}


# --- policy, attribution, notices -------------------------------------------------------------------------------------


def test_attribution_shows_which_part_moved(write_ab):
    """If only the first token is slower, the ratio of each part is shown next to the request's."""

    def parts(record):
        if not record.samples:
            return record
        slow = 1.5 if record.side == "candidate" else 1.0
        times = record.samples["request_time_s"]
        split = {"first_token_time_s": tuple(slow * time for time in times), "time_per_output_token_s": times}
        return record.replaced(samples=record.samples | split, values={"new_tokens": 4.0})

    run = write_ab({"plain": 1.0}, phases=("train", "generate"), change=parts, noise=0.001)
    ratios = {part.metric: part.ratio for part in attribute_difference(run).parts}
    assert ratios["first_token_time_s"] == pytest.approx(1.5, rel=0.01)
    assert ratios["time_per_output_token_s"] == pytest.approx(1.0, rel=0.01)
    assert {"step_time_s", "request_time_s"} <= set(ratios)
    assert "cold_start_time_s" not in ratios
