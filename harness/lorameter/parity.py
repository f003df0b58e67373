"""Parity: trains an adapter, serves it in one process after another in several ways, and judges whether each way gives
the reference's answers, as far as the number of prompts allows.

An untrained adapter would test nothing: its B is zero, so merging it adds nothing. So the adapter is trained as in a
run of the study, or given as a folder saved by PEFT. Each base is served by a separate process, so that running out of
memory ends only one of them.

The reference served twice is the noise floor; a difference within it does not count. The base without the adapter is
the opposite control: if the adapter changes nothing, an unchanged answer proves nothing about a merge.

Answers are independent of each other, so their share has a binomial interval. Tokens of one answer and losses of one
sequence are not independent: their intervals are over answers and over sequences. Maxima and minima are observed values
without intervals.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from lorameter.errors import InvalidRunError, UsageError, format_error, refused_value
from lorameter.profile.measure import TrialSession, ask_or_fail, format_failure, open_trial
from lorameter.records import codec, fileio
from lorameter.records.codec import NotReadableError
from lorameter.records.record import PROMPTS, SERVED, Failure, Notice, PartialRecord, ServedAnswers, TrialRecord
from lorameter.run.workers import Executor
from lorameter.stats import Estimate, Proportion, clustered_proportion, mean_interval, proportion
from lorameter.studies.request import AGAIN, WITHOUT, ServingMode, ServingRequest, serving_modes
from lorameter.studies.study import Study
from lorameter.studies.variant import BuiltVariant, Variant
from lorameter.studies.workload import Workload

SCHEMA = 1
DOCUMENT = "parity.json"
"""The file with the facts in a folder of logs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """All facts, without estimates.

    Attributes:
        schema: version of the file.
        study: name of the study.
        variant: variant of the adapter.
        workload: workload of the prompts.
        device: "cpu" or "cuda".
        device_name: the vendor's name of the device.
        adapter: folder of a given adapter; empty if it was trained here.
        record: the training of the adapter, with its checks; None for a given adapter.
        ways: ways in the order of serving; the first is the reference.
        served: the observations for each way.
        prompts: number of tokens of each prompt.
        notices: notices about the machine and the study, if there is no record.
    """

    schema: int = SCHEMA
    study: str
    variant: BuiltVariant
    workload: Workload
    device: str
    device_name: str
    adapter: str
    record: TrialRecord | None
    ways: tuple[ServingMode, ...]
    served: tuple[ServedAnswers, ...]
    prompts: tuple[tuple[int, ...], ...]
    notices: tuple[Notice, ...] = ()

    @property
    def reference(self) -> ServedAnswers:
        """The observations of the reference: the adapter unmerged, on the base on which it was trained."""
        return self.served[0]


# --- measurement ------------------------------------------------------------------------------------------------------

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
            raise refused_value("parity", "adapter", folder, f"it does not contain {name}", remedy)
    try:
        kind = codec.from_json(dict[str, Any], fileio.read_json(path / CONFIG), CONFIG)
    except (NotReadableError, UsageError) as error:
        why = f"its {CONFIG} cannot be read ({format_error(error)})"
        raise refused_value("parity", "adapter", folder, why, remedy) from None
    if kind.get("peft_type") != "LORA":
        why = f"its {CONFIG} has peft_type = {kind.get('peft_type')!r}, and only LoRA adapters are compared"
        raise refused_value("parity", "adapter", folder, why, remedy)
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
        trial.store(DOCUMENT, parity)
    return parity, trial.folder


def _train(trial: TrialSession) -> None:
    """Train as in a run: every step of the protocol, or of the given epochs."""
    trial.begin(profiled=False)
    while trial.ask("train", steps=STEPS).samples["remaining_loss"]:
        pass
    trial.ask("finish_training")
    trial.ask("save_adapter")
    trial.record = trial.record.replaced(wall_time_s=trial.elapsed_s)


def _serve(
    trial: TrialSession, variant: Variant, adapter: str
) -> tuple[list[ServedAnswers], tuple[tuple[int, ...], ...]]:
    """The observations of all ways, in order, and the prompts."""
    served: list[ServedAnswers] = []
    prompts: tuple[tuple[int, ...], ...] = ()
    for ways in serving_modes(variant):
        trial.progress(f"serving: {'; '.join(way.name for way in ways)}")
        request = ServingRequest(
            trial=trial.request, adapter=adapter, ways=ways, reference=served[0].answers if served else ()
        )
        fragment = ask_or_fail(lambda request=request: _serve_base(trial.executor, request))  # type: ignore[misc]
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


def _read(fragment: PartialRecord, ways: Sequence[ServingMode]) -> list[ServedAnswers]:
    """The observations of a process for its ways; if it failed, its failure for each of them."""
    if fragment.status == "ok":
        return list(codec.from_json(tuple[ServedAnswers, ...], fragment.tokens.get(SERVED), "what was served"))
    failure = fragment.failure or Failure(phase="parity", kind="Unknown", message="no message")
    return [ServedAnswers(way=way.name, failure=failure) for way in ways]


def with_prompts(study: Study, *, prompts: int | None, epochs: float | None) -> Study:
    """The study with this many held-out records (each makes a prompt if it is long enough), and this many epochs; None
    leaves a value unchanged. Raises `UsageError` for a value out of range."""
    if prompts is not None:
        study = dataclasses.replace(study, workload=dataclasses.replace(study.workload, held_out_records=prompts))
    if epochs is not None:
        study = study.with_protocol(epochs=epochs)
    return study


# --- judgement --------------------------------------------------------------------------------------------------------

Verdict = Literal["same", "noise", "differ"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """One way of serving, compared with the reference.

    Attributes:
        way: name of the way.
        answers: share of answers with a differing token, with the interval over prompts.
        first_difference: position of the first differing token, from 1; the median over the answers that differ.
        tokens: share of positions of the reference's answers at which the most likely token differs, with the interval
            over answers.
        kl_mean_nats: divergence from the reference's distribution of the next token.
        kl_max_nats: the largest divergence.
        difference_mean: mean absolute difference of the logits.
        difference_max: the largest difference.
        cosine_mean: mean cosine similarity between rows of logits.
        cosine_min: the smallest similarity.
        held_out_loss: loss of the sequences, in nats.
        loss_difference: difference from the reference's loss, sequence by sequence; above 0 is worse.
        within_floor: whether its distance from the reference is at most that of the reference from itself.
    """

    way: str
    answers: Proportion
    first_difference: float | None
    tokens: Proportion
    kl_mean_nats: Estimate
    kl_max_nats: float
    difference_mean: Estimate
    difference_max: float
    cosine_mean: Estimate
    cosine_min: float
    held_out_loss: Estimate
    loss_difference: Estimate
    within_floor: bool = False

    @property
    def verdict(self) -> Verdict:
        """same: no answer differs; noise: some differ, but no more than between two servings of the reference; else
        differ."""
        if not self.answers.count:
            return "same"
        return "noise" if self.within_floor else "differ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """All comparisons of one adapter.

    Attributes:
        noise_floor: the reference compared with itself; None if it could not be served again.
        base_alone: the base without the adapter; None if it could not be served.
        likenesses: comparisons of all ways that answered, except the controls.
        failures: why a way did not answer, by way.
        distinct: number of different answers of the reference. If every answer is the same, as with an untrained model,
            many prompts are hardly more informative than one.
        trouble: why the verdicts are not reliable; empty if they are.
    """

    noise_floor: Likeness | None
    base_alone: Likeness | None
    likenesses: tuple[Likeness, ...]
    failures: dict[str, str]
    distinct: int
    trouble: str

    @property
    def whole(self) -> bool:
        """Whether every way answered and the controls allow a verdict."""
        return not self.failures and not self.trouble


def judge_parity(parity: Parity) -> Judgement:
    """Compare every way with the reference."""
    compared = {one.way: compare_served(parity.reference, one) for one in parity.served[1:] if one.failure is None}
    floor = next((one for way, one in compared.items() if way.endswith(AGAIN)), None)
    likenesses = {
        way: dataclasses.replace(one, within_floor=floor is not None and _is_within(floor, one))
        for way, one in compared.items()
    }
    base_alone = next((one for way, one in likenesses.items() if way.startswith(WITHOUT)), None)
    controls = {way.name for way in parity.ways if way.is_control}
    return Judgement(
        noise_floor=floor,
        base_alone=base_alone,
        likenesses=tuple(one for way, one in likenesses.items() if way not in controls),
        failures={one.way: format_failure(one.failure) for one in parity.served if one.failure is not None},
        distinct=len(set(parity.reference.answers)),
        trouble=_trouble(floor, base_alone),
    )


def compare_served(reference: ServedAnswers, other: ServedAnswers) -> Likeness:
    """Compare one way with the reference. Raises ValueError if their numbers of prompts or sequences differ."""
    pairs = list(zip(reference.answers, other.answers, strict=True))
    places = [place for ours, theirs in pairs if (place := first_difference(ours, theirs)) is not None]
    distances = other.distances
    positions = [one.positions for one in distances]
    losses = [theirs - ours for ours, theirs in zip(reference.losses, other.losses, strict=True)]
    return Likeness(
        way=other.way,
        answers=proportion(len(places), len(pairs)),
        first_difference=statistics.median(places) if places else None,
        tokens=clustered_proportion([one.argmax_differs for one in distances], positions),
        kl_mean_nats=mean_interval([one.kl_mean_nats for one in distances]),
        kl_max_nats=max(one.kl_max_nats for one in distances),
        difference_mean=mean_interval([one.difference_mean for one in distances]),
        difference_max=max(one.difference_max for one in distances),
        cosine_mean=mean_interval([one.cosine_mean for one in distances]),
        cosine_min=min(one.cosine_min for one in distances),
        held_out_loss=mean_interval(other.losses),
        loss_difference=mean_interval(losses),
    )


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Position of the first differing token, from 1; if one answer ends earlier, the difference is at its end. None if
    both are equal."""
    pairs = enumerate(zip_longest(ours, theirs), start=1)
    return next((place for place, (one, other) in pairs if one != other), None)


def _is_within(floor: Likeness, one: Likeness) -> bool:
    return one.answers.count <= floor.answers.count and one.difference_max <= floor.difference_max


def _trouble(floor: Likeness | None, base_alone: Likeness | None) -> str:
    if floor is None:
        return "the reference could not be run again, so the noise of its answers is unknown"
    if base_alone is None:
        return "the base without the adapter could not be run, so the effect of the adapter is unknown"
    if _is_within(floor, base_alone):
        return (
            "the base without the adapter answers as it does with it, so that a merge that leaves the adapter out "
            "would not be seen. Train for longer (--epochs), or give an adapter that has learnt something (--adapter)"
        )
    return ""
