"""Tests of the claims of engines, judged from runs with known numbers."""

from __future__ import annotations

import dataclasses

import pytest

from lorameter.studies.claim import Engine
from lorameter.verdicts.claims import judge_claims

COMPILED = Engine(title="the compiler", variant="r16", proof={"compile": True})
FASTER = {"rule": "faster", "axis": "engine", "by": 0.2}
COSTS = {"rule": "costs-at-most", "axis": "engine", "by": 0.2}
LESS = {"rule": "lowers", "axis": "engine", "by": 0.2}
PEAK = {"rule": "lowers", "axis": "engine", "metric": "peak_memory"}
DEVICE, HOST = "device_peak_allocated_train_bytes", "host_peak_train_bytes"


def check(observed, path="compile", status="active"):
    return {"path": path, "required": None, "observed": observed, "status": status, "reason": "as made up"}


def watched(ours=True, theirs=False, path="compile"):
    """Return a change of records that sets the observations with and without the engine."""

    def change(record):
        return record.replaced(checks=(check(ours if record.name == "r16" else theirs, path),))

    return change


def peaks(kind, ours, theirs, twin=None):
    """Return a change of records that also sets a peak in each replicate, in MiB."""

    def change(record):
        given = ours if record.name == "r16" else twin if record.role == "control" and twin is not None else theirs
        if record.name not in ("r16", "centre") or record.replicate >= len(given):
            return watched()(record)
        size = int(given[record.replicate] * 2**20)
        return watched()(record).replaced(memory={kind: size, "host_rss_at_start_bytes": 300 * 2**20})

    return change


@pytest.fixture
def judged(make_run, claim):
    """A function that returns the report on a run with one claim of one part."""

    def judge(part, factors=(), *, engine=COMPILED, change=None, **given):
        return judge_claims(make_run([claim(part)], factors, engine=engine, change=change or watched(), **given))

    return judge


def part_of(report):
    return report.claims[0].parts[0]


@pytest.mark.parametrize(
    ("part", "factor", "verdict"),
    [
        (FASTER, 1 / 1.3, "supported"), (FASTER, 1 / 1.1, "refuted"), (FASTER, 1.0, "refuted"),
        (FASTER, 1.3, "refuted"), (FASTER, 1 / 1.2, "inconclusive"),
        (COSTS, 1.1, "supported"), (COSTS, 0.8, "supported"), (COSTS, 1.4, "refuted"), (COSTS, 1.2, "inconclusive"),
        (LESS, 0.7, "supported"), (LESS, 0.9, "refuted"), (LESS, 1.1, "refuted"), (LESS, 0.8, "inconclusive"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("level", ["lockstep", "replicates"])
def test_each_promise_finds_the_truth(judged, part, factor, verdict, level):
    """Effects above, below and at the claimed size are judged right for each interleaving."""
    assert part_of(judged(part, {"r16": factor}, level=level)).verdict == verdict


def test_a_speed_is_reported_as_it_was_promised(judged):
    """The ratio is above one if faster, with its interval, its variants and the claimed size."""
    found = part_of(judged(FASTER, {"r16": 1 / 1.3}))
    assert found.ratio == pytest.approx(1.3, rel=0.01)
    assert found.low < 1.3 < found.high
    assert (found.about, found.by, found.tolerance, found.replicates) == ("speed, r16 / centre", 0.2, None, 6)
    assert found.reason.startswith("the speed of r16 over that of centre, by step time, is ×1.29")
    assert "more than 20 % faster" in found.reason
    lower = part_of(judged(LESS, {"r16": 0.7}))
    assert (lower.ratio, lower.about) == (pytest.approx(0.7, rel=0.01), "r16 / centre")
    assert lower.low < 0.7 < lower.high


def test_one_replicate_is_not_judged(judged):
    """Neither times nor peaks of one replicate are judged."""
    assert part_of(judged(FASTER, {"r16": 0.5}, replicates=1)).verdict == "not judged"
    found = part_of(judged(PEAK, change=peaks(DEVICE, [50], [100])))
    assert (found.verdict, found.ratio) == ("not judged", None)
    assert "1 replicate with every level" in found.reason


@pytest.mark.parametrize(
    ("proof", "ours", "theirs", "verdict", "words"),
    [
        ({"compile": True}, True, False, "supported", "yes in r16, no in centre"),
        ({"compile": True}, False, False, "not judged", "ran in r16 and only there"),
        ({"compile": True}, True, True, "not judged", "yes in r16, yes in centre"),
        ({"compile": True}, None, False, "not judged", "nothing in r16"),
        ({"compile": True}, 1.0, 0.0, "not judged", "1.0 in r16"),
        ({"optimizer.fused": "fused"}, "fused", "loop", "supported", "fused in r16, loop in centre"),
        ({"optimizer.fused": "fused"}, "foreach", "loop", "not judged", "foreach in r16"),
        ({"attention.backend": "flash"}, "flash", "flash+math", "not judged", "flash+math in centre"),
        ({"fused.kernels": "any"}, "rms_norm+rope", None, "supported", "nothing in centre"),
        ({"fused.kernels": "any"}, None, None, "not judged", "nothing in r16"),
        ({"padding.share": "less"}, 0.0, 0.4, "supported", "0.0 in r16, 0.4 in centre"),
        ({"padding.share": "less"}, 0.19, 0.4, "supported", "0.19 in r16"),
        ({"padding.share": "less"}, 0.2, 0.4, "not judged", "0.2 in r16"),
        ({"padding.share": "less"}, 0.39, 0.4, "not judged", "0.39 in r16"),
        ({"padding.share": "less"}, None, 0.4, "not judged", "nothing in r16"),
    ],
)  # fmt: skip
def test_nothing_is_judged_unless_the_engine_ran_there_alone(judged, proof, ours, theirs, verdict, words):
    """The observations count, not the requested settings."""
    engine, (path,) = dataclasses.replace(COMPILED, proof=proof), proof
    report = judged(FASTER, {"r16": 0.5}, engine=engine, change=watched(ours, theirs, path))
    assert part_of(report).verdict == verdict
    (shown,) = report.engine.proof
    assert words in shown.reason + part_of(report).reason
    assert (shown.found == "active") == (verdict == "supported")


def test_an_unwatched_step_is_unknown_and_proves_nothing(judged):
    """The test covers a step without a check, and one whose check failed, with its reason."""
    found = part_of(judged(FASTER, {"r16": 0.5}, change=lambda record: record))
    assert found.verdict == "not judged"
    assert "(r16: no observation shows it" in found.reason

    def broken(record):
        return record.replaced(checks=(check(True, status="unknown" if record.name == "r16" else "active"),))

    report = judged(FASTER, {"r16": 0.5}, change=broken)
    assert part_of(report).verdict == "not judged"
    assert report.engine.proof[0].found == "unknown"
    assert "r16: as made up" in part_of(report).reason


def test_one_trial_that_fell_back_prevents_a_judgement(judged):
    """The engine must have run in each watched trial."""

    def once(record):
        return watched(ours=record.replicate != 3)(record)

    assert part_of(judged(FASTER, {"r16": 0.5}, change=once)).verdict == "not judged"


@pytest.mark.parametrize(("isolated", "verdict"), [(True, "supported"), (False, "not judged")])
def test_leaking_records_prevent_a_judgement(judged, isolated, verdict):
    """Records that leak into each other prevent a judgement; if isolation is unknown, the evidence says so and the
    claim is judged."""
    engine = dataclasses.replace(COMPILED, proof={"compile": True, "packing.isolated": "not false"})

    def change(record):
        seen, safe = watched()(record), check(isolated, "packing.isolated")
        return seen.replaced(checks=(*seen.checks, safe)) if record.name == "r16" else seen

    assert part_of(judged(FASTER, {"r16": 0.5}, engine=engine, change=change)).verdict == verdict
    report = judged(FASTER, {"r16": 0.5}, engine=engine)
    assert part_of(report).verdict == "supported"
    assert [one.found for one in report.engine.proof] == ["active", "unknown"]

    def nothing(record):
        return record.replaced(checks=(*watched()(record).checks, check(None, "packing.isolated", "not_applicable")))

    report = judged(FASTER, {"r16": 0.5}, engine=engine, change=nothing)
    assert [one.found for one in report.engine.proof] == ["active", "unknown"]


@pytest.mark.parametrize(
    ("kind", "ours", "theirs", "twin", "verdict", "words"),
    [
        (DEVICE, [50, 51], [100, 100], None, "supported", "device peak 50 MiB to 51 MiB in r16, 100 MiB in centre"),
        (DEVICE, [100, 100], [100, 100], None, "refuted", "no fall of more than 1 %"),
        (DEVICE, [98, 100], [100, 100], None, "inconclusive", "open whether"),
        (DEVICE, [97, 97], [100, 100], [96, 96], "inconclusive", "open whether"),
        (HOST, [350, 350], [400, 400], [400, 401], "supported", "resident memory, 300 MiB of which it begins with"),
        (HOST, [395, 390], [400, 400], [391, 400], "not judged", "so it refutes nothing"),
        (HOST, [350, 350], [400, 400], [], "not judged", "the reference was not measured twice"),
        (HOST, [400, 400], [400, 400], [400, 400], "not judged", "so it refutes nothing"),
        (HOST, [440, 440], [400, 400], [400, 400], "not judged", "Measure on a GPU."),
    ],
)
def test_peaks_are_judged_by_their_range(judged, kind, ours, theirs, twin, verdict, words):
    """A device's peak is judged in both directions with the range of the reference and its control; a process's peak
    only if it shows a saving."""
    found = part_of(judged(PEAK, change=peaks(kind, ours, theirs, twin)))
    assert (found.verdict, found.metric) == (verdict, "peak_memory")
    assert words in found.reason
    assert (found.ratio is None) == (verdict == "not judged")
