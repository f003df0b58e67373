"""Where input comes in: all doors, and those of what people write and record."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import hostile
import hostile_data
import hostile_machine
import hostile_models
import hostile_runs
import hostile_seeds
from hostile import Mutator
from hostile_door import FREE_BYTES, MACHINE, Door, Enter, RefusedError, printed, show

from harness.commands.output import print_json
from harness.errors import LorameterError, redact
from harness.records import codec
from harness.report.annotations import gate_annotations
from harness.report.gate import describe_gate
from harness.report.markdown import markdown_of
from harness.report.plan import describe_plan
from harness.run.executors.environments import parse_requirements
from harness.run.measure import plan_study
from harness.studies.study_file import load_study, load_variant
from harness.studies.workload import Workload
from harness.verdicts.compare import compare
from harness.verdicts.gate import gate_document, judge, load_policy
from kernels_check.visible import make_visible

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
    base, candidate = hostile_runs.sides()
    report = compare(base, candidate, metrics=policy.metrics, limits_of=policy.limits_of)
    result = judge(report, policy)
    return "".join(
        (show(describe_gate(result)), markdown_of(describe_gate(result)), gate_annotations(result),
         printed(lambda: print_json(gate_document(result))))
    )  # fmt: skip


def _enter_requirements(folder: Path, content: bytes) -> str:
    found = parse_requirements(content.decode("utf-8", errors="surrogateescape"))
    if found is None:
        raise RefusedError
    shown = redact(" ".join(found))
    assert "secret" not in shown, f"shows a credential: {shown}"
    return make_visible(shown)


def _enter_records(folder: Path, content: bytes) -> str:
    return _read_records(folder / "records.jsonl", content)


def _enter_packed_records(folder: Path, content: bytes) -> str:
    return _read_records(folder / "records.jsonl.gz", content)


def _enter_listed_records(folder: Path, content: bytes) -> str:
    return _read_records(folder / "records.json", content)


def _read_records(path: Path, content: bytes) -> str:
    from harness.trial.data.messages import Conversation
    from harness.trial.data.records import read_records

    path.write_bytes(content)
    records, label = read_records(Workload(data=str(path)))
    for record in records:
        texts = [one.content for one in record.messages] if isinstance(record, Conversation) else record.values()
        assert all(isinstance(text, str) for text in texts)
    return make_visible(label)


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
_OF_RUN, _LINES_OF_RUN = hostile_seeds.keep_head(_JSON), hostile_seeds.keep_head(_LINES)
_POLICIES, _SAVED = ("strict.toml", "lenient.toml"), ("sound.json", "foreign.json")
_KINETO, _NSYS = hostile_seeds.files("kernels.json", "operators.json"), hostile_seeds.files("kernels.csv")
_ROWS: tuple[tuple[str, int, Mutator, Callable[[], list[bytes]], Enter], ...] = (
    ("study", 16, _TOML, hostile_seeds.studies, _enter_study),
    ("policy", 8, _TOML, hostile_seeds.files(*_POLICIES), _enter_policy),
    ("requirements", 8, hostile.spoil_words, lambda: [b"peft==0.19.1"], _enter_requirements),
    ("interpreter", 4, _JSON, hostile_machine.answers, hostile_machine.enter_answer),
    ("kernel", 4, hostile_machine.spoil_kernel, hostile_machine.kernels, hostile_machine.enter_kernel),
    ("variable", 2, hostile_machine.spoil_list, hostile_machine.lists, hostile_machine.enter_variable),
    ("records", 8, _LINES, hostile_seeds.records, _enter_records),
    ("records-packed", 4, hostile.packed(_LINES), hostile_seeds.records, _enter_packed_records),
    ("records-listed", 4, _JSON, hostile_seeds.listed_records, _enter_listed_records),
    ("config", 10, _JSON, hostile_models.configs, hostile_models.enter_config),
    ("gguf", 4, _BYTES, hostile_models.ggufs, hostile_models.enter_gguf),
    ("tokenizer", 3, _LINES, hostile_models.tokenizer_files, hostile_models.enter_tokenizer),
    ("weights", 2, hostile_models.spoil_weights, hostile_models.weights, hostile_models.enter_weights),
    ("cache", 2, _JSON, hostile_models.places_in_cache, hostile_models.enter_cache),
    ("manifest", 8, _OF_RUN, hostile_seeds.of_runs("manifest.json"), hostile_runs.enter_manifest),
    ("trials", 6, _LINES_OF_RUN, hostile_seeds.of_runs("trials.jsonl"), hostile_runs.enter_trials),
    ("checks", 2, _LINES_OF_RUN, hostile_seeds.checks, hostile_runs.enter_checks),
    ("answer", 3, _JSON, hostile_runs.answers_of_trials, hostile_runs.enter_answer),
    ("baselines", 4, _JSON, hostile_seeds.baselines, hostile_runs.enter_baselines),
    ("benchmark", 6, _JSON, hostile_seeds.files(*_SAVED), hostile_runs.enter_benchmark),
    ("compared", 2, _JSON, hostile_seeds.files(*_SAVED), hostile_runs.enter_compared),
    ("kineto", 5, _JSON, _KINETO, _enter_recording),
    ("kineto-packed", 2, hostile.packed(_JSON), _KINETO, _enter_recording),
    ("nsys", 3, hostile.spoil_table, _NSYS, _enter_recording),
    ("nsys-packed", 1, hostile.packed(hostile.spoil_table), _NSYS, _enter_recording),
    ("table", 3, hostile.spoil_table, hostile_data.tables, hostile_data.enter_table),
    ("parquet", 3, _BYTES, hostile_data.parquets, hostile_data.enter_parquet),
    ("saved", 3, hostile_data.spoil_saved, hostile_data.saved_sets, hostile_data.enter_saved),
    ("template", 2, hostile_data.spoil_template, hostile_data.templates, hostile_data.enter_template),
    ("talk", 6, _LINES, hostile_data.talks, hostile_data.enter_talk),
    ("commands", 6, _TOML, lambda: [hostile_data.STUDY], hostile_data.in_folder_of_a_script(_enter_study)),
    ("require", 3, hostile_data.spoil_requirement, lambda: [b"base.bits=4"], hostile_data.enter_requirement),
)
DOORS: dict[str, Door] = {
    name: Door(name=name, share=share, spoil=spoil, seeds=seeds, enter=enter)
    for name, share, spoil, seeds, enter in _ROWS
}
"""By name."""
