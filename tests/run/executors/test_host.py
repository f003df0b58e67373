"""A host: which interpreter and which code a measuring process really runs, told by real processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import harness
from harness.errors import InvalidRunError, UsageError
from harness.machine.provenance import (
    LIBRARIES,
    collect,
    differing_packages,
    harness_identity,
    library_version,
    probe_machine,
    read_facts,
)
from harness.records.record import SCHEMA
from harness.run.executors import answer, host
from harness.run.executors.host import Host, describe, inspect
from harness.run.executors.local import LocalExecutor, worker_environment
from harness.run.plan import make_plan
from harness.run.runner import run_plan
from harness.run.site import site_of


def test_the_default_host_is_the_present_interpreter():
    """No path, no folder, no variables: what a run without sides has always used."""
    host = Host()
    assert (host.python, host.path, host.cwd, host.environment) == (sys.executable, (), None, {})
    assert host.command("harness.worker", "7") == [sys.executable, "-m", "harness.worker", "7"]
    assert host.variables({"HOME": "/h"}) == {"HOME": "/h"}


def test_the_path_of_a_host_goes_before_that_of_the_shell():
    """What the user has on PYTHONPATH stays, behind."""
    host = Host(path=("/a", "/b"), environment={"X": "1"})
    assert host.variables({"PYTHONPATH": "/c"}) == {"PYTHONPATH": os.pathsep.join(("/a", "/b", "/c")), "X": "1"}


def test_a_host_cannot_change_what_every_measuring_process_has_fixed():
    """A host's own variables come before the shell's, and the thread counts of the protocol before both."""
    fixed = worker_environment(1, Host(environment={"OMP_NUM_THREADS": "7", "X": "1"}))
    assert (fixed["OMP_NUM_THREADS"], fixed["X"]) == ("1", "1")


def test_a_host_tells_what_steers_its_choice_of_kernels(monkeypatch):
    """Its own variables and what it inherits, and no other."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    described = describe(Host(environment={"NVIDIA_TF32_OVERRIDE": "0", "SECRET": "x"}))
    assert described["switches"] == {"NVIDIA_TF32_OVERRIDE": "0", "PYTORCH_ALLOC_CONF": "backend:native"}


def test_pyarrow_starts_no_thread_beside_what_it_was_told():
    """Its allocator's own settings stay; of two that disagree jemalloc takes the last."""
    assert worker_environment(1)["JE_ARROW_MALLOC_CONF"] == "background_thread:false"
    told = worker_environment(1, Host(environment={"JE_ARROW_MALLOC_CONF": "narenas:1,background_thread:true"}))
    assert told["JE_ARROW_MALLOC_CONF"] == "narenas:1,background_thread:true,background_thread:false"


def test_a_zygote_forks_beside_scikit_learn_pandas_and_pyarrow(tmp_path):
    """All three are loaded by the time it forks, as transformers 5.17 loads them through its generation."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install -e '.[dev]'")
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import pyarrow, pandas, sklearn.metrics\n")
    executor = LocalExecutor(host=Host(path=(str(site),)))
    executor.start(tmp_path, 1)
    try:
        executor.hello()
        loaded = Path(f"/proc/{executor._zygote.pid}/maps").read_text()
        assert all(f"/{name}/" in loaded for name in ("pyarrow", "pandas", "sklearn"))
        executor.launch().close()
    finally:
        executor.close()


def test_inspecting_imports_nothing(tmp_path):
    """A module is found by its file; one that cannot even be imported is found too."""
    (tmp_path / "explosive.py").write_text("raise SystemExit('imported')")
    answer = inspect(Host(path=(str(tmp_path),)), ["explosive", "no_such_module", "torch"])
    assert answer["origins"]["explosive"] == str(tmp_path / "explosive.py")
    assert answer["origins"]["no_such_module"] is None
    assert Path(answer["origins"]["torch"]).name == "__init__.py"
    assert answer["packages"]["torch"] == library_version("torch")


@pytest.mark.parametrize("program", ["/bin/false", "/bin/echo", "/no/such/python"])
def test_a_program_that_is_no_python_is_refused(program):
    """Whether it fails, says something else or is not there: the error names it and what it said."""
    with pytest.raises(UsageError, match=program):
        inspect(Host(python=program))


def test_a_description_holds_what_an_effect_can_be_attributed_to(tmp_path):
    """Python, the libraries of the fingerprint, every distribution, and the commit of the host's own folder."""
    description = describe(Host(cwd=str(tmp_path)))
    assert description["python"] == ".".join(map(str, sys.version_info[:3]))
    assert description["libraries"] == {name: library_version(name) for name in LIBRARIES}
    assert description["packages"]["pytest"] == pytest.__version__
    assert description["cuda"] == probe_machine().cuda
    assert description["git"] == {"commit": None, "dirty": None}


def test_what_a_side_says_goes_before_what_holds_here(small_study, machine):
    """The provenance of a side: its interpreter and libraries, the machine and the workload of the run."""
    other = {"python": "3.99", "libraries": {"peft": "0.1"}, "cuda": "99", "packages": {"peft": "0.1"}, "git": {}}
    here, there = (collect(small_study, read_facts(machine, side), 1) for side in (None, other))
    assert {name for name in there if here.get(name) != there[name]} == {*other}
    assert "packages" not in here


def test_differing_packages_are_those_whose_versions_differ():
    """Changed, added and removed ones, by name, with both versions."""
    base = {"packages": {"peft": "0.19.0", "torch": "2.13.0", "gone": "1"}}
    candidate = {"packages": {"peft": "0.20.0", "torch": "2.13.0", "new": "2"}}
    assert differing_packages(base, candidate) == {
        "gone": ("1", None),
        "new": (None, "2"),
        "peft": ("0.19.0", "0.20.0"),
    }
    assert differing_packages(base, base) == {}


def test_a_package_installed_from_a_commit_is_told_by_it(tmp_path):
    """Two commits of one version differ."""
    for name, commit in (("one", "a" * 40), ("two", "b" * 40)):
        folder = tmp_path / name / "widget-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: Widget\nVersion: 1.0\n")
        source = {"url": "https://example.org/widget", "vcs_info": {"vcs": "git", "commit_id": commit}}
        (folder / "direct_url.json").write_text(json.dumps(source))
    one, two = (describe(Host(path=(str(tmp_path / name),))) for name in ("one", "two"))
    assert differing_packages(one, two) == {"widget": ("1.0 (commit aaaaaaaaaaaa)", "1.0 (commit bbbbbbbbbbbb)")}


def copy_of_the_packages(folder):
    """A copy of the packages, to be changed, as another revision would be."""
    here = Path(harness.__file__).parents[1]
    for package in ("harness", "kernels_check"):
        subprocess.run(["cp", "-r", str(here / package), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Two started executors that log to one folder, with their greetings: the present harness, and another that marks
    each process which imports it."""
    other = copy_of_the_packages(tmp_path_factory.mktemp("other"))
    with (other / "harness" / "__init__.py").open("a") as file:
        marks = str(other / "marks")
        words = "' '.join([os.getcwd(), *sys.orig_argv[2:4]])"
        file.write(f"import os, sys\nopen({marks!r}, 'a').write({words} + '\\n')\n")
    logs = tmp_path_factory.mktemp("logs")
    hosts = {"base": Host(), "candidate": Host(path=(str(other),), cwd=str(other))}
    executors = {label: LocalExecutor(host=host, label=label) for label, host in hosts.items()}
    try:
        for executor in executors.values():
            executor.start(logs, 1)
        yield {label: (executor, executor.hello()) for label, executor in executors.items()}, logs, other
    finally:
        for executor in executors.values():
            executor.close()


def test_two_executors_share_a_folder_and_say_which_harness_they_run(sides):
    """One log each; the greeting of a host carries the version and content of the harness that it imported."""
    executors, logs, _ = sides
    hellos = {label: hello for label, (_, hello) in executors.items()}
    assert {"zygote-base.log", "zygote-candidate.log"} <= {path.name for path in (logs / "logs").iterdir()}
    assert hellos["base"].harness == harness_identity()
    assert hellos["candidate"].harness != harness_identity()
    assert {hello.harness.split(" sha256:")[0] for hello in hellos.values()} == {library_version("lorameter")}


class Silent:
    """A watcher that looks away."""

    def trial_phase(self, slot, phase):
        pass

    def trial_ended(self, record):
        pass


@pytest.mark.selftest
def test_a_trial_runs_on_a_host_from_training_to_cold_start(sides, small_study, tmp_path):
    """Zygote, token process and cold interpreter all import the host's code, in the host's folder."""
    executors, _, other = sides
    executor, _ = executors["candidate"]
    protocol = dataclasses.replace(small_study.protocol, replicates=1)
    plan = make_plan(dataclasses.replace(small_study, protocol=protocol))
    plan = dataclasses.replace(plan, groups=plan.groups[:1])  # any other trial would show the same again
    tokens = executor.prepare_tokens(small_study.workload)
    site = site_of(small_study.workload, tokens, "cpu")
    (record,) = run_plan(plan, {"": executor}, site, save=lambda record: None, watcher=Silent()).records
    assert record.status == "ok", record.failure
    assert "cold_start_time_s" in record.values
    processes = ("zygote", "cold", "tokens")
    assert {*(other / "marks").read_text().splitlines()} == {f"{other} harness.worker {each}" for each in processes}


def test_a_side_that_speaks_another_schema_is_refused_by_name(tmp_path):
    """Its records could not be read, so it is an error before anything is measured."""
    other = copy_of_the_packages(tmp_path)
    record = other / "harness" / "records" / "record.py"
    record.write_text(record.read_text().replace(f"\nSCHEMA = {SCHEMA}\n", f"\nSCHEMA = {SCHEMA + 1}\n"))
    host = Host(path=(str(other),), cwd=str(other))
    executor = LocalExecutor(host=host, label="candidate")
    executor.start(tmp_path, 1)
    try:
        with pytest.raises(
            InvalidRunError, match=f"worker of 'candidate' speaks schema {SCHEMA + 1}, this program {SCHEMA}"
        ):
            executor.hello()
    finally:
        executor.close()


def test_a_host_that_cannot_import_is_an_error_that_names_side_and_interpreter(tmp_path):
    """The message is the worker's last line, with the log of that side."""
    broken = tmp_path / "path" / "transformers"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('broken on purpose')")
    host = Host(path=(str(broken.parent),))
    executor = LocalExecutor(host=host, label="base")
    executor.start(tmp_path, 1)
    with pytest.raises(InvalidRunError, match=r"worker of 'base' did not start: .*broken on purpose.*zygote-base\.log"):
        executor.hello()


def test_tokens_are_made_in_the_folder_that_was_meant(small_study, tmp_path, monkeypatch):
    """A host runs elsewhere; a relative folder is still the parent's. What is not to be kept goes with the executor."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    root = str(Path(harness.__file__).parents[1])
    host = Host(path=(root,), cwd=str(tmp_path / "elsewhere"))
    executor = LocalExecutor(host=host, label="base")
    executor.start(Path("run"), 1)
    try:
        kept, lost = (executor.prepare_tokens(small_study.workload, keep=keep) for keep in (True, False))
        assert Path(lost.path).is_file()
    finally:
        executor.close()
    assert Path(kept.path).parent == tmp_path / "run"
    assert Path(kept.path).is_file()
    assert not Path(lost.path).exists()
    assert (tmp_path / "run" / "logs" / "tokens-base.log").is_file()


@pytest.fixture
def program(tmp_path):
    """A function that writes a program for the shell; its path."""

    def write(text):
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return write


def test_a_program_that_talks_without_end_is_ended(program, tmp_path):
    """After a megabyte, with all that it has started."""
    with pytest.raises(UsageError, match="no Python that can be asked what it has installed; it said: y"):
        inspect(Host(python=program(f"sleep 300 & echo $! > {tmp_path}/started; exec yes 'y'")))
    with contextlib.suppress(psutil.NoSuchProcess):
        child = psutil.Process(int((tmp_path / "started").read_text()))
        while child.status() != psutil.STATUS_ZOMBIE:  # it was sent its end with the others, and may be taking it
            time.sleep(0.01)


def test_a_program_that_says_nothing_is_ended(program, monkeypatch):
    """When its time is over."""
    monkeypatch.setattr(host, "ANSWER_TIMEOUT_S", 0.0)
    with pytest.raises(UsageError, match="it does not answer: nothing within 0 s"):
        inspect(Host(python=program("exec sleep 300")))


def test_a_program_that_talks_without_end_has_no_more_time(program, monkeypatch):
    """A pipe that is never empty keeps nobody."""
    monkeypatch.setattr(host, "ANSWER_TIMEOUT_S", 0.0)
    monkeypatch.setattr(host, "ANSWER_BYTES", 1 << 60)
    with pytest.raises(UsageError, match="it does not answer"):
        inspect(Host(python=program("exec yes")))


def test_who_waits_for_an_interpreter_is_told(program, tmp_path, monkeypatch):
    """It answers when that has been said, beside words of its own on both streams."""
    os.mkfifo(tmp_path / "go")
    monkeypatch.setattr(answer, "OVERDUE_S", 0.0)
    told = []
    monkeypatch.setattr(host, "tell", lambda text: (told.append(text), (tmp_path / "go").write_text("go\n")))
    slow = program(f'read line < {tmp_path}/go; printf words; printf words >&2; {sys.executable} "$@"; echo words')
    assert inspect(Host(python=slow))["executable"] == sys.executable
    assert told == [f"waiting for {slow}, for 120 s at most"]
