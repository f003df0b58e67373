"""Tests of the pytest plugin: what pytest-benchmark saves, compares and refuses.

The sessions are real and run in this process; a fake executor with exact numbers replaces the processes of trials, so
that no test depends on a clock. `run/workers/test_local.py` and `contract/test_measured.py` show that the real executor
gives such records.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path
from typing import ClassVar

import pytest

import lorameter.run.workers.local as local_executor
from lorameter.cli import main
from lorameter.commands import pytest_session
from lorameter.commands.setup import FILES
from lorameter.machine.processes import physical_cores
from lorameter.records.record import Failure, PartialRecord
from tests.run import fakes

for name in ("numpy", "scipy.special", "scipy.stats"):
    importlib.import_module(name)  # pytester unloads what a session imports, and these cannot be loaded twice

PYTEST_OPTIONS = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:anyio")
"""Options of every session here: without the plugins of Hypothesis and anyio, which take most of the start-up time."""
STEP_S = {"plain": 0.1, "nf4": 0.123456789012345678}


class FakeExecutor(fakes.FakeExecutor):
    """An executor with exact times; `asked` has the commands of all trials."""

    asked: ClassVar[list[str]] = []
    step_s: ClassVar[dict[str, float]] = STEP_S
    control: ClassVar[float] = 1.0
    """Factor of the control's time."""
    failing: ClassVar[str] = ""
    """A variant that cannot be built."""

    def __init__(self, **about):
        super().__init__(**about)
        self.merged = set()

    def ask(self, command, trial, timeout_s, **arguments):
        self.asked.append(command)
        replicate, name = trial.split("-")[:2]
        if name == self.failing and command == "build":
            return PartialRecord().failed("oom", Failure(phase="build", kind="MemoryError", message="no memory left"))
        time_s = self.step_s[name] * (self.control if "control" in trial else 1.0) * (1 + int(replicate[1:]) / 7)
        if command == "merge":
            self.merged.add(trial)
        if command == "turn":
            times = dict.fromkeys(("step_time_s", "step_cpu_time_s"), (time_s,) * arguments["steps"])
            counts = {"turn_tokens": (64.0,), "turn_padded_tokens": (0.0,), "turn_sequences": (2.0,)}
            return PartialRecord(samples=times | counts | {"timed_loss": (2.0,) * arguments["steps"]})
        if command == "request":
            names = ("request_time_s", "first_token_time_s", "time_per_output_token_s")
            prefix = "merged_" if trial in self.merged else ""
            return PartialRecord(samples={f"{prefix}{name}": (time_s,) for name in names})
        check = {"path": "base.bits", "required": 4, "observed": 4, "status": "active", "reason": "seen"}
        return {
            "verify": PartialRecord(checks=(check,)),
            "finish_training": PartialRecord(values={"held_out_loss": 3.0}, memory={"host_peak_train_bytes": 2**20}),
            "cold": PartialRecord(values={"cold_after_import_time_s": 1.0}),
        }.get(command, PartialRecord())

    def start_interpreter(self, log_path, timeout_s, request=None):
        return PartialRecord(values={"cold_import_time_s": 1.0, "cold_start_time_s": 2.0})


STUDY = """
[workload]
sequence_length = 32
batch_size = 2
train_sequences = 16
held_out_records = 4
held_out_sequences = 2
prompt_tokens = 8
new_tokens = 4
[protocol]
replicates = 2
warmup_steps_min = 1
warmup_steps_max = 2
turns = 2
steps_per_turn = 3
generate_warmup = 0
generate_requests = 1
[controls]
r = 4
[[variant]]
name = "plain"
[[variant]]
name = "nf4"
quantization = "nf4"
"""


@pytest.fixture
def suite(pytester, monkeypatch):
    """A benchmark folder as `lorameter init` writes it, with the fake executor; returns a function that runs pytest on
    it."""
    for name, text in FILES.items():
        (pytester.path / name).write_text(text)
    (pytester.path / "small.toml").write_text(STUDY)
    monkeypatch.setattr(local_executor, "LocalExecutor", FakeExecutor)
    monkeypatch.setattr(FakeExecutor, "asked", [])

    def run(*options):
        return pytester.runpytest_inprocess("--lorameter-study=small.toml", *PYTEST_OPTIONS, *options)

    def start(*options):
        """Run a session in a process of its own, with the real executor."""
        return pytester.runpytest_subprocess("--lorameter-study=small.toml", *PYTEST_OPTIONS, *options)

    run.path, run.start = pytester.path, start
    return run


def saved(suite, pattern):
    (path,) = suite.path.glob(f".benchmarks/*/{pattern}.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def measured_once(tmp_path_factory):
    """The folder in which the first test that needs a base stores its run for the other tests."""
    return tmp_path_factory.mktemp("base")


@pytest.fixture
def base(suite, measured_once):
    """The run of the suite, measured once, and a policy that accepts inconclusive comparisons."""
    if not any(measured_once.iterdir()):
        suite("--benchmark-save=base").assert_outcomes(passed=6)
        for folder in (".lorameter", ".benchmarks"):
            shutil.copytree(suite.path / folder, measured_once / folder)
        FakeExecutor.asked.clear()
    shutil.copytree(measured_once, suite.path, dirs_exist_ok=True)
    (suite.path / "open.toml").write_text("inconclusive = 'pass'\n")
    (run,) = (suite.path / ".lorameter" / "runs").iterdir()
    return run


def test_the_plan_runs_once_for_all_tests_and_is_on_disk(suite, base):
    """Six tests replay one run on disk that has all trials and the control."""
    trials = [json.loads(line)["trial"] for line in (base / "trials.jsonl").read_text().splitlines()]
    assert sum(not trial.endswith("-isolated") for trial in trials) == 2 * 3
    assert len(saved(suite, "*base")["benchmarks"]) == 6


def test_k_selects_and_keeps_the_reference(suite):
    """A single selected test also measures the reference and the control, in its phase only; --lorameter-html writes
    the report as a page."""
    suite("-k", "train_step and nf4", "--lorameter-html=page.html").assert_outcomes(passed=1, deselected=5)
    (run,) = (suite.path / ".lorameter" / "runs").iterdir()
    records = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    assert {(r["name"], r["role"]) for r in records} == {
        ("plain", "variant"), ("plain", "control"), ("nf4", "variant"),
    }  # fmt: skip
    assert not any("request_time_s" in r["samples"] for r in records)
    page = (suite.path / "page.html").read_text(encoding="utf-8")
    for words in ("nf4", "Every step by time", "lorameter run small.toml"):
        assert words in page


def test_comparing_two_runs_works_as_pytest_benchmark_documents(suite, base, monkeypatch):
    """--benchmark-compare shows both runs, and --benchmark-compare-fail fails on a slower one."""
    monkeypatch.setattr(FakeExecutor, "step_s", STEP_S | {"nf4": 0.2})
    slower = suite("--benchmark-compare", "--benchmark-compare-fail=mean:10%")
    slower.stderr.fnmatch_lines(["*Performance has regressed*"])
    for line in ("*Training*", "*test_train_step*nf4*(0001*", "*test_train_step*nf4*(NOW)*"):
        slower.stdout.fnmatch_lines([line])
    assert slower.ret != 0


def test_runs_of_different_workloads_are_not_compared(suite, base):
    """A run of another workload is refused, and the error names the difference."""
    (suite.path / "small.toml").write_text(STUDY.replace("batch_size = 2", "batch_size = 1"))
    result = suite("--benchmark-compare")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*not comparable: workload*batch_size*2*1*"])


def test_disable_measures_nothing_and_stores_nothing(suite):
    """With --benchmark-disable each test is skipped before its replay, with the reason."""
    result = suite("--benchmark-disable", "--benchmark-save=none", "-rs")
    result.assert_outcomes(skipped=6)
    result.stdout.fnmatch_lines(["lorameter: --benchmark-disable: nothing*", "SKIPPED*--benchmark-disable: nothing*"])
    assert "warning" not in result.stdout.str()
    assert "Training" not in result.stdout.str()
    assert not FakeExecutor.asked
    assert not (suite.path / ".lorameter").exists()
    assert not [*(suite.path / ".benchmarks").rglob("*.json")]


def test_cprofile_is_refused_with_its_reason(suite):
    """A replay executes nothing that could be profiled."""
    result = suite("--benchmark-cprofile=tottime")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--benchmark-cprofile*replay*"])
    assert not FakeExecutor.asked


def test_a_failed_trial_fails_only_its_own_tests(suite, monkeypatch):
    """The failure shows the status, the message and the log; the exit code reports it."""
    monkeypatch.setattr(FakeExecutor, "failing", "nf4")
    result = suite("--benchmark-save=x")
    result.assert_outcomes(passed=3, failed=3)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*r0-nf4: oom in build: no memory left (log: *r0-nf4.log)*"])
    assert {entry["param"] for entry in saved(suite, "*x")["benchmarks"]} == {"plain"}


def test_a_control_that_fails_makes_the_session_fail(suite, monkeypatch):
    """The session fails although every test passes, because the reference differs from its own control."""
    monkeypatch.setattr(FakeExecutor, "control", 1.5)
    result = suite()
    result.assert_outcomes(passed=6)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["INVALID: its control *", "*control-failed*"])


def test_a_base_gates_the_session(suite, base, monkeypatch):
    """An inconclusive verdict fails by default; a slower variant fails with any policy, with exit code 1."""
    same = suite(f"--lorameter-base={base.name}")
    same.assert_outcomes(passed=6)
    assert same.ret == pytest.ExitCode.TESTS_FAILED
    same.stdout.fnmatch_lines(["*lorameter gate*", "Gate failed*", f"*against {base.name}*", "*inconclusive*"])
    monkeypatch.setattr(FakeExecutor, "step_s", STEP_S | {"nf4": 2.0})
    slower = suite(f"--lorameter-base={base}", "--lorameter-policy=open.toml")
    slower.assert_outcomes(passed=6)
    assert slower.ret == pytest.ExitCode.TESTS_FAILED
    slower.stdout.fnmatch_lines(["Gate failed (exit 1)*2 regressed*", "*nf4*step time*regressed*"])


def test_baseline_is_the_accepted_run(suite, base):
    """Without an accepted run every verdict is no_baseline and the session fails; afterwards the session is compared
    with the accepted run."""
    none = suite("--lorameter-base=baseline", "--lorameter-policy=open.toml")
    none.assert_outcomes(passed=6)
    assert none.ret == pytest.ExitCode.TESTS_FAILED
    none.stdout.fnmatch_lines(["Gate failed (exit 5)*", "*no baseline*lorameter accept RUN*"])
    assert main(["accept", base.name, "--runs-dir", str(base.parent)]) == 0
    accepted = suite("--lorameter-base=baseline", "--lorameter-policy=open.toml")
    assert accepted.ret == pytest.ExitCode.OK
    accepted.stdout.fnmatch_lines(["Gate passed*", f"*against {base.name}*"])


@pytest.mark.parametrize(("options", "expected"), [
    (["--lorameter-base=no-such-run"], "*no-such-run*not found*"),
    (["--lorameter-policy=open.toml"], "*there is no base*"),
    (["--lorameter-base=BASE", "--benchmark-disable"], "*measures nothing that could be judged*"),
])  # fmt: skip
def test_a_bad_base_is_refused_before_anything_is_measured(suite, base, options, expected):
    """A bad base prints one line, exits with pytest's code 4 and measures no trial."""
    result = suite(*(option.replace("BASE", base.name) for option in options))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([expected])
    assert not FakeExecutor.asked


def test_a_base_of_a_different_study_is_refused_before_measuring(suite, base):
    """The study alone shows the difference, before any measurement."""
    (suite.path / "small.toml").write_text(STUDY.replace("r = 4", "r = 8"))
    result = suite(f"--lorameter-base={base}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*variant plain: r: 4 in the base, 8 in the candidate*"])
    assert not FakeExecutor.asked


def test_a_gate_with_nothing_to_judge_does_not_pass(suite, base):
    """The session fails when a base is given and every benchmark is deselected."""
    (suite.path / "test_other.py").write_text("def test_other():\n    pass\n")
    result = suite("-k", "test_other", f"--lorameter-base={base}")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*nothing was measured*"])


def test_an_exception_in_the_gate_fails_the_session(suite, base, monkeypatch):
    """The session fails with the traceback, and the rest of the report is still printed."""
    monkeypatch.setattr(pytest_session, "compare", None)
    result = suite(f"--lorameter-base={base}", "--lorameter-policy=open.toml")
    result.assert_outcomes(passed=6)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*the comparison ended in an error*", "*TypeError*", "*Training*"])


def test_an_interrupted_session_is_resumed_and_replayed(suite, base):
    """A resumed session measures the missing trials, and its tests replay and save the whole run."""
    lines = (base / "trials.jsonl").read_text().splitlines(keepends=True)
    (base / "trials.jsonl").write_text("".join(lines[:4]))
    manifest = base / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete"', '"running"'))
    result = suite(f"--lorameter-resume={base.name}", "--benchmark-save=resumed", "-k", "nf4")
    result.assert_outcomes(passed=3, deselected=3)
    assert result.ret == pytest.ExitCode.OK
    trials = [json.loads(line)["trial"] for line in (base / "trials.jsonl").read_text().splitlines()]
    assert len(trials) == len(set(trials)) == len(lines)
    data = saved(suite, "*resumed")
    assert data["lorameter"]["run"] == base.name
    assert all(len(entry["extra_info"]["trials"]) == 2 for entry in data["benchmarks"])


def test_a_project_that_does_not_attach_is_left_alone(pytester):
    """The plugin only adds its options; machine_info is pytest-benchmark's."""
    pytester.makepyfile("def test_x(benchmark): benchmark(lambda: 1)")
    result = pytester.runpytest_inprocess("--benchmark-json=out.json", *PYTEST_OPTIONS)
    result.assert_outcomes(passed=1)
    assert "lorameter" not in json.loads((pytester.path / "out.json").read_text())["machine_info"]


def test_a_suite_that_is_not_attached_is_refused_with_the_remedy(pytester):
    """Its tests would find no fixture, and pytest does not know why."""
    pytester.makepyfile("import pytest\n@pytest.mark.lorameter('train')\ndef test_x(replay): replay()")
    result = pytester.runpytest_inprocess(*PYTEST_OPTIONS)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*the marker lorameter needs a call of `lorameter.pytest_plugin.attach(config)`*"])


def test_a_dry_run_shows_the_plan_and_measures_nothing(suite):
    """The plan shows order, interleaving, time, memory and disk; each test gives the reason of its skip, and plan
    options apply."""
    result = suite("--lorameter-dry-run", "--lorameter-replicates=2", "-rs")
    result.assert_outcomes(skipped=6)
    result.stdout.fnmatch_lines(
        ["*lorameter plan*", "*order *another in each of 2 replicates*", "*level * *", "*time * *", "*memory * *"]
    )
    result.stdout.fnmatch_lines(["SKIPPED*--lorameter-dry-run: *nothing was measured"])
    assert not FakeExecutor.asked
    assert not (suite.path / ".lorameter").exists()


@pytest.mark.selftest
def test_commands_are_saved_and_gated_as_benchmarks(suite, monkeypatch):
    """Commands run in real processes that take turns and are saved; a slower script fails the session by name."""
    monkeypatch.setenv("MARK", str(suite.path / "mark"))
    shutil.copy(Path(__file__).parent / "run" / "scripted.py", suite.path)
    protocol = "[protocol]\nreplicates = 2\nturns = 2\nwarmup_steps_max = 4\nallow_disturbed = true\n"
    variant = '[[variant]]\nname = "{0}"\ncommand = "python scripted.py {0}"\n'
    (suite.path / "small.toml").write_text(protocol + "".join(variant.format(name) for name in ("plain", "slow")))
    (suite.path / "open.toml").write_text("inconclusive = 'pass'\n")
    first = suite.start("--benchmark-save=first", "--lorameter-runs-dir=runs")
    first.assert_outcomes(passed=2)
    by_name = {entry["name"]: entry for entry in saved(suite, "*first")["benchmarks"]}
    assert by_name["test_train_step[slow]"]["stats"]["data"] == [2e-3] * 8
    assert (
        by_name["test_train_step[slow]"]["stats"]["median"] == 2 * by_name["test_train_step[plain]"]["stats"]["median"]
    )
    script = suite.path / "scripted.py"
    script.write_text(script.read_text().replace('2e-3 if FAULT == "slow"', '3e-3 if FAULT == "slow"'))
    base = by_name["test_train_step[slow]"]["extra_info"]["run"]
    slower = suite.start(f"--lorameter-base={base}", "--lorameter-policy=open.toml", "--lorameter-runs-dir=runs")
    assert slower.ret == pytest.ExitCode.TESTS_FAILED
    slower.stdout.fnmatch_lines(["Gate failed (exit 1)*1 regressed*", "*slow*step time*regressed*"])
    assert not (suite.path / "mark").exists()


def sites_of(run):
    return {json.loads(line).get("site", "") for line in (run / "trials.jsonl").read_text().splitlines()}


@pytest.mark.skipif(len(physical_cores(os.sched_getaffinity(0))) < 2, reason="two sites of a CPU need two of its cores")
def test_replicates_are_measured_on_several_sites_and_replayed(suite, monkeypatch):
    """The study sets the sites."""
    pretended = str(Path(__file__).parent / "run" / "sites" / "pretended")
    monkeypatch.setenv("PYTHONPATH", pretended, prepend=os.pathsep)
    monkeypatch.setenv("LORAMETER_EXECUTOR", "pretending")
    (suite.path / "small.toml").write_text(STUDY.replace("[protocol]", '[protocol]\nsites = ["0", "1"]'))
    suite.start("-k", "train", "--benchmark-save=spread").assert_outcomes(passed=2)
    (run,) = (suite.path / ".lorameter" / "runs").iterdir()
    assert sites_of(run) == {"cpus-0", "cpus-1"}
    assert len(saved(suite, "*spread")["benchmarks"]) == 2
