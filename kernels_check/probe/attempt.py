"""Try a path by itself: watch what is executed, time it beside the plain path, keep what the libraries say."""

from __future__ import annotations

import logging
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeAlias

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from kernels_check.observe.recording import quiet_kineto
from kernels_check.observe.restore import synchronise
from kernels_check.probe.result import Attempt, PathReport, ProbeStatus, Speed
from kernels_check.rules import classify

Try: TypeAlias = Callable[[str], Attempt]
"""From the device to what came of it."""

REPEATS = 11
SAMPLE_S = 2e-3
"""Shortest timed sample; calls are repeated within it."""
_LOGGERS = ("transformers", "bitsandbytes", "torch", "liger_kernel")
_ADMITS = re.compile(
    r"not (been )?(support|avail|align|install|implement|compiled)|fall(s|ing)?[ -]?back|instead|unable|cannot|"
    r"disabled|unfused|requires",
    re.IGNORECASE,
)
"""How a library says that it does something else than it was asked for."""


class UnavailableError(Exception):
    """A path that this machine cannot run, where no library says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """What one call executed, by name."""

    operators: Mapping[str, int]
    kernels: Mapping[str, int]
    """Launches by rule; ``unclassified`` for names that no rule knows."""


def watch(call: Callable[[], object]) -> Executed:
    """Run ``call`` under the profiler; once more where CUDA is in use and no kernel was recorded.

    A session on the heels of another can come out so (a race in CUPTI), and what is proved by kernels would be denied.
    """
    seen = _session(call)
    return _session(call) if torch.cuda.is_initialized() and not seen.kernels else seen


def _session(call: Callable[[], object]) -> Executed:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    synchronise()
    with quiet_kineto(), profile(activities=activities) as recorded:
        call()
        synchronise()
    result: Any = getattr(recorded.profiler, "kineto_results", None)
    operators, kernels = Counter[str](), Counter[str]()
    for event in result.events() if result is not None else ():
        if event.device_type() == DeviceType.CPU:
            operators[event.name()] += 1
        elif not event.is_user_annotation():
            rule = classify(event.name())
            kernels["unclassified" if rule is None else rule.name] += 1
    return Executed(operators=operators, kernels=kernels)


def paired(path: Callable[[], object], plain: Callable[[], object], name: str) -> Speed:
    """Time both in turn, swapping who goes first, so that whatever drifts meets both alike."""
    calls = {"path": path, "plain": plain}
    number = {}
    for key, call in calls.items():
        call()
        number[key] = max(1, round(SAMPLE_S / _seconds(call, 1)))
    times: dict[str, list[float]] = {"path": [], "plain": []}
    for repeat in range(REPEATS):
        for key in ("path", "plain") if repeat % 2 else ("plain", "path"):
            times[key].append(_seconds(calls[key], number[key]))
    ratios = [plain / path for path, plain in zip(times["path"], times["plain"], strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    return Speed(
        plain=name,
        path_time_s=median(times["path"]),
        plain_time_s=median(times["plain"]),
        speedup=middle,
        low=low,
        high=high,
        repeats=REPEATS,
    )


def _seconds(call: Callable[[], object], number: int) -> float:
    synchronise()
    begin = time.perf_counter()
    for _ in range(number):
        call()
    synchronise()
    return (time.perf_counter() - begin) / number


def report(name: str, attempt: Try, device: str) -> PathReport:
    """Try one path; whatever it raises becomes its reason and nobody else's."""
    with heard() as words:
        try:
            found = attempt(device)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            return _refused(name, said, status="broken" if _is_own(error) else "unavailable")
    if not found.ran:
        admitted = [word for word in words if _ADMITS.search(word)]
        if admitted:
            return _refused(name, admitted[0], found.evidence)
    exact = bool(found.exactness) and all(comparison.holds for comparison in found.exactness)
    status: ProbeStatus = "claimed" if not found.ran else "exact" if exact else "inexact"
    silent = f"accepted without a word, but what ran is {found.evidence}"
    return PathReport(
        name=name,
        can_run=True,
        ran=found.ran,
        status=status,
        evidence=found.evidence,
        exactness=found.exactness,
        speed=found.speed,
        reason=None if found.ran else silent,
    )


def _is_own(error: Exception) -> bool:
    """Whether it was raised by the probe's own code: a fault of the probe must not pass for one of the machine."""
    if isinstance(error, UnavailableError):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return Path(frames[-1].f_code.co_filename).parent == Path(__file__).parent


def _refused(name: str, words: str, evidence: str | None = None, status: ProbeStatus = "unavailable") -> PathReport:
    return PathReport(
        name=name,
        can_run=False,
        ran=False,
        status=status,
        evidence=evidence,
        exactness=(),
        speed=None,
        reason=" ".join(words.split()),
    )


class _Ear(logging.Handler):
    def __init__(self, words: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._words = words

    def emit(self, record: logging.LogRecord) -> None:
        self._words.append(record.getMessage())


@contextmanager
def heard() -> Iterator[list[str]]:
    """Collect warnings and logged warnings instead of showing them; deprecations say nothing about a path."""
    words: list[str] = []
    ear = _Ear(words)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [ear], False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield words
            finally:
                unrelated = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
                words += [str(one.message) for one in caught if not issubclass(one.category, unrelated)]
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate


@contextmanager
def one_thread() -> Iterator[None]:
    """Two threads on two busy cores time the scheduler, not the kernel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
