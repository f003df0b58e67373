"""Parity, measured: an adapter that has really been trained, served by one process after another.

The adapter of a trial that has not trained is no test: its B is zero, so that merging it adds nothing. So it is trained
as a run of the study trains it, or given as a folder that PEFT has saved. Each base is served by a process of its own,
so that one that does not fit ends alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorameter.errors import InvalidRunError, UsageError, impossible, said_by
from lorameter.parity.facts import DOCUMENT, Parity
from lorameter.profile.measure import TrialSession, answer_of, describe_failure, format_failure, open_trial
from lorameter.records import codec, fileio
from lorameter.records.parity import PROMPTS, SERVED, Served
from lorameter.records.record import Failure, PartialRecord
from lorameter.run.workers import Executor
from lorameter.studies.request import ServingMode, ServingRequest, serving_modes
from lorameter.studies.study import Study
from lorameter.studies.variant import Variant

STEPS = 16
"""Of one command: each has the protocol's time for itself."""
TIMEOUT_S = 3600.0
"""For one base: to load it and to answer all prompts."""
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def check_adapter(folder: str) -> Path:
    """The folder of an adapter. Raises `UsageError` for one that holds no LoRA adapter as PEFT saves it."""
    path = Path(folder).resolve()
    remedy = "Name the folder that save_pretrained wrote the adapter into."
    for name in (CONFIG, WEIGHTS):
        if not fileio.is_file(path / name):
            raise impossible("parity", "adapter", folder, f"it holds no {name}", remedy)
    try:
        kind = codec.from_json(dict[str, Any], fileio.read_json(path / CONFIG, fileio.MANIFEST_BYTES), CONFIG)
    except (fileio.NotReadableError, UsageError) as error:
        why = f"its {CONFIG} cannot be read ({said_by(error)})"
        raise impossible("parity", "adapter", folder, why, remedy) from None
    if kind.get("peft_type") != "LORA":
        why = f"its {CONFIG} says peft_type = {kind.get('peft_type')!r}, and LoRA adapters are merged"
        raise impossible("parity", "adapter", folder, why, remedy)
    return path


def measure_parity(
    study: Study,
    variant: Variant,
    executor: Executor,
    *,
    runs: Path,
    adapter: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Parity, Path]:
    """Serve one variant's adapter in all ways; returns what was observed and the folder in which it was written.

    Args:
        study: the workload, and the protocol that says how long an adapter trains.
        variant: of the study.
        executor: where; it is started and closed here.
        runs: the folder is made in it, next to runs.
        adapter: of `check_adapter`; None to train one.
        say: called with a line of progress.

    Raises:
        UsageError: parity cannot be measured on this machine.
        InvalidRunError: the training did not end, or the reference gave no answer; the message says where
            the log is.
    """
    with open_trial(study, variant, executor, runs=runs, say=say, document=DOCUMENT, label="parity") as trial:
        if adapter is None:
            _train(trial)
        trial.worker.close()
        served, prompts = _serve(trial, variant, str(adapter or Path(trial.request.scratch) / "adapter"))
        parity = Parity(
            study=study.name,
            variant=variant,
            workload=study.workload,
            device=trial.machine.device,
            device_name=trial.machine.device_name,
            adapter="" if adapter is None else str(adapter),
            record=trial.record if adapter is None else None,
            ways=tuple(way for group in serving_modes(variant) for way in group),
            served=tuple(served),
            prompts=prompts,
            notices=() if adapter is None else trial.record.notices,  # else they are those of the record
        )
        trial.keep(DOCUMENT, parity)
    return parity, trial.folder


def _train(trial: TrialSession) -> None:
    """As a run trains: every step of the protocol, or of the given epochs."""
    trial.begin(profiled=False)
    while trial.ask("train", steps=STEPS).samples["remaining_loss"]:
        pass
    trial.ask("finish_training")
    trial.ask("save_adapter")
    trial.record = trial.record.replaced(wall_time_s=trial.elapsed_s)


def _serve(trial: TrialSession, variant: Variant, adapter: str) -> tuple[list[Served], tuple[tuple[int, ...], ...]]:
    """The observations of all ways, in their order, and the prompts."""
    served: list[Served] = []
    prompts: tuple[tuple[int, ...], ...] = ()
    for ways in serving_modes(variant):
        trial.say(f"serving: {'; '.join(way.name for way in ways)}")
        request = ServingRequest(
            trial=trial.request, adapter=adapter, ways=ways, reference=served[0].answers if served else ()
        )
        fragment = answer_of(lambda request=request: _serve_base(trial.executor, request))  # type: ignore[misc]
        if fragment.status == "interrupted":  # refused by the system, as it would be to any way
            raise InvalidRunError(f"{variant.name}: {describe_failure(fragment)}.")
        served += _read(fragment, ways)
        if served[0].failure is not None:
            raise InvalidRunError(
                f"{variant.name}: {served[0].way}, the reference, gave no answer: {format_failure(served[0].failure)}. "
                f"The log is {request.trial.log_path}."
            )
        prompts = prompts or codec.from_json(tuple[tuple[int, ...], ...], fragment.tokens[PROMPTS], "prompts")
    return served, prompts


def _serve_base(executor: Executor, request: ServingRequest) -> PartialRecord:
    worker = executor.launch()
    try:
        trial = request.trial
        timeout = max(TIMEOUT_S, trial.protocol.step_timeout_s)
        return worker.ask("parity", trial.trial, timeout, request=codec.to_json(request))
    finally:
        worker.close()


def _read(fragment: PartialRecord, ways: Sequence[ServingMode]) -> list[Served]:
    """What a process says of its ways; where it failed, its failure, for each of them."""
    if fragment.status == "ok":
        return list(codec.from_json(tuple[Served, ...], fragment.tokens.get(SERVED), "what was served"))
    failure = fragment.failure or Failure(phase="parity", kind="Unknown", message="no message")
    return [Served(way=way.name, failure=failure) for way in ways]


def with_prompts(study: Study, *, prompts: int | None, epochs: float | None) -> Study:
    """The study with so many held-out records, each of which makes a prompt where it is long enough, and trained for
    so many epochs; what is None stays. Raises `UsageError` for what is out of range."""
    if prompts is not None:
        workload = dataclasses.replace(study.workload, held_out_records=prompts)
        study = dataclasses.replace(study, workload=workload)
    if epochs is not None:
        study = dataclasses.replace(study, protocol=dataclasses.replace(study.protocol, epochs=epochs))
    return study
