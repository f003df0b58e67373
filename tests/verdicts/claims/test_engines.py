"""Promises of engines, judged from runs whose every number is known."""

from __future__ import annotations

import dataclasses

import pytest

from harness.records import codec
from harness.studies.engine import Engine
from harness.studies.protocol import Protocol
from harness.studies.script import script_workload
from harness.studies.study import Study
from harness.studies.variant import Variant
from harness.studies.workload import Workload
from harness.verdicts.claims import document, judge_claims

COMPILED = Engine(title="the compiler", variant="r16", proof={"compile": True})
FASTER = {"rule": "faster", "axis": "engine", "by": 0.2}
COSTS = {"rule": "costs-at-most", "axis": "engine", "by": 0.2}
LESS = {"rule": "lowers", "axis": "engine", "by": 0.2}
PEAK = {"rule": "lowers", "axis": "engine", "metric": "peak_memory"}
DEVICE, HOST = "device_peak_allocated_train_bytes", "host_peak_train_bytes"


def check(observed, path="compile", status="active"):
    return {"path": path, "required": None, "observed": observed, "status": status, "reason": "as made up"}


def watched(ours=True, theirs=False, path="compile"):
    """A change of records: what was seen with the engine and without."""

    def change(record):
        return record.replaced(checks=(check(ours if record.name == "r16" else theirs, path),))

    return change


def peaks(kind, ours, theirs, twin=None):
    """The same with a peak in each replicate, in MiB."""

    def change(record):
        given = ours if record.name == "r16" else twin if record.role == "control" and twin is not None else theirs
        if record.name not in ("r16", "centre") or record.replicate >= len(given):
            return watched()(record)
        size = int(given[record.replicate] * 2**20)
        return watched()(record).replaced(memory={kind: size, "host_baseline_bytes": 300 * 2**20})

    return change


@pytest.fixture
def judged(make_run, claim):
    """A function: the report on a run with one claim of one part."""

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
    """Effects beyond what was promised, short of it, and at it, whichever way trials alternate."""
    assert part_of(judged(part, {"r16": factor}, level=level)).verdict == verdict


def test_a_speed_is_told_as_it_was_promised(judged):
    """Above one where it is faster, with its interval, what it is of, and what was promised."""
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
    """Neither of times nor of peaks."""
    assert part_of(judged(FASTER, {"r16": 0.5}, replicates=1)).verdict == "not judged"
    found = part_of(judged(PEAK, change=peaks(DEVICE, [50], [100])))
    assert (found.verdict, found.ratio) == ("not judged", None)
    assert "1 replicate measured it" in found.reason


@pytest.mark.parametrize(
    ("proof", "ours", "theirs", "verdict", "words"),
    [
        ({"compile": True}, True, False, "supported", "yes in r16, no in centre"),
        ({"compile": True}, False, False, "not judged", "was not seen to run in r16 and there alone"),
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
    """By what was observed, whatever was asked for."""
    engine, (path,) = dataclasses.replace(COMPILED, proof=proof), proof
    report = judged(FASTER, {"r16": 0.5}, engine=engine, change=watched(ours, theirs, path))
    assert part_of(report).verdict == verdict
    (shown,) = report.engine.proof
    assert words in shown.reason + part_of(report).reason
    assert (shown.found == "active") == (verdict == "supported")


def test_what_nobody_saw_is_unknown_and_proves_nothing(judged):
    """A step that was not watched, and one whose check failed, with the reason of the check."""
    found = part_of(judged(FASTER, {"r16": 0.5}, change=lambda record: record))
    assert found.verdict == "not judged"
    assert "unknown by compile (r16: nothing that was watched tells it" in found.reason

    def broken(record):
        return record.replaced(checks=(check(True, status="unknown" if record.name == "r16" else "active"),))

    report = judged(FASTER, {"r16": 0.5}, change=broken)
    assert part_of(report).verdict == "not judged"
    assert report.engine.proof[0].found == "unknown"
    assert "r16: as made up" in part_of(report).reason


def test_one_trial_of_many_that_fell_back_is_enough(judged):
    """The engine must have run in each that was watched."""

    def once(record):
        return watched(ours=record.replicate != 3)(record)

    assert part_of(judged(FASTER, {"r16": 0.5}, change=once)).verdict == "not judged"


@pytest.mark.parametrize(("isolated", "verdict"), [(True, "supported"), (False, "not judged")])
def test_what_is_not_won_fairly_is_not_judged(judged, isolated, verdict):
    """Records that see each other; where nobody could see whether they do, it is said and no obstacle."""
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
    """A device's either way, wider by what the reference differs from itself; a process's only where a saving shows."""
    found = part_of(judged(PEAK, change=peaks(kind, ours, theirs, twin)))
    assert (found.verdict, found.metric) == (verdict, "peak_memory")
    assert words in found.reason
    assert (found.ratio is None) == (verdict == "not judged")


def test_peaks_of_one_replicate_are_set_beside_each_other(judged):
    """What an instrument takes in the first replicate is on both sides of its ratio."""
    found = part_of(judged(PEAK, change=peaks(DEVICE, [90, 45], [100, 50])))
    assert (found.verdict, found.low, found.high) == ("supported", pytest.approx(0.9), pytest.approx(0.9))


def test_no_peak_at_all_is_not_judged(judged):
    """As where the run was cut short before the solo trials."""
    assert "0 replicates measured it" in part_of(judged(PEAK)).reason


def test_what_only_scripts_have_is_not_judged_of_the_catalogue(judged):
    """A part of a step that nobody told apart."""
    found = part_of(judged({"rule": "faster", "axis": "engine", "metric": "optimizer_time_s"}))
    assert (found.verdict, "seen in scripts alone" in found.reason) == ("not judged", True)


def of_scripts(run):
    """The run as one of two scripts: the same records under names that are commands."""
    study = codec.from_json(Study, run.manifest.study, "made")
    scripts = dataclasses.replace(
        study, workload=script_workload(), protocol=Protocol(phases=("train",)), reference="centre", replaced={},
        variants=(Variant(name="centre", command="python a.py"), Variant(name="r16", command="python b.py")),
    )  # fmt: skip
    return dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, study=codec.to_json(scripts)))


@pytest.mark.parametrize(
    ("held", "metric", "verdict", "differs"),
    [
        ((100.0, 100.0), "step_time_s", "supported", ""),
        ((100.0, 200.0), "step_time_s", "not judged", "a step holds 100.0 real tokens in centre and 200.0 in r16"),
        ((100.0, 200.0), "peak_memory", "not judged", "real tokens"),
        ((100.0, 200.0), "time_per_real_token_s", "supported", "real tokens"),
        (None, "step_time_s", "not judged", "how many tokens a step holds was not seen"),
    ],
)
def test_steps_of_scripts_that_hold_other_tokens_are_not_set_beside_each_other(
    make_run, claim, held, metric, verdict, differs
):
    """By their time or their peak; a token's time is judged, and what nobody could count is said."""

    def change(record):
        seen = watched()(record.replaced(values={"trainable_parameters": 8000.0}))
        count = held and held[record.name == "r16"]
        return seen if held is None else seen.replaced(samples=seen.samples | {"step_real_tokens": (count,) * 9})

    part = {"rule": "lowers", "by": 0.2} if metric == "peak_memory" else FASTER
    run = make_run([claim(part | {"axis": "engine", "metric": metric})], {"r16": 0.5}, engine=COMPILED, change=change)
    report = judge_claims(of_scripts(run))
    assert part_of(report).verdict == verdict
    why = "was not seen" if held is None else "another number of tokens"
    assert (why in part_of(report).reason) == (verdict == "not judged")
    assert report.engine.commands == {"centre": "python a.py", "r16": "python b.py"}
    assert (differs in " ".join(report.engine.differs)) if differs else not report.engine.differs


def test_versions_of_scripts_are_those_that_their_processes_tell(make_run, claim):
    """Not those of the interpreter that was found before the start; where they differ it is said, with both."""
    stated = {"device": "cpu", "device_name": "A", "threads": 1, "python": "3.11.7", "libraries": {"torch": "2.13.0"}}

    def change(record):
        engine = record.name == "r16"
        told = {"python": "3.12.1", "torch": "2.14.0", "liger-kernel": "0.8.5"} if engine else {
            "python": "3.12.1", "torch": "2.13.1"
        }  # fmt: skip
        samples = record.samples | {"step_real_tokens": (100.0,) * 9}
        values = {"trainable_parameters": 8000.0, "threads": 4.0 if engine else 2.0}
        return watched()(record.replaced(software=told, samples=samples, values=values))

    run = make_run([claim(FASTER)], {"r16": 0.5}, engine=COMPILED, change=change, provenance=stated)
    shown = judge_claims(of_scripts(run)).engine
    assert shown.versions == {"python": "3.12.1", "torch": "2.13.1 or 2.14.0"}
    assert shown.machine == "A (cpu, 2 or 4 threads a process)"
    assert "torch 2.13.1 in centre and 2.14.0 in r16" in shown.differs[0]
    assert "liger-kernel none in centre and 0.8.5 in r16" in shown.differs[0]
    assert shown.differs[1] == "r16: torch computes on 2 threads in centre and on 4 in r16."


@pytest.mark.parametrize("metric", ["step_time_s", "time_per_real_token_s", "peak_memory"])
@pytest.mark.parametrize("other", ["parameters", "losses"])
def test_scripts_that_are_not_the_same_training_are_not_judged(make_run, claim, metric, other):
    """Whatever their time: one trains a hundredth of the parameters, or has other losses on the same tokens."""

    def change(record):
        engine = record.name == "r16"
        count = 80.0 if engine and other == "parameters" else 8000.0
        loss = 4.0 if engine and other == "losses" else 2.0
        samples = record.samples | {"step_real_tokens": (100.0,) * 9, "warmup_loss": (loss,), "train_loss": (loss,) * 8}
        return watched()(record.replaced(values={"trainable_parameters": count}, samples=samples))

    part = {"rule": "lowers", "by": 0.2} if metric == "peak_memory" else FASTER
    run = make_run([claim(part | {"axis": "engine", "metric": metric})], {"r16": 0.5}, engine=COMPILED, change=change)
    found = part_of(judge_claims(of_scripts(run)))
    assert found.verdict == "not judged"
    assert "they are not the same training" in found.reason
    assert ("80 in r16" in found.reason) == (other == "parameters")


def test_batches_that_differ_by_replicate_have_no_peak_in_common(make_run, claim):
    """Also where they hold as many tokens in the mean: the largest batch makes the peak."""

    def change(record):
        count = 100.0 if (record.name == "r16") == (record.replicate % 2 == 0) else 200.0
        sized = peaks(DEVICE, [50] * 6, [100] * 6)(record)
        return sized.replaced(
            values={"trainable_parameters": 8000.0}, samples=sized.samples | {"step_real_tokens": (count,) * 9}
        )

    run = make_run([claim(PEAK)], {"r16": 0.5}, engine=COMPILED, change=change)
    assert "another number of tokens" in part_of(judge_claims(of_scripts(run))).reason


def test_steps_of_a_workload_of_ones_own_are_judged_by_the_token(make_run, claim):
    """As of scripts: packed and padded steps have no time in common."""
    run = make_run([claim(FASTER)], {"r16": 0.5}, engine=COMPILED, change=watched())
    own = {"r16": codec.to_json(Workload(layout="padded"))}
    report = judge_claims(dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, own_workloads=own)))
    assert part_of(report).verdict == "not judged"
    assert "another number of tokens" in part_of(report).reason


def test_a_reference_that_has_the_engine_as_well_is_told_how_to_be_without(judged):
    """As a trainer that turns it on by default."""
    found = part_of(judged(FASTER, {"r16": 1.0}, change=watched(True, True)))
    assert found.verdict == "not judged"
    assert "turn it off there; a command says so in braces: {off|on}." in found.reason


def test_a_control_that_failed_forbids_a_verdict(judged):
    """As of any claim."""
    assert part_of(judged(FASTER, {"r16": 0.5}, control=1.3)).verdict == "inconclusive"


def test_a_variant_without_a_trial_is_named(judged):
    """By its name, since its level says nothing."""
    report = judged(FASTER, change=lambda one: watched()(one.replaced(status="crashed" if one.name == "r16" else "ok")))
    assert part_of(report).verdict == "not judged"
    assert "r16" in part_of(report).reason


def test_the_document_has_what_it_takes_to_show_it(judged):
    """Machine, versions and proof, and no number without its name; of other studies nothing of it."""
    provenance = {
        "device": "cuda", "device_name": "A Card", "driver": "550", "cuda": "12.8", "threads": 1, "python": "3.11.7",
        "libraries": {"torch": "2.13.0", "triton": None}, "engine": {"liger-kernel": "0.8.5"},
    }  # fmt: skip
    found = document(judged(FASTER, {"r16": 0.5}, provenance=provenance))["engine"]
    assert found["machine"] == "A Card (cuda, 1 thread a process), driver 550"
    assert found["versions"] == {
        "python": "3.11.7", "torch": "2.13.0", "triton": None, "liger-kernel": "0.8.5", "cuda": "12.8",
    }  # fmt: skip
    assert found["proof"] == [
        {"path": "compile", "wanted": True, "found": "active", "with_engine": True, "without": False,
         "reason": "yes in r16, no in centre"}
    ]  # fmt: skip
    assert (found["variant"], found["reference"], found["commands"]) == ("r16", "centre", {})


def test_other_studies_say_nothing_of_an_engine(make_run, claim):
    """Their documents are what they were."""
    found = codec.to_json(judge_claims(make_run([claim(rule="trend-up")])))
    assert "engine" not in found
    assert "source" not in found["claims"][0]
    assert "by" not in found["claims"][0]["parts"][0]
