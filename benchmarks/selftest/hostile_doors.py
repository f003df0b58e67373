"""Where input comes in: each door takes one file, and does with it all that the commands do but measure.

A door answers with the text that it would show, which must not act on a terminal. What it may raise is a refusal.
"""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import hostile
import hostile_seeds
from hostile import Mutator
from hostile_seeds import GOLDEN

from harness.commands.catalogue import _run_row
from harness.commands.output import print_json
from harness.errors import LorameterError, redact
from harness.machine.provenance import Machine
from harness.models import catalogue, shapes
from harness.models.costs.memory import estimate_memory, stored_dtype
from harness.records import codec, store
from harness.records.evidence import CHECKS
from harness.report.claims import describe_claims
from harness.report.comparison import describe_comparison
from harness.report.gate import describe_gate, gate_annotations, gate_markdown
from harness.report.plan import describe_plan
from harness.report.run import describe_run
from harness.report.sample import read_samples
from harness.report.table import Document
from harness.report.terminal import text_of
from harness.report.view import encode_run, view_of
from harness.run.executors.environments import parse_requirements
from harness.run.executors.host import read_answer
from harness.run.forecast import measured_peaks
from harness.run.measure import plan_study
from harness.run.resume import check_place, plan_of, read_broken_off
from harness.studies.study import Study
from harness.studies.study_file import load_study, load_variant
from harness.studies.workload import Workload
from harness.verdicts.ab import attribution_document, report_of
from harness.verdicts.baselines import read_base, read_comparand
from harness.verdicts.claims import judge_claims
from harness.verdicts.compare import compare
from harness.verdicts.gate import gate_document, judge, load_policy
from harness.verdicts.outcome import document
from kernels_check.trace.file import TraceError
from kernels_check.visible import make_visible


class RefusedError(Exception):
    """A refusal that a door gives as an exit code or as None; its message is what was shown."""


REFUSALS = (LorameterError, TraceError, RefusedError)
MACHINE = Machine(
    device="cpu", device_name="Test CPU", device_memory_bytes=None, driver=None, cuda=None, cpu_model="Test CPU",
    cpus=2, memory_bytes=64 * 2**30, avx512_bf16=False, kernel="6.0", python="3.11.0",
)  # fmt: skip
FREE_BYTES = 48 * 2**30


Enter = Callable[[Path, bytes], str]


@dataclass(frozen=True, kw_only=True)
class Door:
    """One kind of input."""

    name: str
    seeds: Callable[[], list[bytes]]
    spoil: Mutator
    enter: Enter
    """Puts the content into an empty folder and reads it; answers with what would be shown."""
    share: int
    """Of a hundred inputs."""


def show(report: Document) -> str:
    """A report as a terminal would be sent it."""
    return text_of(report, width=100, coloured=False)


def printed(action: Callable[[], object]) -> str:
    """What an action prints, on either stream."""
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        action()
    return out.getvalue() + errors.getvalue()


def try_each(actions: Iterable[Callable[[], str]]) -> str:
    """What several readers of one thing show: each may refuse it for itself, and the message is shown then."""
    shown = []
    for action in actions:
        try:
            shown.append(action())
        except REFUSALS as error:
            shown.append(make_visible(str(error)))
    return "\n".join(shown)


# --- what people write ------------------------------------------------------------------------------------------------


def _enter_study(folder: Path, content: bytes) -> str:
    path = folder / "study.toml"
    path.write_bytes(content)
    study = load_study(str(path), device="cpu")
    plan, notices = plan_study(study, MACHINE, free_bytes=FREE_BYTES, phases=study.protocol.phases, runs=folder)
    from harness.run.forecast import Forecast

    expected = Forecast(time_s=None, basis="none", memory_bytes=None, disk_bytes=None)
    with suppress(LorameterError):
        load_variant(str(path))
    assert all(len(f"{slot.trial}.log".encode()) <= 255 for slot in plan.slots), "a name that no file can have"
    codec.dumps(study).encode()
    return show(describe_plan(plan, expected, MACHINE, notices))


def _enter_policy(folder: Path, content: bytes) -> str:
    path = folder / "policy.toml"
    path.write_bytes(content)
    policy = load_policy(str(path))
    base, candidate = _sides()
    report = compare(base, candidate, metrics=policy.metrics, limits_of=policy.limits_of)
    result = judge(report, policy)
    return "".join(
        (show(describe_gate(result)), gate_markdown(result), gate_annotations(result),
         printed(lambda: print_json(gate_document(result))))
    )  # fmt: skip


@cache
def _sides() -> tuple[object, object]:
    runs = GOLDEN / "runs"
    return read_comparand("sound", runs), read_comparand("slower", runs)


def _enter_requirements(folder: Path, content: bytes) -> str:
    found = parse_requirements(content.decode("utf-8", errors="surrogateescape"))
    if found is None:
        raise RefusedError
    shown = redact(" ".join(found))
    assert "secret" not in shown, f"shows a credential: {shown}"
    return make_visible(shown)


def _enter_answer(folder: Path, content: bytes) -> str:
    answer = read_answer(content.decode("utf-8", errors="replace"))
    if answer is None:
        raise RefusedError
    return make_visible(" ".join((answer["python"], answer["executable"], *answer["packages"])))


def _enter_records(folder: Path, content: bytes) -> str:
    from harness.trial.data.messages import Conversation
    from harness.trial.data.records import read_records

    path = folder / "records.jsonl"
    path.write_bytes(content)
    records, label = read_records(Workload(data=str(path)))
    for record in records:
        texts = [one.content for one in record.messages] if isinstance(record, Conversation) else record.values()
        assert all(isinstance(text, str) for text in texts)
    return make_visible(label)


# --- models -----------------------------------------------------------------------------------------------------------


def _enter_config(folder: Path, content: bytes) -> str:
    (folder / "config.json").write_bytes(content)
    return _look_at_model(str(folder))


def _enter_gguf(folder: Path, content: bytes) -> str:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return _look_at_model(str(path))


def _look_at_model(model: str) -> str:
    source = catalogue.resolve(model)
    shape = shapes.shape(source)
    study = load_study("training-step", device="cpu").with_overrides(model=f"random:{model}")
    stored = stored_dtype(source)
    if shapes.unknown_layers(shape) is None:
        for phase in ("train", "generate"):
            for device in ("cpu", "cuda"):
                codec.dumps(
                    estimate_memory(
                        study.variants[0],
                        study.workload,
                        shape,
                        phase=phase,
                        device=device,
                        stored=stored,
                    )
                )
    plan, notices = plan_study(study, MACHINE, free_bytes=FREE_BYTES)
    return make_visible(" ".join(notice.message for notice in notices)) + plan.why


# --- runs -------------------------------------------------------------------------------------------------------------


def _enter_manifest(folder: Path, content: bytes) -> str:
    return _enter_run(folder, content, "manifest.json")


def _enter_trials(folder: Path, content: bytes) -> str:
    return _enter_run(folder, content, "trials.jsonl")


def _enter_checks(folder: Path, content: bytes) -> str:
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
        _run_row(runs / "it")

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
    yield lambda: _against(read_comparand("it", runs))
    yield lambda: _gone_on_with(read_broken_off("it", runs, study=None))

    def sample() -> str:
        study = codec.from_json(Study, run.manifest.study, "it")
        return "".join(one.trained for one in read_samples(run, study.variants[0].name))[:0]

    yield sample


def _gone_on_with(run) -> str:
    check_place(run, _facts())
    return str(len(plan_of(run).slots))


@cache
def _facts():
    from harness.machine.provenance import read_facts

    return read_facts(MACHINE)


def _against(candidate: object) -> str:
    base = dataclasses.replace(_sides()[0], sides=_sides()[0].sides)
    report = compare(base, candidate, force=True)
    result = judge(report, load_policy(None))
    return "".join(
        (show(describe_gate(result)), gate_markdown(result), gate_annotations(result),
         printed(lambda: print_json(gate_document(result))))
    )  # fmt: skip


def _enter_baselines(folder: Path, content: bytes) -> str:
    (folder / "baselines.json").write_bytes(content)
    shutil.copytree(GOLDEN / "runs" / "sound", folder / "sound")
    candidate = _sides()[0]
    base = read_base("baseline", folder, fingerprint=candidate.fingerprint, study=candidate.study)
    return make_visible(str(base.absent or base.name))


def _enter_benchmark(folder: Path, content: bytes) -> str:
    path = folder / "saved.json"
    path.write_bytes(content)
    return _against(read_comparand(str(path), folder))


def _enter_recording(folder: Path, content: bytes) -> str:
    from kernels_check.__main__ import main

    path = folder / "recording"
    path.write_bytes(content)

    codes: list[int] = []

    def judge_it() -> None:
        codes.extend(main(["trace", str(path), *form]) for form in ([], ["--json"]))

    shown = printed(judge_it)
    assert set(codes) <= {0, 2}, f"exit codes {codes}"
    if 2 in codes:
        raise RefusedError(shown)
    return shown


# --- all of them -----------------------------------------------------------------------------------------------------

_TOML, _JSON, _LINES, _BYTES = hostile.spoil_toml, hostile.spoil_json, hostile.spoil_lines, hostile.spoil_bytes
_POLICIES, _SAVED = ("strict.toml", "lenient.toml"), ("sound.json", "foreign.json")
_KINETO = ("kernels.json", "operators.json")
_ROWS: tuple[tuple[str, int, Mutator, Callable[[], list[bytes]], Enter], ...] = (
    ("study", 16, _TOML, hostile_seeds.studies, _enter_study),
    ("policy", 8, _TOML, hostile_seeds.files(*_POLICIES), _enter_policy),
    ("requirements", 8, hostile.spoil_words, lambda: [b"peft==0.19.1"], _enter_requirements),
    ("interpreter", 4, _JSON, hostile_seeds.answers, _enter_answer),
    ("records", 12, _LINES, hostile_seeds.records, _enter_records),
    ("config", 12, _JSON, hostile_seeds.configs, _enter_config),
    ("gguf", 4, _BYTES, hostile_seeds.ggufs, _enter_gguf),
    (
        "manifest",
        8,
        hostile_seeds.keep_head(_JSON),
        hostile_seeds.of_runs("manifest.json"),
        _enter_manifest,
    ),
    (
        "trials",
        6,
        hostile_seeds.keep_head(_LINES),
        hostile_seeds.of_runs("trials.jsonl"),
        _enter_trials,
    ),
    ("checks", 2, hostile_seeds.keep_head(_LINES), hostile_seeds.checks, _enter_checks),
    ("baselines", 4, _JSON, hostile_seeds.baselines, _enter_baselines),
    ("benchmark", 6, _JSON, hostile_seeds.files(*_SAVED), _enter_benchmark),
    ("kineto", 6, _JSON, hostile_seeds.files(*_KINETO), _enter_recording),
    ("nsys", 4, hostile.spoil_table, hostile_seeds.files("kernels.csv"), _enter_recording),
)
DOORS: dict[str, Door] = {
    name: Door(name=name, share=share, spoil=spoil, seeds=seeds, enter=enter)
    for name, share, spoil, seeds, enter in _ROWS
}
"""By name."""
