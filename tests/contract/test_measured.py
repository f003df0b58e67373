"""Tests of measured results: the folder of a real run, and pytest-benchmark's file of a real session.

Tests of a user's training scripts: `wrap`, `ab` of two commands, and the meter.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.contract import doors
from tests.contract.expected import MACHINE, check_document, check_run, check_shape, parse, read_records


@pytest.fixture(scope="module")
def measured_run(shared_folder, tmp_path_factory):
    """The outcome and the folder of a real `lorameter run` of two variants and one replicate, training and
    generation."""
    runs = tmp_path_factory.mktemp("runs")
    words = ("--replicates", "1", "--phase", "train", "--phase", "generate", "--runs-dir", runs, "--json")
    outcome = doors.start("lorameter", "run", shared_folder / "study.toml", *words)
    (run,) = (path for path in runs.iterdir() if path.is_dir())
    return outcome, run


def test_a_run_prints_one_document(measured_run):
    """The run prints one document on standard output and progress on standard error, and exits with 0."""
    outcome, run = measured_run
    document = parse(outcome.out)
    assert outcome.code == (4 if document["status"] == "invalid" else 0)  # the control can fail on a busy machine
    assert document["trials"] == {"ok": len(read_records(run))}
    assert (document["run"], Path(document["path"])) == (run.name, run)
    assert f"[{len(read_records(run))}/" in outcome.err
    check_shape("json/run", document)


def test_a_run_has_the_expected_files(measured_run):
    """File names, and keys and types of the manifest and of each line of trials.jsonl, are the expected ones."""
    _, run = measured_run
    check_run("study", run)
    records = read_records(run)
    assert {(record["name"], record["role"]) for record in records if "step_time_s" in record["samples"]} == {
        ("lora", "variant"), ("lora", "control"), ("qlora", "variant"),
    }  # fmt: skip
    assert {record["replicate"] for record in records} == {0}


def test_every_check_of_a_record_has_its_evidence(measured_run):
    """checks.jsonl has a line for every check that a record names by its hash."""
    _, run = measured_run
    lines = [json.loads(line) for line in (run / "checks.jsonl").read_text(encoding="utf-8").splitlines()]
    check_shape("runs/study-checks", lines)


def test_every_command_reads_a_measured_run(measured_run, lorameter):
    """Every command that reads runs reads it."""
    _, run = measured_run
    for line in (f"report {run}", f"claims {run}", f"compare {run} {run}", f"export {run} --format csv --table trials"):
        outcome = lorameter(line)
        assert outcome.code in (0, 3, 4), outcome.err  # 4: the control can fail on a busy machine
        assert outcome.out
    assert set(doors.load(run).trials.status) == {"ok"}


@pytest.fixture(scope="module")
def session(measured_run, tmp_path_factory):
    """The outcome, folder and run of a real `pytest benchmarks/ --benchmark-save` that replays the measured run."""
    _, run = measured_run
    folder = tmp_path_factory.mktemp("session")
    words = (
        f"--lorameter-resume={run.name}", f"--lorameter-runs-dir={run.parent}", "--benchmark-save=contract",
        f"--benchmark-storage=file://{folder}/saved", "-k", "train_step or generate", "-p", "no:cacheprovider",
    )  # fmt: skip
    return doors.start("pytest", doors.ROOT / "benchmarks", *words), folder, run


def read_saved(folder):
    (path,) = (folder / "saved").glob("*/*_contract.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_file_of_pytest_benchmark_has_the_expected_keys(session):
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


def test_saved_durations_are_bit_equal_to_the_records(session):
    """stats.data has the samples of the records in their order, and extra_info the boundaries of the trials; nothing is
    measured again."""
    outcome, folder, run = session
    records = {record["trial"]: record for record in read_records(run)}
    for row in read_saved(folder)["benchmarks"]:
        info = row["extra_info"]
        samples = [records[trial["trial"]]["samples"][info["metric"]] for trial in info["trials"]]
        assert row["stats"]["data"] == [sample for values in samples for sample in values]
        assert [trial["samples"] for trial in info["trials"]] == [len(values) for values in samples]
        assert info["run"] == run.name
        assert info["metric"] == {"train": "step_time_s", "generate": "request_time_s"}[row["group"]]
        assert {check["status"] for check in info["checks"] if check["required"] is not None} == {"active"}
    assert outcome.code in (0, 1)  # 1: the control can fail on a busy machine
    assert "4 passed" in outcome.out


def test_a_saved_file_compares_as_its_run_does(session, lorameter):
    """Comparing the saved file with its run equals comparing the run with itself."""
    _, folder, run = session
    (path,) = (folder / "saved").glob("*/*_contract.json")
    documents = [parse(lorameter(f"compare {base} {run} --metric step_time_s --json").out) for base in (run, path)]
    assert [[row["ratio"] for row in document["comparisons"]] for document in documents] == [[1.0, 1.0]] * 2


def test_a_profile_has_times_memory_and_facts(lorameter, tmp_path):
    """`profile` prints one document with the time and memory of a step and the underlying facts."""
    outcome = lorameter(f"profile study.toml:lora --model random:micro --runs-dir {tmp_path} --json")
    assert outcome.code == 0, outcome.err
    document = parse(outcome.out)
    facts, findings = document.pop("profile"), document.pop("findings")
    assert {"activity", "device", "memory", "peaks", "record", "variant", "workload"} <= set(facts)
    assert all({"code", "message", "remedy"} <= set(finding) for finding in findings)
    check_shape("json/profile", document)


def test_parity_compares_the_serving_modes(lorameter, tmp_path):
    """`parity` prints one document on whether the serving modes of an adapter give the same answers."""
    outcome = lorameter(f"parity study.toml:lora --model random:micro --runs-dir {tmp_path} --json")
    assert outcome.code == 0, outcome.err
    check_shape("json/parity", parse(outcome.out))


LOOP = doors.SCRIPT.read_text(encoding="utf-8")
COMMAND = "python script.py"


def only_run(runs):
    (run,) = (path for path in Path(runs).iterdir() if path.is_dir())
    return run


@pytest.fixture(scope="module")
def wrapped_run(shared_folder, tmp_path_factory):
    """The outcome and the run of a wrapped training."""
    runs = tmp_path_factory.mktemp("wrapped")
    outcome = doors.start("lorameter", "wrap", "--runs-dir", runs, "--", "python", shared_folder / "script.py")
    return outcome, only_run(runs)


def test_a_wrapped_command_keeps_its_output_and_exit_code(wrapped_run):
    """Standard output and exit code are the command's own; the report goes to standard error."""
    outcome, run = wrapped_run
    assert outcome.code == 0
    assert outcome.out.startswith("last loss ")
    assert "Training" in outcome.err
    assert run.name in outcome.err


def test_every_command_reads_the_run_of_a_wrapped_command(wrapped_run, lorameter):
    """File names, keys and types are the expected ones; every command that reads runs reads it, and it cannot be
    resumed."""
    _, run = wrapped_run
    check_run("wrap", run)
    check_shape("json/report-wrap", parse(lorameter(f"report {run} --json").out))
    assert lorameter(f"compare {run} {run}").code == 3  # one process has no interval
    assert lorameter(f"history --runs-dir {run.parent}").code == 0
    refused = lorameter(f"run --resume {run}")
    assert (refused.code, "which cannot be resumed. Run it again." in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--require", "base.bits=4", "--", "python", "script.py"), 4),
        (("--no-report", "--", "python", "-c", "raise SystemExit(7)"), 7),
        (("--", "absent-program"), 2),
    ],
)
def test_wrap_ends_with_the_exit_code_of_the_command(words, code, tmp_path):
    """The exit code is the command's own, or 4 where that is 0 and a required path is not active."""
    assert doors.start("lorameter", "wrap", "--runs-dir", tmp_path / "runs", *words).code == code


@pytest.fixture(scope="module")
def ab_run(shared_folder, tmp_path_factory):
    """The outcome and the run of a real A/B of two commands with one replicate."""
    runs = tmp_path_factory.mktemp("compared")
    words = (
        "--replicates",
        "1",
        "--steps",
        "4",
        "--allow-disturbed",
        "--cwd",
        shared_folder,
        "--runs-dir",
        runs,
        "--json",
    )
    commands = ("--base-command", COMMAND, "--candidate-command", f"{COMMAND} --slow")
    return doors.start("lorameter", "ab", *commands, *words), only_run(runs)


def test_an_ab_of_one_replicate_is_inconclusive(ab_run):
    """One replicate has no interval: the verdict is inconclusive and the exit code 3."""
    outcome, run = ab_run
    document = parse(outcome.out)
    check_shape("json/ab", document)
    assert outcome.code == 3, outcome.err
    assert (document["run"], document["base"], document["candidate"]) == (run.name, COMMAND, f"{COMMAND} --slow")
    (step,) = (row for row in document["comparisons"] if row["metric"] == "step_time_s")
    assert step["verdict"] == "inconclusive"
    assert step["ratio"] > 1
    check_run("ab", run)
    assert {(record["side"], record["role"]) for record in read_records(run)} == {
        ("base", "variant"), ("candidate", "variant"), ("base", "control"),
    }  # fmt: skip


def repeat_replicates(run, folder, name, change):
    """Copy the A/B with its replicate repeated three times and each record changed."""
    shutil.copytree(run, folder / name)
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    records = []
    for replicate in range(3):
        for record in read_records(run):
            trial = record["trial"].replace("r0-", f"r{replicate}-")
            records.append(change(record | {"trial": trial, "replicate": replicate, "position": len(records)}))
    manifest |= {"run": name, "order": [record["trial"] for record in records]}
    manifest["study"]["protocol"]["replicates"] = 3
    (folder / name / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / name / "trials.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")


def timed(factor):
    """Return a change to steps of 10 ms that differ by 0.1 % between replicates; those of the candidate are `factor`
    times as long."""

    def change(record):
        step = 0.01 * (1 + 0.001 * record["replicate"]) * (factor if record["side"] == "candidate" else 1.0)
        for metric in ("step_time_s", "step_cpu_time_s"):
            record["samples"][metric] = [step] * len(record["samples"][metric])
        return record

    return change


def crashed(record):
    if (record["replicate"], record["side"]) != (1, "candidate"):
        return timed(1.0)(record)
    why = {"phase": "timed", "kind": "SIGKILL", "message": "the process ended with signal 9", "traceback": ""}
    return record | {"status": "crashed", "failure": why, "samples": {}, "values": {}, "turn_lengths": []}


@pytest.mark.parametrize(
    ("change", "code"), [(timed(0.5), 0), (timed(1.0), 0), (timed(2.0), 1), (crashed, 4)],
    ids=["faster", "equivalent", "slower", "crashed"],
)  # fmt: skip
def test_commands_on_an_ab_end_with_its_exit_code(change, code, ab_run, lorameter, tmp_path):
    """`report`, `gate` and `compare` of an A/B exit as the A/B itself does."""
    _, run = ab_run
    repeat_replicates(run, tmp_path, "again", change)
    for command in ("report", "gate", "compare"):
        outcome = lorameter(f"{command} again --metric step_time_s --runs-dir {tmp_path}")
        assert outcome.code == code, (command, outcome.out, outcome.err)
    assert lorameter(f"accept again --runs-dir {tmp_path}").code in (2, 4)  # an A/B cannot be a baseline


def test_a_script_with_a_meter_leaves_a_run(tmp_path):
    """The script prints its report and leaves a run in the current folder, like that of a wrapped script."""
    lines = LOOP.replace("for _ in range(24):", "meter = Meter(model)\nfor _ in meter.steps(range(24)):")
    (tmp_path / "metered.py").write_text(f"{doors.METER_IMPORT}\n{lines}", encoding="utf-8")
    outcome = doors.start("python", tmp_path / "metered.py", LORAMETER_RUNS=str(tmp_path / "runs"))
    assert outcome.code == 0, outcome.err
    assert "Training" in outcome.out
    assert "steps are those that the loop names" in " ".join(outcome.out.split())
    check_run("meter", only_run(tmp_path / "runs"))
