"""`pytest benchmarks/ --lorameter-resume=RUN`: the session resumes an interrupted run, and replays all of it.

Study, variants and phases are those of the run; what the tests of a session select is only what is replayed. So the
command line of the interrupted session may be given again with this one option.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels_check.terminal import print_stderr
from lorameter.errors import UsageError
from lorameter.records import store
from lorameter.run.resume import (
    SETTLED_OPTIONS,
    is_finished,
    plan_rest,
    refuse_settled,
    study_of,
)

if TYPE_CHECKING:
    import pytest

    from lorameter.records.store import Run
    from lorameter.run.display import Display
    from lorameter.run.sites.placement import Placement

OPTION = "--lorameter-resume"


def load_resumed(config: pytest.Config) -> ResumedRun | None:
    """The run that the options name; None without one. Raises `UsageError` for what cannot be resumed."""
    name = config.getoption(OPTION)
    if not name:
        return None
    names = [f"--lorameter-{one}" for one in SETTLED_OPTIONS]
    refuse_settled(OPTION, {name: config.getoption(name, None) for name in names})
    study = config.getoption("--lorameter-study")
    if study is not None:
        from lorameter.studies.study_file import load_study

        study = load_study(study).name
    from lorameter.run.sites.driver import read_broken_off_with_jobs

    run = read_broken_off_with_jobs(name, store.runs_dir(config.getoption("--lorameter-runs-dir")), study=study)
    if run.manifest.sides:
        raise UsageError(f"{OPTION}: run {run.manifest.run} is an A/B. Resume: lorameter run --resume {name}")
    return ResumedRun(run, config.getoption("--lorameter-max-minutes"))


class ResumedRun:
    """A run that a session resumes."""

    def __init__(self, run: Run, max_minutes: float | None = None) -> None:
        self._run = run
        self._max_minutes = max_minutes
        self.study = study_of(run)
        self.phases = run.manifest.phases
        self.variants = run.manifest.selection or tuple(variant.name for variant in self.study.variants)
        """Names of those that the run measures."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left of it."""
        return is_finished(self._run)

    def measure(self, placement: Placement, display: Display) -> Run:
        """What is left of the run; one of which nothing is, or not here, is given back as it is.

        Raises `UsageError` and `InvalidRunError`.
        """
        from lorameter.run.measure import measure

        run = self._run
        if is_finished(run):
            print_stderr(f"run {run.manifest.run} is complete: nothing is left to be measured.")
            return run
        try:
            plan = plan_rest(run, placement, max_minutes=self._max_minutes)
        except UsageError as refusal:
            if run.manifest.status != "complete":
                raise
            print_stderr(f"{refusal} What it has is replayed.")  # it ended, if not to a good one
            return run
        return measure(plan, runs=run.path.parent, display=display, resume=run.manifest.run, placement=placement)
