"""Tests of measured results: the folder of a real run, and pytest-benchmark's file of a real session."""

import json
from pathlib import Path

import pytest

from tests.contract import doors
from tests.contract.expected import MACHINE, check_document, check_run, check_shape, parse, read_records


@pytest.fixture(scope="module")
def measured(filled, tmp_path_factory):
    """The outcome and the folder of a real `lorameter run` of two variants and two replicates, training and
    generation."""
    runs = tmp_path_factory.mktemp("runs")
    words = ("--replicates", "2", "--phase", "train", "--phase", "generate", "--runs-dir", runs, "--json")
    outcome = doors.start("lorameter", "run", filled / "study.toml", *words)
    (run,) = (path for path in runs.iterdir() if path.is_dir())
    return outcome, run


def test_the_document_of_a_run(measured):
    """The run prints one document on standard output and progress on standard error, and exits with 0."""
    outcome, run = measured
    document = parse(outcome.out)
    assert outcome.code == (4 if document["status"] == "invalid" else 0)  # the control can fail on a busy machine
    assert document["trials"] == {"ok": len(read_records(run))}
    assert (document["run"], Path(document["path"])) == (run.name, run)
    assert f"[{len(read_records(run))}/" in outcome.err
    check_shape("json/run", document)


def test_the_folder_of_a_run(measured):
    """File names, and keys and types of the manifest and of each line of trials.jsonl, are the expected ones."""
    _, run = measured
    check_run("study", run)
    records = read_records(run)
    assert {(record["name"], record["role"]) for record in records if "step_time_s" in record["samples"]} == {
        ("lora", "variant"), ("lora", "control"), ("qlora", "variant"),
    }  # fmt: skip
    assert {record["replicate"] for record in records} == {0, 1}


def test_the_evidence_of_a_run(measured):
    """checks.jsonl has a line for every check that a record names by its hash."""
    _, run = measured
    lines = [json.loads(line) for line in (run / "checks.jsonl").read_text(encoding="utf-8").splitlines()]
    check_shape("runs/study-checks", lines)


def test_a_measured_run_is_read(measured, lorameter):
    """Every command that reads runs reads it."""
    _, run = measured
    for line in (f"report {run}", f"claims {run}", f"compare {run} {run}", f"export {run} --format csv --table trials"):
        outcome = lorameter(line)
        assert outcome.code in (0, 3, 4), outcome.err  # 4: the control can fail on a busy machine
        assert outcome.out
    assert set(doors.load(run).trials.status) == {"ok"}


@pytest.fixture(scope="module")
def session(filled, tmp_path_factory):
    """The outcome, folder and run of a real `pytest benchmarks/ --benchmark-save` of both variants and one
    replicate."""
    folder = tmp_path_factory.mktemp("session")
    words = (
        f"--lorameter-study={filled / 'study.toml'}", "--lorameter-replicates=1", f"--lorameter-runs-dir={folder}/runs",
        "--benchmark-save=contract", f"--benchmark-storage=file://{folder}/saved", "-k", "train_step or generate",
        "-p", "no:cacheprovider",
    )  # fmt: skip
    outcome = doors.start("pytest", doors.ROOT / "benchmarks", *words)
    (run,) = (path for path in (folder / "runs").iterdir() if path.is_dir())
    return outcome, folder, run


def read_saved(folder):
    (path,) = (folder / "saved").glob("*/*_contract.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_file_of_pytest_benchmark(session):
    """Keys and types are the expected ones, for pytest-benchmark's fields as far as the plugin fills them."""
    _, folder, _ = session
    saved = read_saved(folder)
    machine = {key: saved["machine_info"]["lorameter"][key] for key in sorted(saved["machine_info"]["lorameter"])}
    for key in MACHINE:
        machine.pop(key, None)
    ours = ("name", "fullname", "group", "param", "params", "extra_info")
    rows = [{key: row[key] for key in ours} | {"data": row["stats"]["data"]} for row in saved["benchmarks"]]
    document = {"keys": sorted(saved), "machine": machine, "lorameter": saved["lorameter"], "benchmarks": rows}
    check_shape("pytest/saved", document)
    check_document("pytest/names", [row["fullname"] for row in rows])


def test_durations_arrive_to_the_bit(session):
    """stats.data has the samples of the records in their order, and extra_info the boundaries of the trials."""
    outcome, folder, run = session
    records = {record["trial"]: record for record in read_records(run)}
    for row in read_saved(folder)["benchmarks"]:
        info = row["extra_info"]
        samples = [records[trial["trial"]]["samples"][info["metric"]] for trial in info["trials"]]
        assert row["stats"]["data"] == [sample for of_trial in samples for sample in of_trial]
        assert [trial["samples"] for trial in info["trials"]] == [len(of_trial) for of_trial in samples]
        assert info["run"] == run.name
        assert info["metric"] == {"train": "step_time_s", "generate": "request_time_s"}[row["group"]]
        assert {check["status"] for check in info["checks"] if check["required"] is not None} == {"active"}
    assert outcome.code in (0, 1)  # 1: the control can fail on a busy machine
    assert "4 passed" in outcome.out


def test_a_saved_file_is_compared(session, lorameter):
    """Comparing the saved file with its run equals comparing the run with itself."""
    _, folder, run = session
    (path,) = (folder / "saved").glob("*/*_contract.json")
    documents = [parse(lorameter(f"compare {base} {run} --metric step_time_s --json").out) for base in (run, path)]
    assert [[row["ratio"] for row in document["comparisons"]] for document in documents] == [[1.0, 1.0]] * 2


def test_a_run_is_replayed_without_measuring(session):
    """--lorameter-resume of a complete run saves the same durations again."""
    _, folder, run = session
    words = (f"--lorameter-resume={run.name}", f"--lorameter-runs-dir={run.parent}", "-k", "train_step and qlora")
    saved = folder / "again.json"
    outcome = doors.start(
        "pytest", doors.ROOT / "benchmarks", *words, f"--benchmark-json={saved}", "-p", "no:cacheprovider"
    )
    assert "1 passed" in outcome.out
    (row,) = json.loads(saved.read_text(encoding="utf-8"))["benchmarks"]
    (before,) = (one for one in read_saved(folder)["benchmarks"] if one["fullname"] == row["fullname"])
    assert row["stats"]["data"] == before["stats"]["data"]


def test_a_session_that_cannot_be_measured_is_refused():
    """The session exits with pytest's code for bad usage, before anything is measured."""
    words = ("--lorameter-study=no-such-study", "-p", "no:cacheprovider")
    outcome = doors.start("pytest", doors.ROOT / "benchmarks", *words)
    assert outcome.code == pytest.ExitCode.USAGE_ERROR
    assert "no-such-study" in outcome.err


def test_a_profile(lorameter, tmp_path):
    """`profile` prints one document with the time and memory of a step and the underlying facts."""
    outcome = lorameter(f"profile study.toml:lora --model random:micro --runs-dir {tmp_path} --json")
    assert outcome.code == 0, outcome.err
    document = parse(outcome.out)
    facts, findings = document.pop("profile"), document.pop("findings")
    assert {"activity", "device", "memory", "peaks", "record", "variant", "workload"} <= set(facts)
    assert all({"code", "message", "remedy"} <= set(finding) for finding in findings)
    check_shape("json/profile", document)


def test_parity(lorameter, tmp_path):
    """`parity` prints one document on whether the serving modes of an adapter give the same answers."""
    outcome = lorameter(f"parity study.toml:lora --model random:micro --runs-dir {tmp_path} --json")
    assert outcome.code == 0, outcome.err
    check_shape("json/parity", parse(outcome.out))
