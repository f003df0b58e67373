"""Measures parity: trains an adapter, and serves it in one process after another.

An untrained adapter would test nothing: its B is zero, so merging it adds nothing. So the adapter is trained as in a
run of the study, or given as a folder saved by PEFT. Each base is served by a separate process, so that running out of
memory ends only one of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorameter.errors import InvalidRunError, UsageError, format_error, impossible
from lorameter.parity.judgement import DOCUMENT, Parity
from lorameter.profile.measure import TrialSession, answer_of, format_failure, open_trial
from lorameter.records import codec, fileio
from lorameter.records.codec import NotReadableError
from lorameter.records.record import PROMPTS, SERVED, Failure, PartialRecord, Served
from lorameter.run.workers import Executor
from lorameter.studies.request import ServingMode, ServingRequest, serving_modes
from lorameter.studies.study import Study
from lorameter.studies.variant import Variant

STEPS = 16
"""Steps of one command; each command has the protocol's timeout."""
TIMEOUT_S = 3600.0
"""Timeout for one base: loading it and answering all prompts."""
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def check_adapter(folder: str) -> Path:
    """The folder of an adapter. Raises `UsageError` if it contains no LoRA adapter saved by PEFT."""
    path = Path(folder).resolve()
    remedy = "Name the folder that save_pretrained wrote the adapter into."
    for name in (CONFIG, WEIGHTS):
        if not fileio.is_file(path / name):
            raise impossible("parity", "adapter", folder, f"it holds no {name}", remedy)
    try:
        kind = codec.from_json(dict[str, Any], fileio.read_json(path / CONFIG), CONFIG)
    except (NotReadableError, UsageError) as error:
        why = f"its {CONFIG} cannot be read ({format_error(error)})"
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
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[Parity, Path]:
    """Serve one variant's adapter in all ways; returns the observations and the folder with the results.

    Args:
        study: the study with the workload, and the protocol that determines the length of the training.
        variant: variant of the study.
        executor: where the processes run; it is started and closed here.
        runs: the folder of runs, in which the result folder is made.
        adapter: result of `check_adapter`; None to train an adapter.
        progress: called with a line of progress.

    Raises:
        UsageError: parity cannot be measured on this machine.
        InvalidRunError: the training did not end, or the reference gave no answer; the message says where the log is.
    """
    with open_trial(study, variant, executor, runs=runs, progress=progress, document=DOCUMENT, label="parity") as trial:
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
            notices=() if adapter is None else trial.record.notices,  # otherwise the record has them
        )
        trial.keep(DOCUMENT, parity)
    return parity, trial.folder


def _train(trial: TrialSession) -> None:
    """Train as in a run: every step of the protocol, or of the given epochs."""
    trial.begin(profiled=False)
    while trial.ask("train", steps=STEPS).samples["remaining_loss"]:
        pass
    trial.ask("finish_training")
    trial.ask("save_adapter")
    trial.record = trial.record.replaced(wall_time_s=trial.elapsed_s)


def _serve(trial: TrialSession, variant: Variant, adapter: str) -> tuple[list[Served], tuple[tuple[int, ...], ...]]:
    """The observations of all ways, in order, and the prompts."""
    served: list[Served] = []
    prompts: tuple[tuple[int, ...], ...] = ()
    for ways in serving_modes(variant):
        trial.progress(f"serving: {'; '.join(way.name for way in ways)}")
        request = ServingRequest(
            trial=trial.request, adapter=adapter, ways=ways, reference=served[0].answers if served else ()
        )
        fragment = answer_of(lambda request=request: _serve_base(trial.executor, request))  # type: ignore[misc]
        if fragment.status == "interrupted":  # a system limit, which would affect every way
            raise InvalidRunError(f"{variant.name}: {format_failure(fragment.failure)}.")
        served += _read(fragment, ways)
        if served[0].failure is not None:
            raise InvalidRunError(
                f"{variant.name}: {served[0].way}, the reference, gave no answer: {format_failure(served[0].failure)}. "
                f"The log is {request.trial.log_path}."
            )
        prompts = prompts or codec.from_json(tuple[tuple[int, ...], ...], fragment.tokens[PROMPTS], "prompts")
    return served, prompts


def _serve_base(executor: Executor, request: ServingRequest) -> PartialRecord:
    with contextlib.closing(executor.launch()) as worker:
        timeout_s = max(TIMEOUT_S, request.trial.protocol.step_timeout_s)
        return worker.ask("parity", request.trial.trial, timeout_s, request=codec.to_json(request))


def _read(fragment: PartialRecord, ways: Sequence[ServingMode]) -> list[Served]:
    """The observations of a process for its ways; if it failed, its failure for each of them."""
    if fragment.status == "ok":
        return list(codec.from_json(tuple[Served, ...], fragment.tokens.get(SERVED), "what was served"))
    failure = fragment.failure or Failure(phase="parity", kind="Unknown", message="no message")
    return [Served(way=way.name, failure=failure) for way in ways]


def with_prompts(study: Study, *, prompts: int | None, epochs: float | None) -> Study:
    """The study with this many held-out records (each makes a prompt if it is long enough), and this many epochs; None
    leaves a value unchanged. Raises `UsageError` for a value out of range."""
    if prompts is not None:
        study = dataclasses.replace(study, workload=dataclasses.replace(study.workload, held_out_records=prompts))
    if epochs is not None:
        study = dataclasses.replace(study, protocol=dataclasses.replace(study.protocol, epochs=epochs))
    return study
