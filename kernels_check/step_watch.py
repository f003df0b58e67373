"""Watches a fine-tuning step or a request as it runs, and judges what ran, without changing anything.

A property that one step does not show is unknown, with a remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from operator import attrgetter
from types import TracebackType

from torch import nn

from kernels_check.check import Check, Json, judge_safely
from kernels_check.judges.attention import judge_request
from kernels_check.judges.paths import PATHS, validate
from kernels_check.observe.modules import restore_training, synchronise
from kernels_check.observe.observation import MAX_CALLS, Observation, StepObserver
from kernels_check.observe.parts import ParameterStatus
from kernels_check.observe.profile import ProfilerRecording
from kernels_check.observe.ranks import RankEvidence, RankObserver

_PARTS: Mapping[str, Callable[[Observation], list[ParameterStatus]]] = {
    "embedding.trained": attrgetter("embeddings"),
    "norms.trained": attrgetter("norms"),
}
COMPILED_MEANWHILE = "code was compiled in this step, and a hook would stay in that code: watch a later step"
NO_UPDATE = (
    "no optimizer that holds the model's parameters stepped in what was watched: keep the watch open around all that "
    "one update accumulates"
)
_OPEN = "this watch is open already: close it before the next step, or make one for each model"
REQUEST = "request.attention"
NOTHING_RAN = "the model was not called while it was watched, and no gradient reached it"


def watch(model: nn.Module, requirements: Mapping[str, Json] | None = None) -> Watch:
    """Watch a step while it runs: ``with watch(model, requirements) as watched: step()``.

    Args:
        model: the trained model, as PEFT returned it; referenced weakly.
        requirements: expected values by path, see ``REQUIREMENTS``. Other paths are also reported. If
            ``packing.isolated`` is required, the packed calls of the step are repeated as forward passes at its end.

    Returns:
        A context manager, which can be entered again for the next step. ``checks`` holds the results.

    Raises:
        ValueError: a path is unknown, or a value has the wrong type.
    """
    return Watch(model, requirements or {})


def verify(model: nn.Module, step: Callable[[], object], requirements: Mapping[str, Json]) -> list[Check]:
    """Judge what actually runs in ``step`` against ``requirements``.

    Args:
        model: the model that ``step`` trains, as PEFT returned it.
        step: runs one forward, backward and optimizer step; called twice, and up to eight times if its optimizer steps
            only in some calls or starts with a learning rate of zero.
        requirements: expected values by path, see ``REQUIREMENTS``. Other paths are also reported.

    Returns:
        One check per path, in the order of ``REQUIREMENTS``. A requirement is met only by status ``active``. If the
        program runs a profiler around this call or inside ``step``, that profiler is left undisturbed, and paths that
        need profiler data are ``unknown``, with the reason.

    These are restored bit for bit, also if ``step`` raises: the parameters of ``model`` that require gradients and
    those that an optimizer updates in ``step``; the gradients of all parameters of ``model``; state and groups of the
    optimizers that step; the random states of Python, NumPy and torch; train/eval modes. Everything else is not
    restored: buffers, frozen parameters that the step changes, gradients of other models, learning-rate schedulers,
    gradient scalers, running averages, data iterators, and counters in the step's own objects.

    Raises:
        ValueError: a path is unknown, or a value has the wrong type; ``step`` is not called.
        Exception: any exception of ``step``.
    """
    watched = Watch(model, requirements, own_step=True)
    with restore_training(model):
        with watched.updates_only():  # compiles, and makes lora_B nonzero
            step()
        for _ in range(MAX_CALLS - 1):
            with watched:
                step()
            if not watched.undecided:
                break
    return watched.checks


def watch_request(model: nn.Module, request: Callable[[], object], required: Json = None) -> Check:
    """Judge the attention of one request, for its first token and for the later ones.

    Args:
        model: the model that answers, as PEFT returned it.
        request: runs one request.
        required: a value of ``attention.backend``, as for a training step; a fused backend accepts any fused one.

    Returns:
        A check of the path ``request.attention``; ``unknown`` if the program runs a profiler around this call or in
        ``request``.

    Raises:
        ValueError: the value has the wrong type.
        Exception: any exception of ``request``.
    """
    if required is not None:
        validate({"attention.backend": required})
    synchronise()
    recording = ProfilerRecording()
    with recording.opened():
        request()
    profile = recording.profile()
    if profile.missing is not None:
        return Check(path=REQUEST, required=required, observed=None, status="unknown", reason=profile.missing)
    return judge_safely(REQUEST, required, partial(judge_request, model, profile, required))


class Watch:
    """Judges the step inside its block; see ``watch``.

    The block contains one step: all forward and backward passes that one update accumulates, and the update. It can be
    opened in one place and closed in another, as Trainer callbacks do with an ``ExitStack``. A failure of the check
    itself raises nothing and gives ``unknown``. Exceptions of the step propagate.
    """

    def __init__(self, model: nn.Module, requirements: Mapping[str, Json], *, own_step: bool = False) -> None:
        validate(requirements)
        self._requirements = dict(requirements)
        self._own_step = own_step
        """Whether the step certainly trains this model: if it leaves no trace, the adapter was not executed."""
        self._steps = StepObserver(model)
        self._is_open = False
        self._open = ExitStack()
        self._unopened: str | None = None
        """Why the step could not be watched."""
        self.checks: list[Check] = []
        """One check per path for the last completed step, in the order of ``REQUIREMENTS``."""
        about_ranks = any(path.startswith("ranks.") for path in requirements)
        self._ranks = RankObserver(model) if about_ranks else None
        self._others_wait = False
        """Whether another rank waits for a further step."""

    @contextmanager
    def updates_only(self) -> Iterator[None]:
        """Watch only the update of a step, which costs next to nothing. Paths that need two steps, such as whether an
        update is kept, are then judged over this step and the next watched one.

        Raises:
            RuntimeError: the watch is already open.
        """
        if self._is_open:
            raise RuntimeError(_OPEN)
        with ExitStack() as stack:
            try:
                stack.enter_context(self._steps.updates_only())
            except Exception:  # then the next step is the first
                self._steps.forget()
            yield

    @property
    def undecided(self) -> bool:
        """Whether a further step may be conclusive on any rank."""
        return self._others_wait or self._steps.compiled or self._steps.undecided

    def __enter__(self) -> Watch:
        """Begin to watch.

        Raises:
            RuntimeError: the watch is already open.
        """
        if self._is_open:
            raise RuntimeError(_OPEN)
        self._is_open, self._unopened, self._open = True, None, ExitStack()
        try:
            with ExitStack() as stack:
                stack.enter_context(self._steps.step())
                if self._ranks is not None:
                    stack.callback(self._ranks.end)
                    self._ranks.begin()
                self._open = stack.pop_all()
        except Exception as error:
            self._steps.forget()
            self._unopened = f"the step could not be watched: {_describe_error(error)}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove all hooks, and judge."""
        self._is_open = False
        problem = self._unopened
        try:
            self._open.__exit__(kind, error, trace)
        except Exception as failed:
            problem = f"what was seen could not be read: {_describe_error(failed)}"
        if error is not None:
            self._steps.forget()
            self.checks = self._unknown(
                problem or f"the step raised {_describe_error(error)}, so that it was not seen to its end"
            )
            return
        observation, self._steps.observation = self._steps.observation, None
        problem = problem or self._why_unseen(observation)
        try:
            ranks = self._exchange_evidence(observation, problem)
            if observation is None or problem is not None:
                self.checks = self._unknown(problem or NOTHING_RAN)
            else:
                observation = replace(observation, ranks=ranks)
                self.checks = [self._decide(check, observation) for check in judge_all(observation, self._requirements)]
        except Exception as failed:
            self._steps.forget()
            self.checks = self._unknown(f"what was seen could not be read: {_describe_error(failed)}")

    def _why_unseen(self, observation: Observation | None) -> str | None:
        """Why nothing is known about the last step; None if it can be judged."""
        if self._steps.fault is not None:
            return f"a hook failed: {self._steps.fault}"
        if observation is None:
            return NOTHING_RAN
        traces = (
            observation.modules.all,
            observation.profile.compiled_regions,
            observation.reached,
            observation.updated,
            self._steps.compiled,
        )
        return None if any(traces) or self._own_step else NOTHING_RAN

    def _exchange_evidence(self, observation: Observation | None, problem: str | None) -> tuple[RankEvidence, ...]:
        """The evidence of all ranks, if a requirement needs it; every rank takes part, also after a problem."""
        if self._ranks is None:
            return ()
        ranks = self._ranks.exchange(observation, problem, undecided=self._steps.compiled or self._steps.undecided)
        self._others_wait = any(one.undecided for one in ranks)
        return ranks

    def _decide(self, check: Check, observation: Observation) -> Check:
        """The check, or why one step of this kind is not conclusive for it."""
        why, judged = None, PATHS[check.path]
        # A fault in an earlier step remains a fault.
        is_settled = check.path == "peft.learning" and check.observed is not True and not self._steps.undecided
        if self._steps.compiled and judged.by_modules:
            why = COMPILED_MEANWHILE
        # An optimizer that stepped in an earlier block did not step in this one.
        elif judged.needs_update and not is_settled and not observation.updated and observation.calls < MAX_CALLS:
            why = f"{NO_UPDATE}; so far: {check.reason}"
        elif self._may_show_more(check, observation):
            why = f"{judged.further_steps}; so far: {check.reason}"
        return check if why is None else replace(check, observed=None, status="unknown", reason=why)

    def _may_show_more(self, check: Check, observation: Observation) -> bool:
        if check.path == "base.frozen":
            merges = any(part.kind == "merged" for part in observation.after.parts.values())
            return check.observed is True and observation.calls == 1 and merges
        parts = _PARTS[check.path](observation) if self._steps.undecided and check.path in _PARTS else []
        return self._steps.undecided and (check.path == "peft.learning" or any(part.open for part in parts))

    def _unknown(self, reason: str) -> list[Check]:
        return [
            Check(path=path, required=self._requirements.get(path), observed=None, status="unknown", reason=reason)
            for path, judged in PATHS.items()
            if path in self._requirements or not judged.on_request
        ]


def judge_all(observation: Observation, requirements: Mapping[str, Json]) -> Iterator[Check]:
    """Judge every path of the step, in order."""
    for path, judged in PATHS.items():
        required = requirements.get(path)
        if judged.on_request and path not in requirements:
            continue
        if judged.by_operators and observation.profile.missing is not None:
            yield Check(
                path=path, required=required, observed=None, status="unknown", reason=observation.profile.missing
            )
        else:
            yield judge_safely(path, required, partial(judged.judge, observation, required))


def _describe_error(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
