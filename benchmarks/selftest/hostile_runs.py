"""Doors of what runs leave: their files, the accepted ones, what pytest-benchmark saves, and answers of trials."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import hostile_seeds
import pytest
from hostile_door import MACHINE, RefusedError, printed, show, try_each
from hostile_seeds import GOLDEN

from harness.commands.catalogue import _run_rows
from harness.commands.output import print_json
from harness.commands.pytest_session import Session
from harness.machine.provenance import comparable
from harness.records import codec, store
from harness.records.evidence import CHECKS
from harness.records.forms import flaw_of
from harness.records.record import Fragment
from harness.report.annotations import gate_annotations
from harness.report.claims import describe_claims
from harness.report.comparison import describe_comparison
from harness.report.gate import describe_gate
from harness.report.markdown import markdown_of
from harness.report.run import describe_run
from harness.report.sample import read_samples
from harness.report.view import encode_run, view_of
from harness.run.executors import WorkerLostError
from harness.run.executors.channel import Channel
from harness.run.executors.forked import ForkedWorker
from harness.run.forecast import measured_peaks
from harness.run.resume import check_place, plan_of, read_broken_off
from harness.studies.study import Study
from harness.studies.workload import Workload
from harness.verdicts.ab import attribution_document, report_of
from harness.verdicts.baselines import read_base, read_comparand
from harness.verdicts.claims import judge_claims
from harness.verdicts.compare import compare
from harness.verdicts.gate import gate_document, judge, load_policy
from harness.verdicts.outcome import document
from kernels_check.visible import make_visible


def enter_manifest(folder: Path, content: bytes) -> str:
    """The content in the place of a manifest."""
    return _enter_run(folder, content, "manifest.json")


def enter_trials(folder: Path, content: bytes) -> str:
    """In the place of the records."""
    return _enter_run(folder, content, "trials.jsonl")


def enter_checks(folder: Path, content: bytes) -> str:
    """In the place of the evidence."""
    return _enter_run(folder, content, "checks.jsonl")


def _enter_run(folder: Path, content: bytes, name: str) -> str:
    """The content in the place of one file of a sound run; the first line of the content names which run."""
    which, _, content = content.partition(b"\n")
    source = GOLDEN / "runs" / which.decode("ascii", errors="replace")
    path = folder / "it"
    shutil.copytree(source if source.is_dir() else GOLDEN / "runs" / "sound", path)
    (path / name).write_bytes(content)
    if name == CHECKS:
        (path / "trials.jsonl").write_bytes(hostile_seeds.written_anew()[1])
    return try_each(readers_of_run(folder))


def readers_of_run(runs: Path) -> Iterator[Callable[[], str]]:
    """Everything that reads a run. That of other runs must not be stopped by it at all."""

    def look() -> None:
        measured_peaks(Workload(), MACHINE, runs, "host_peak_train_bytes")
        _run_rows(runs)

    yield lambda: printed(look)
    run = store.read_run("it", runs)
    if run.manifest.sides:
        yield lambda: show(describe_comparison(report_of(run)))
        yield lambda: printed(lambda: print_json(document(report_of(run))))
        yield lambda: printed(lambda: print_json(attribution_document(run)))
        return
    yield lambda: show(describe_run(view_of(run)))
    yield lambda: printed(lambda: print_json(encode_run(view_of(run))))
    yield lambda: show(describe_claims(judge_claims(run)))
    yield lambda: against(read_comparand("it", runs))
    yield lambda: _gone_on_with(read_broken_off("it", runs, study=None))

    def sample() -> str:
        study = codec.from_json(Study, run.manifest.study, "it")
        return "".join(one.trained for one in read_samples(run, study.variants[0].name))[:0]

    yield sample


def _gone_on_with(run) -> str:
    check_place(run, _facts())
    return str(len(plan_of(run).slots))


@cache
def sides() -> tuple[object, object]:
    """A sound run and one that is slower."""
    runs = GOLDEN / "runs"
    return read_comparand("sound", runs), read_comparand("slower", runs)


@cache
def _facts():
    from harness.machine.provenance import read_facts

    return read_facts(MACHINE)


def against(candidate: object) -> str:
    """A candidate held against a sound run, and gated."""
    base = dataclasses.replace(sides()[0], sides=sides()[0].sides)
    report = compare(base, candidate, force=True)
    result = judge(report, load_policy(None))
    return "".join(
        (show(describe_gate(result)), markdown_of(describe_gate(result)), gate_annotations(result),
         printed(lambda: print_json(gate_document(result))))
    )  # fmt: skip


def enter_baselines(folder: Path, content: bytes) -> str:
    """The accepted runs of a folder."""
    (folder / "baselines.json").write_bytes(content)
    shutil.copytree(GOLDEN / "runs" / "sound", folder / "sound")
    candidate = sides()[0]
    base = read_base("baseline", folder, fingerprint=candidate.fingerprint, study=candidate.study)
    return make_visible(str(base.absent or base.name))


def enter_benchmark(folder: Path, content: bytes) -> str:
    """What pytest-benchmark has saved, held against a run."""
    path = folder / "saved.json"
    path.write_bytes(content)
    return against(read_comparand(str(path), folder))


def answers_of_trials() -> list[bytes]:
    """What a trial's process sends: a fragment that has something in each of its fields."""
    run = store.read_run("full-checks", GOLDEN / "runs")
    names = {field.name for field in dataclasses.fields(Fragment)}
    return [
        codec.dumps({name: value for name, value in codec.to_json(record).items() if name in names}).encode()
        for record in run.records[:4]
    ]


def enter_answer(folder: Path, content: bytes) -> str:
    """A line from the process of a trial, which runs whatever a variant asks for; the record that it is merged into."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(content.replace(b"\n", b" ") + b"\n")
    mother = SimpleNamespace(lives=False, last_words=lambda: "it ended", reap=lambda pid: None)
    try:
        fragment = ForkedWorker(0, Channel(ours), mother).ask("train", "x", 1.0)
    except WorkerLostError as lost:
        raise RefusedError(make_visible(str(lost))) from None
    finally:
        ours.close()
    record = store.read_run("sound", GOLDEN / "runs").records[0].merged(fragment)
    if flaw := flaw_of(record):
        raise RefusedError(make_visible(flaw))
    store.RunWriter(folder, store.read_manifest(GOLDEN / "runs" / "sound")).append(record)
    assert len(store.read_run("sound", folder).records) == 1, "a record was written that is not read"
    return ""


def enter_compared(folder: Path, content: bytes) -> str:
    """What pytest-benchmark has read for `--benchmark-compare`: a table, whose form is its own affair."""
    session = object.__new__(Session)
    session._study = codec.from_json(Study, store.read_manifest(GOLDEN / "runs" / "sound").study, "sound")
    ours = {"lorameter": comparable(store.read_manifest(GOLDEN / "runs" / "sound").provenance)}
    try:
        saved = json.loads(content)
        if not isinstance(saved, dict):
            raise RefusedError
    except (ValueError, RecursionError):
        raise RefusedError from None
    try:
        session.pytest_benchmark_compare_machine_info(ours, saved)
    except pytest.UsageError as error:  # printed as it is
        return str(error)
    return ""
