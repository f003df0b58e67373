"""Tests of the CI workflows: code of a fork never runs on a self-hosted runner, no failure is ignored, and all commands
exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorameter import errors
from lorameter.commands.parser import build_parser
from tests.constructed import RUNS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.yml"))
GUIDE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
HOSTED = "ubuntu-latest"
SAME_REPOSITORY = "github.event.pull_request.head.repo.full_name == github.repository"
EXIT_CODES = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def read_workflow(path: Path) -> dict[str, Any]:
    return parse_workflow(path.read_text(encoding="utf-8"))


def parse_workflow(text: str) -> dict[str, Any]:
    workflow = yaml.safe_load(text)
    workflow["on"] = workflow.pop(True)  # YAML 1.1 parses the key `on` as a boolean
    return workflow


def make_job_cases() -> list[Any]:
    return [
        pytest.param(job, id=f"{path.stem}-{name}")
        for path in FILES
        for name, job in read_workflow(path)["jobs"].items()
    ]


def find_script(job: str, name: str, workflow: str = "gate.yml") -> str:
    return next(
        step["run"] for step in read_workflow(FOLDER / workflow)["jobs"][job]["steps"] if step.get("name") == name
    )


def run_step(text: str, folder: Path, **variables: str) -> tuple[int, str]:
    """Run a step as the runner does, with `bin` first on the path, and return its exit code and outputs."""
    output = folder / "output"
    output.write_text("", encoding="utf-8")
    environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "GITHUB_OUTPUT": str(output), **variables}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", text]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    return done.returncode, output.read_text(encoding="utf-8")


def run_measuring_step(folder: Path, *, exit_code: int = 0, **variables: str) -> tuple[int, str, list[str]]:
    """Run the measuring step with a lorameter that records its arguments; return exit code, outputs and arguments."""
    fake = folder / "bin" / "lorameter"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > arguments\nexit {exit_code}\n', encoding="utf-8")
    fake.chmod(0o755)
    sample = {"STUDY": "training-step", "POLICY": "", "EFFORT": "standard", "PHASES": "train generate"}
    sides = {"BASE": "a" * 40, "CANDIDATE": "b" * 40}
    code, output = run_step(find_script("measure", "Measure and judge"), folder, **sample | sides | variables)
    return code, output, (folder / "arguments").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_workflow_never_runs_with_the_rights_of_the_base(path):
    """A pull request starts a workflow with its own permissions, never with those of the base branch."""
    assert set(read_workflow(path)["on"]) <= {"push", "pull_request", "workflow_call"}


@pytest.mark.parametrize("job", make_job_cases())
def test_code_of_a_fork_never_runs_on_a_self_hosted_runner(job):
    """A job on a self-hosted runner, and a call of the gate, depend on the decision about forks; the history measures
    no pull request."""
    if "uses" in job:
        assert SAME_REPOSITORY in job["if"]
    elif job["runs-on"] != HOSTED and job == read_workflow(FOLDER / "history.yml")["jobs"]["measure"]:
        assert job["if"] == "github.event_name == 'schedule' || github.event_name == 'workflow_dispatch'"
    elif job["runs-on"] != HOSTED:
        condition = " ".join(job["if"].split())
        assert job["needs"] == "decide"
        assert condition == f"needs.decide.outputs.allowed == 'true' && {SAME_REPOSITORY}"


def test_one_job_measures_at_a_time():
    """Measurements wait for each other, also those of the history, and a newer commit of a pull request cancels the
    older one's."""
    for workflow in ("gate.yml", "history.yml"):
        assert read_workflow(FOLDER / workflow)["jobs"]["measure"]["concurrency"] == {
            "group": "lorameter-${{ inputs.runner }}",
            "cancel-in-progress": False,
            "queue": "max",
        }
    caller = read_workflow(FOLDER / "benchmark.yml")["concurrency"]
    assert caller["cancel-in-progress"] is True
    assert "github.event.pull_request.number" in caller["group"]


@pytest.mark.parametrize(
    ("event", "head", "allowed"),
    [
        ("pull_request", "owner/name", "true"),
        ("pull_request", "stranger/name", "false"),
        ("pull_request", "", "false"),
        ("pull_request_target", "owner/name", "false"),
        ("push", "", "false"),
    ],
)
def test_the_gate_refuses_forks(event, head, allowed, tmp_path):
    """Only a pull request from the repository itself is allowed; a deleted fork has no name and is refused."""
    names = {"GITHUB_EVENT_NAME": event, "HEAD_REPOSITORY": head, "GITHUB_REPOSITORY": "owner/name"}
    assert run_step(find_script("decide", "Refuse forks"), tmp_path, **names) == (0, f"allowed={allowed}\n")


@pytest.mark.parametrize("code", sorted(EXIT_CODES))
def test_the_measuring_step_has_the_exit_code_of_lorameter(code, tmp_path):
    """The step has the exit code of lorameter, also as an output."""
    assert run_measuring_step(tmp_path, exit_code=code)[:2] == (code, f"exit-code={code}\n")


@pytest.mark.parametrize(
    ("result", "code", "passes"),
    [("success", "0", True), ("success", "", False), ("success", "3", False), ("failure", "1", False),
     ("failure", "0", False), ("skipped", "", False), ("cancelled", "", False)],
)  # fmt: skip
def test_only_a_measured_pass_passes(result, code, passes, tmp_path):
    """The required check passes on exit code 0 of a completed job, and fails where the job was skipped."""
    ended, _ = run_step(find_script("verdict", "Pass on exit code 0 alone"), tmp_path, RESULT=result, EXIT_CODE=code)
    assert (ended == 0) == passes


def test_the_required_check_always_runs():
    """The job with the verdict waits for the measurement and is never skipped."""
    verdict = read_workflow(FOLDER / "gate.yml")["jobs"]["verdict"]
    assert verdict["if"] == "always()"
    assert verdict["needs"] == ["decide", "measure"]


def test_the_run_is_uploaded_after_a_failure_too():
    """The artifact is the folder of runs, and it is uploaded after a failure too."""
    steps = read_workflow(FOLDER / "gate.yml")["jobs"]["measure"]["steps"]
    measure, keep = steps[-2:]
    assert keep["if"] == "always()"
    assert keep["with"]["path"] == measure["env"]["LORAMETER_RUNS"]


def test_each_exit_code_has_a_verdict():
    """The output `verdict` and the table of the guide have every exit code."""
    value = read_workflow(FOLDER / "gate.yml")["on"]["workflow_call"]["outputs"]["verdict"]["value"]
    words = json.loads(re.search(r"fromJSON\('(.*?)'\)", value)[1])
    assert {int(code) for code in words} == EXIT_CODES
    assert dict(re.findall(r"^\| (\d+) \| `(\w+)`", GUIDE, re.MULTILINE)) == words


def test_the_command_of_the_gate_exists(tmp_path):
    """lorameter accepts the arguments of the gate, which mean what the inputs say."""
    _, _, arguments = run_measuring_step(tmp_path, POLICY="a policy.toml", EFFORT="rigorous", PHASES="train cold")
    options = build_parser().parse_args(arguments)
    assert options.calls == "run:run_ab"
    assert (options.study, options.base, options.candidate) == ("training-step", "a" * 40, "b" * 40)
    assert (options.policy, options.effort, options.phase) == ("a policy.toml", "rigorous", ["train", "cold"])
    assert options.format == "github"


def test_the_caller_of_the_guide_calls_the_gate():
    """The example refuses forks and passes only inputs of the gate; so does this repository's own call."""
    example = parse_workflow(re.search(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)[1])  # the first of two examples
    inputs = read_workflow(FOLDER / "gate.yml")["on"]["workflow_call"]["inputs"]
    for caller in (example, read_workflow(FOLDER / "benchmark.yml")):
        gate = caller["jobs"]["gate"]
        assert set(caller["on"]) == {"pull_request"}
        assert gate["if"] == SAME_REPOSITORY
        assert "/.github/workflows/gate.yml" in gate["uses"]
        assert {name for name, about in inputs.items() if about.get("required")} <= set(gate["with"]) <= set(inputs)


def test_the_commands_of_the_guide_exist():
    """lorameter accepts every command line of the guide."""
    commands = re.findall(r"^lorameter (.*?)(?: #.*)?$", GUIDE, re.MULTILINE) + re.findall(
        r"`lorameter (\w+ .*?)`", GUIDE
    )
    assert len(commands) == 5
    for command in commands:
        build_parser().parse_args(shlex.split(command))


def test_the_caller_of_the_guide_calls_the_history():
    """The example runs on a schedule or by hand, with valid inputs and the write permission that one of its jobs
    needs."""
    _, example = map(parse_workflow, re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL))
    inputs = read_workflow(FOLDER / "history.yml")["on"]["workflow_call"]["inputs"]
    (job,) = example["jobs"].values()
    assert set(example["on"]) == {"schedule", "workflow_dispatch"}
    assert job["permissions"] == {"contents": "write"}
    assert "/.github/workflows/history.yml" in job["uses"]
    assert {name for name, about in inputs.items() if about.get("required")} <= set(job["with"]) <= set(inputs)
    assert (
        build_parser().parse_args(["run", "training-step", "--effort", inputs["effort"]["default"]]).effort
        == "standard"
    )


@pytest.fixture
def history(tmp_path):
    """A function that packs and stores a constructed run with the workflow's steps, a bare repository and this
    checkout's lorameter, and returns exit codes."""
    command = tmp_path / "bin" / "lorameter"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lorameter.cli "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    remote = tmp_path / "remote.git"
    subprocess.run(["git", "init", "--quiet", "--bare", remote], check=True)
    about = {
        "TOKEN": "secret",
        "BRANCH": "kept",
        "COMMIT": "c" * 40,
        "METRIC": "",
        "PYTHONPATH": f"{ROOT / 'harness'}:{ROOT}",
    }
    about |= {
        name: str(tmp_path / name.lower()) for name in ("LORAMETER_RUNS", "LORAMETER_CACHE", "PACKED", "KEPT", "HOME")
    }

    def store(run: str, **others: str) -> list[int]:
        shutil.rmtree(about["LORAMETER_RUNS"], ignore_errors=True)
        shutil.copytree(RUNS / run, Path(about["LORAMETER_RUNS"]) / run)
        steps = [("measure", "Pack the run"), ("keep", "Fetch the branch"), ("keep", "Write the page")]
        steps.append(("keep", "Keep both on the branch"))
        environment = about | {"REMOTE": str(remote)} | others
        return [run_step(find_script(job, name, "history.yml"), tmp_path, **environment)[0] for job, name in steps]

    store.remote = remote
    return store


def read_from_branch(remote: Path, path: str) -> str:
    done = subprocess.run(["git", "-C", remote, "show", f"kept:{path}"], capture_output=True, check=True)
    return done.stdout.decode("utf-8", errors="replace")


def test_the_history_is_stored_on_a_branch(history):
    """The branch is created if missing and gets a commit for each run; the page shows all runs of the branch."""
    assert history("sound") == history("another-day") == [0] * 4
    assert read_from_branch(history.remote, "runs").split("\n\n")[1].split() == [
        "another-day.lorameter.zip", "sound.lorameter.zip"
    ]  # fmt: skip
    page = read_from_branch(history.remote, "index.html")
    assert "sound" in page
    assert "another-day" in page
    count = subprocess.run(
        ["git", "-C", history.remote, "rev-list", "--count", "kept"], capture_output=True, check=True
    )
    assert int(count.stdout) == 2
