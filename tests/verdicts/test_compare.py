"""Tests of comparing two runs: every verdict with its reason and exit code."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys

import pytest

from lorameter.cli import main
from lorameter.studies.variant import LoraVariant
from lorameter.verdicts import compare as verdicts

BASE = {"plain": [0.100, 0.101, 0.099, 0.1005], "nf4": [0.200, 0.201, 0.199, 0.2005]}


def slower(factor, *names):
    """Return the base's step times, with the named variants slower by a factor."""
    return {name: [time * (factor if name in names else 1.0) for time in times] for name, times in BASE.items()}


@pytest.fixture
def compare(tmp_path, capsys):
    """A function that runs the command with --json and returns exit code and document."""

    def run(base, candidate, *options):
        code = main(["compare", str(base), str(candidate), "--json", "--runs-dir", str(tmp_path / "runs"), *options])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out else captured.err

    return run


def verdicts_of(document, metric="step_time_s"):
    return {row["variant"]: row["verdict"] for row in document["comparisons"] if row["metric"] == metric}


def reasons_of(document):
    return " | ".join(row["reason"] for row in document["comparisons"])


def test_a_slower_variant_is_a_regression(write_run, compare):
    """The exit code is 1, the ratio is above 1 with its interval, the other variant is inconclusive, and the document
    has the contract's keys."""
    code, document = compare(write_run("a", BASE), write_run("b", slower(1.2, "nf4")))
    assert code == 1
    assert verdicts_of(document) == {"plain": "inconclusive", "nf4": "regressed"}
    row = next(row for row in document["comparisons"] if row["variant"] == "nf4")
    assert row["ratio"] == pytest.approx(1.2)
    assert 1.01 < row["low"] < 1.2 < row["high"]
    assert set(row) == {
        "variant", "metric", "verdict", "ratio", "low", "high", "tolerance", "margin", "reason", "interleaving",
        "replicates", "replicates_needed", "mde80", "share", "site",
            "difference",
    }  # fmt: skip
    assert (row["interleaving"], row["tolerance"], row["margin"], row["replicates"]) == ("separate", 0.01, 0.05, 4)
    assert document["schema"] == 2
    assert document["control"]["train"]["verdict"] == "equivalent"


def test_runs_of_different_times_are_never_equivalent(write_run, compare):
    """Runs with equal numbers are inconclusive in time (3); their memory peaks are equivalent."""
    code, document = compare(write_run("a", BASE), write_run("b", BASE))
    assert code == 3
    assert set(verdicts_of(document).values()) == {"inconclusive"}
    assert set(verdicts_of(document, "host_peak_train_bytes").values()) == {"equivalent"}
    assert "never called equivalent" in reasons_of(document)


def test_more_is_better_is_oriented(write_run, compare):
    """A throughput lower by a fifth gives a ratio above 1 and regressed."""
    code, document = compare(
        write_run("a", BASE), write_run("b", slower(1.25, "nf4")), "--metric", "tokens_per_s", "--metric", "held*"
    )
    assert code == 1
    assert {row["metric"] for row in document["comparisons"]} == {"tokens_per_s"}
    assert verdicts_of(document, "tokens_per_s")["nf4"] == "regressed"
    assert document["comparisons"][1]["ratio"] == pytest.approx(1.25)


@pytest.mark.parametrize(("options", "word"), [
    (["--metric", "step_tme_s"], "Did you mean 'step_time_s'"),
    (["--metric", "step_time_s", "--all-metrics"], "Give one of them"),
])  # fmt: skip
def test_metrics_that_cannot_be_chosen_are_refused(write_run, compare, options, word):
    """A misspelt metric is an error and not an empty comparison."""
    code, text = compare(write_run("a", BASE), write_run("b", BASE), *options)
    assert code == 2
    assert word in text


def test_a_larger_peak_is_a_regression(write_run, compare):
    """Memory is compared by its maximum with the tolerance, without a test."""
    inside = compare(write_run("a", BASE), write_run("b", BASE, peak=2**20 + 2**12), "--metric", "*peak*")
    beyond = compare("a", write_run("c", BASE, peak=2**20 + 2**15), "--metric", "*peak*")
    assert [code for code, _ in (inside, beyond)] == [0, 1]
    assert verdicts_of(beyond[1], "host_peak_train_bytes") == {"plain": "regressed", "nf4": "regressed"}


@pytest.mark.parametrize(("facts", "expected"), [
    ({"device_name": "Other CPU"}, "device_name: 'Test CPU' in the base, 'Other CPU' in the candidate"),
    ({"libraries": {"torch": "2.0", "transformers": "1.0", "peft": "1.0", "bitsandbytes": "1.0"}},
     "libraries.torch: '1.0' in the base, '2.0' in the candidate"),
    ({"workload": {"model": "tiny-llama", "batch_size": 4}}, "workload.batch_size: 2 in the base, 4 in the candidate"),
])  # fmt: skip
def test_different_fingerprints_are_not_comparable(write_run, compare, facts, expected):
    """Every comparison exits with 5, although one is 20 % slower, and names the field and both values."""
    code, document = compare(write_run("a", BASE), write_run("b", slower(1.2, "nf4"), facts=facts))
    assert code == 5
    assert {row["verdict"] for row in document["comparisons"]} == {"not_comparable"}
    assert all(expected in row["reason"] for row in document["comparisons"])
    assert all(row["ratio"] is None for row in document["comparisons"])
    assert len(document["differing"]) == 1


def test_force_compares_and_never_calls_equal(write_run, compare):
    """Ratios are shown with the differences; equal peaks are inconclusive, and the regression stays."""
    write_run("a", BASE)
    code, document = compare("a", write_run("b", slower(1.2, "nf4"), facts={"driver": "2"}), "--force")
    assert code == 1
    assert verdicts_of(document) == {"plain": "inconclusive", "nf4": "regressed"}
    assert set(verdicts_of(document, "host_peak_train_bytes").values()) == {"inconclusive"}
    assert document["differing"] == [{"field": "driver", "base": None, "candidate": "2"}]
    code, document = compare("a", write_run("c", BASE), "--force", "--metric", "*peak*")
    assert code == 0  # nothing differs, so that --force has no effect


def test_a_variant_that_changed_under_its_name_is_not_comparable(write_run, compare, small_study):
    """The reason names its differing fields; the unchanged variant is still compared."""
    changed = tuple(
        dataclasses.replace(variant, r=8, lora_alpha=32) if variant.name == "nf4" else variant
        for variant in small_study.variants
    )
    other = dataclasses.replace(small_study, variants=changed)
    code, document = compare(write_run("a", BASE), write_run("b", BASE, study=other))
    assert code == 5
    assert verdicts_of(document) == {"plain": "inconclusive", "nf4": "not_comparable"}
    assert "variant nf4: r: 4 in the base, 8 in the candidate" in reasons_of(document)
    assert [difference["field"] for difference in document["differing"]] == [
        "variant nf4: r",
        "variant nf4: lora_alpha",
    ]


def test_a_metric_that_one_side_lacks_is_named(write_run, compare):
    """A metric that is missing in the base has no baseline; one missing in the candidate is not comparable."""

    def without_peak(record):
        return record.replaced(memory={})

    write_run("a", BASE)
    write_run("b", BASE, change=without_peak)
    for base, candidate, verdict in (("a", "b", "not_comparable"), ("b", "a", "no_baseline")):
        code, document = compare(base, candidate)
        assert code == 5
        assert set(verdicts_of(document, "host_peak_train_bytes").values()) == {verdict}
        assert "inconclusive" in verdicts_of(document).values()


def fallback(record):
    checks = tuple(check | {"status": "fallback"} for check in record.checks)
    return record.replaced(checks=checks) if record.name == "nf4" else record


def oom(record):
    return record.replaced(status="oom", samples={}, memory={}) if record.trial == "r1-nf4" else record


@pytest.mark.parametrize(("change", "expected"), [(fallback, "base.bits is fallback"), (oom, "r1-nf4: oom")])
def test_a_trial_that_does_not_count_makes_its_variant_invalid(write_run, compare, change, expected):
    """On either side the exit code is 4; the other variant keeps its verdict."""
    write_run("good", BASE)
    write_run("bad", BASE, change=change)
    for base, candidate in (("good", "bad"), ("bad", "good")):
        code, document = compare(base, candidate)
        assert code == 4
        assert verdicts_of(document) == {"plain": "inconclusive", "nf4": "invalid"}
        assert expected in reasons_of(document)


def test_a_damaged_or_incomplete_record_file_is_invalid(write_run, compare):
    """A truncated line and a planned trial without a record make the run invalid."""
    write_run("good", BASE)
    damaged = write_run("bad", BASE) / "trials.jsonl"
    text = damaged.read_text()
    damaged.write_text(text + '{"schema": 1, "tri')
    code, document = compare("good", "bad")
    assert (code, "1 line of trials.jsonl damaged" in reasons_of(document)) == (4, True)
    damaged.write_text("\n".join(text.splitlines()[1:]) + "\n")
    code, document = compare("good", "bad")
    assert (code, "without a record" in reasons_of(document)) == (4, True)
    damaged.write_text("")
    damaged.with_name("manifest.json").write_text(damaged.with_name("manifest.json").read_text())
    assert compare("bad", "bad")[0] == 4


def test_an_ab_run_cannot_be_compared_with_another_run(write_run, compare):
    """An A/B run holds both sides and cannot be compared with another run."""
    manifest = write_run("b", BASE) / "manifest.json"
    sides = {side: {"label": "x", "worker": "y"} for side in ("base", "candidate")}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"sides": sides}))
    code, text = compare(write_run("a", BASE), "b")
    assert code == 2
    assert "lorameter report b" in text
    assert main(["accept", "b", "--runs-dir", str(manifest.parents[1])]) == 2


def test_an_unknown_run_is_refused(write_run, compare):
    """The command exits with 2 and lists the latest runs."""
    write_run("a", BASE)
    code, text = compare("a", "no-such-run")
    assert code == 2
    assert "no-such-run" in text
    assert "Latest runs: a" in text


def many(count):
    """Return a study of the given number of variants, and step times for each."""
    variants = tuple(LoraVariant(name=f"r{rank}", r=rank) for rank in range(1, count + 1))
    steps = {variant.name: [0.1 * variant.r * (1 + noise / 1000) for noise in (0, 1, -1, 2)] for variant in variants}
    return variants, steps


def test_a_shift_of_all_variants_is_a_change_of_the_machine(write_run, compare, small_study):
    """Six of six variants slower by a fifth are invalid (4), with their ratios; memory peaks keep their verdicts."""
    variants, steps = many(6)
    study = dataclasses.replace(small_study, variants=variants, reference="r1")
    moved = {name: [time * 1.2 for time in times] for name, times in steps.items()}
    code, document = compare(write_run("a", steps, study=study), write_run("b", moved, study=study))
    assert code == 4
    assert set(verdicts_of(document).values()) == {"invalid"}
    assert set(verdicts_of(document, "host_peak_train_bytes").values()) == {"equivalent"}
    assert "the machine changed" in reasons_of(document)
    assert document["comparisons"][0]["ratio"] == pytest.approx(1.2)


def test_metrics_that_follow_from_each_other_are_not_a_shift(write_run, compare):
    """One slower variant is slower in six metrics, which counts once."""
    phases = ("train", "generate")

    def more(record):
        samples = record.samples | {"step_cpu_time_s": record.samples["step_time_s"]}
        return record.replaced(samples=samples, values={"new_tokens": 8.0})

    write_run("a", {"plain": BASE["plain"]}, phases=phases, change=more)
    write_run("b", {"plain": [time * 1.2 for time in BASE["plain"]]}, phases=phases, change=more)
    code, document = compare("a", "b", "--metric", "*_time_s", "--metric", "*_per_s")
    assert code == 1
    assert [row["verdict"] for row in document["comparisons"]] == ["regressed"] * 6


@pytest.mark.parametrize(("count", "moving"), [(5, 5), (6, 5), (6, 1)])
def test_a_shift_of_a_few_variants_is_not_a_change_of_the_machine(write_run, compare, small_study, count, moving):
    """Five of five can be chance, and an unchanged variant contradicts a machine change: regressed (1)."""
    variants, steps = many(count)
    study = dataclasses.replace(small_study, variants=variants, reference="r1")
    moved = steps | {name: [time * 1.2 for time in steps[name]] for name in list(steps)[:moving]}
    code, document = compare(write_run("a", steps, study=study), write_run("b", moved, study=study))
    assert code == 1
    assert list(verdicts_of(document).values()) == ["regressed"] * moving + ["inconclusive"] * (count - moving)


# pytest-benchmark files of this project; test_pytest_plugin.py shows that the plugin writes them


@pytest.fixture
def saved(tmp_path):
    """A function that writes a file as the plugin does: four trials of three samples, and one more metric."""

    def write(name, *, step=0.1, facts=FACTS, about=(("invalid", None),), counts=(3, 3, 3, 3), identity="i"):
        trials = [[step * (1 + trial / 500)] * 3 for trial in range(4)]
        test = {
            "fullname": "test[0]",
            "stats": {"data": [sample for trial in trials for sample in trial]},
            "extra_info": {
                "name": "plain",
                "variant": identity,
                "metric": "step_time_s",
                "trials": [{"samples": count} for count in counts],
                "medians": {"first_step_time_s": [1.0, 1.1, 1.0, 1.1]},
                "memory": {"host_peak_train_bytes": 1000},
            },
        }
        data = {"machine_info": {"lorameter": facts}, "benchmarks": [test]}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data if about is None else data | {"lorameter": dict(about)}))
        return path

    return write


FACTS = {"device": "cpu", "libraries": {"torch": "1.0"}}


def test_files_of_lorameter_are_compared_by_their_trials(saved, compare):
    """Raw samples are split at the trial boundaries; other metrics are compared by the medians of the trials."""
    code, document = compare(saved("a"), saved("b", step=0.2))
    row = document["comparisons"][0]
    assert (code, row["verdict"], row["replicates"]) == (1, "regressed", 4)
    assert row["ratio"] == pytest.approx(2)
    _, document = compare(saved("a"), saved("b"), "--metric", "first_step_time_s")
    assert document["comparisons"][0]["replicates"] == 4


@pytest.mark.parametrize(("changes", "code", "expected"), [
    ({"facts": FACTS | {"device": "cuda"}}, 5, "device: 'cpu' in the base, 'cuda' in the candidate"),
    ({"facts": FACTS | {"driver": None}}, 5, "driver: None in the base, None in the candidate"),
    ({"facts": {}}, 5, "fingerprint: 'known' in the base, 'unknown' in the candidate"),
    ({"about": {"invalid": "its status is 'interrupted'"}}, 4, "'interrupted'"),
    ({"about": None}, 4, "it does not say whether its run is valid"),
    ({"about": {"invalid": None, "failed": {"nf4": "trial r0-nf4 is oom"}}}, 4, "r0-nf4 is oom"),
    ({"counts": (3, 3, 3, 4)}, 4, "and 12 were saved"),
    ({"counts": (3, 3, 3)}, 4, "and 12 were saved"),
    ({"counts": (3, 3, 3, 3, 0)}, 4, "and 12 were saved"),
    ({"identity": "j"}, 5, "variant plain: 'i' in the base, 'j' in the candidate"),
])  # fmt: skip
def test_an_invalid_or_different_file_of_lorameter_is_judged_as_a_run(saved, compare, changes, code, expected):
    """Reasons and exit codes are the same as for a run."""
    found, document = compare(saved("a"), saved("b", **changes))
    assert found == code
    assert expected in reasons_of(document)


# pytest-benchmark files that this project did not write


BENCH = """
import time
import pytest

@pytest.mark.parametrize("ms", [1, 2])
def test_sleep(benchmark, ms):
    benchmark.pedantic(time.sleep, args=(ms / 1000,), rounds=4)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The file and samples that the real pytest-benchmark writes in a process without this project's plugin."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "test_bench.py").write_text(BENCH)
    plugins = [word for name in ("cacheprovider", "lorameter", "hypothesispytest") for word in ("-p", f"no:{name}")]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "--rootdir", ".", "--benchmark-json=out.json"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return json.loads((folder / "out.json").read_text())


@pytest.fixture
def foreign(tmp_path, written):
    """A function that writes such a file, from another Python version if `python` is given."""

    def write(name, *, python=None):
        data = copy.deepcopy(written)
        data["machine_info"]["python_version"] = python or data["machine_info"]["python_version"]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data))
        return path

    return write


def test_a_foreign_file_is_one_replicate(foreign, compare):
    """Whatever its number of rounds, it has a ratio but no interval, is inconclusive (3), and the reason says how to
    save several."""
    code, document = compare(foreign("a"), foreign("b"))
    assert code == 3
    assert {row["verdict"] for row in document["comparisons"]} == {"inconclusive"}
    assert "compare '.benchmarks/*/*_NAME.json'" in reasons_of(document)
    assert all(row["ratio"] > 0 and row["low"] is None for row in document["comparisons"])
    assert {row["replicates"] for row in document["comparisons"]} == {1}
    assert {row["variant"] for row in document["comparisons"]} == {
        "test_bench.py::test_sleep[1]", "test_bench.py::test_sleep[2]",
    }  # fmt: skip


def test_foreign_files_are_comparable_only_with_similar_ones(foreign, write_run, compare):
    """Processor and Python version must agree, and a run does not have them in this form."""
    code, document = compare(foreign("a"), foreign("b", python="2.7"))
    assert code == 5
    assert "python_version" in reasons_of(document)
    code, document = compare(foreign("a"), write_run("a", BASE))
    assert code == 5
    assert {row["verdict"] for row in document["comparisons"]} == {"not_comparable"}


@pytest.mark.parametrize(("text", "expected"), [
    ("", "cannot be read as JSON"),
    ("[]", "some.json = []: a table is expected"),
    ('{"benchmarks": {}}', "benchmarks = {}: a list is expected"),
    ('{"benchmarks": [1]}', "benchmarks[0]"),
    ('{"benchmarks": [{"fullname": "a"}]}', "benchmarks[0].stats"),
    ('{"benchmarks": [{"fullname": "a", "stats": {"data": ["x"]}}]}', "benchmarks[0].stats.data[0] = 'x'"),
    ('{"benchmarks": [{"fullname": "a", "stats": {}}, {"fullname": "a", "stats": {}}]}', "a second benchmark"),
    ('{"benchmarks": [{"fullname": "t", "stats": {}, "extra_info": {"name": "a", "trials": [], "metric": "x"}}]}',
     "not a metric"),
])  # fmt: skip
def test_a_file_of_another_shape_is_refused_by_name(tmp_path, compare, text, expected):
    """The error has file, key and value, and the exit code is 2."""
    path = tmp_path / "some.json"
    path.write_text(text)
    code, message = compare(path, path)
    assert code == 2
    assert "some.json" in message
    assert expected in message


# Exit codes of verdicts


def compared(verdict):
    return verdicts.ComparisonRow(
        verdict=verdict, ratio=None, low=None, high=None, reason="", replicates=0, replicates_needed=None, mde80=None,
        variant="a", metric="step_time_s", tolerance=0.01, margin=0.05, interleaving="separate",
    )  # fmt: skip


@pytest.mark.parametrize(("found", "code"), [
    (["improved", "equivalent"], 0), (["regressed", "improved"], 1), (["inconclusive", "equivalent"], 3),
    (["invalid", "regressed", "no_baseline"], 4), (["no_baseline", "inconclusive"], 5), (["not_comparable"], 5),
    (["regressed", "not_comparable", "inconclusive"], 1), ([], 5),
])  # fmt: skip
def test_the_worst_verdict_decides(found, code):
    """The order is 4, 1, 5, 3, 0; a comparison without any metric does not pass."""
    assert verdicts.exit_code(map(compared, found)) == code
