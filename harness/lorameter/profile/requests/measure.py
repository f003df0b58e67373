"""The profile of a variant's requests: its trial up to the end of its training, and then what it answers.

Requests are taken apart with the adapter beside the base and, in the same process, merged into it: what merging gains
is then measured and not guessed. At last a new interpreter starts cold, with its parts timed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lorameter.errors import UsageError
from lorameter.models import catalogue, shapes
from lorameter.models.costs.peaks import Rate
from lorameter.models.shapes import ModelShape
from lorameter.profile.measure import ConductedTrial, answer_of, open_trial, trouble_in
from lorameter.profile.requests.facts import RequestProfile
from lorameter.records.activity import (
    ACCOUNTS,
    MERGED_ACTIVITY,
    MERGED_TRACE,
    REQUEST_ACTIVITY,
    REQUEST_FACTS,
    REQUEST_TRACE,
    Activity,
    RequestFacts,
)
from lorameter.records.memory_account import MemoryAccount
from lorameter.records.record import Notice
from lorameter.run.workers import Executor
from lorameter.studies.study import Study
from lorameter.studies.variant import Variant

DOCUMENT = "profile-requests.json"
"""What the folder holds beside the logs and the profiler's own recordings: all facts."""


def profile_requests(
    study: Study, variant: Variant, executor: Executor, *, runs: Path, say: Callable[[str], None] = lambda text: None
) -> tuple[RequestProfile, Path]:
    """Measure the profile of one variant's requests; returns it and the folder in which it was written.

    Arguments and errors are those of `lorameter.profile.measure.profile_variant`.
    """
    with open_trial(study, variant, executor, runs=runs, say=say, document=DOCUMENT) as opened:
        trial, merges = opened.trial, not variant.merge_adapter
        _conduct(trial, list(opened.rates.values()), merges=merges)
        _start_cold(trial, executor)
        trial.end()
        profile = RequestProfile(
            **opened.facts(REQUEST_ACTIVITY),
            facts=opened.read(RequestFacts, REQUEST_FACTS),
            merged_activity=opened.read(Activity, MERGED_ACTIVITY) if merges else None,
            memory=opened.read(MemoryAccount, ACCOUNTS["generate"]),
            shape=_shape(study.workload.model),
        )
        opened.keep(DOCUMENT, profile, (REQUEST_TRACE, MERGED_TRACE) if merges else (REQUEST_TRACE,))
    return profile, opened.folder


def _conduct(trial: ConductedTrial, rates: list[Rate], *, merges: bool) -> None:
    """All of it; the profiler comes after what is timed of the same state, and the peaks of a device last."""
    trial.begin()
    trial.ask("finish_training", steps=0)
    trial.ask("save_adapter")
    trial.ask("begin_generate")
    trial.ask("profile_requests", merged=False)
    trial.ask("end_generate")
    trial.ask("request_facts")
    trial.ask("memory_breakdown", phase="generate")
    trial.ask("request_activity", merged=False)
    if merges:
        trial.ask("merge")
        trial.ask("profile_requests", merged=True)
        trial.ask("request_activity", merged=True)
    trial.ask("peak", rates=rates)


def _start_cold(trial: ConductedTrial, executor: Executor) -> None:
    """A new interpreter with nothing beside it: the trial's own process has ended. One that comes to no good costs none
    of what was seen before."""
    trial.close()
    trial.tell("cold")
    fragment = answer_of(lambda: executor.cold_start(trial.request))
    if fragment.status == "ok":
        trial.take("cold", fragment)
        return
    lost_start = Notice(
        code="no-cold-start",
        message=f"the cold start is {fragment.status}: {trouble_in(fragment)}.",
        remedy=f"The log is {trial.request.log_path}.",
    )
    trial.record = trial.record.replaced(notices=(*trial.record.notices, lost_start))


def _shape(model: str) -> ModelShape | None:
    try:
        return shapes.shape(catalogue.resolve(model))
    except UsageError:
        return None
