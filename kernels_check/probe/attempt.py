"""Attempts of the probe: run a path, watch what it executed, compare it with float64, time it."""

from __future__ import annotations

import logging
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from kernels_check.observe.hooks import synchronise
from kernels_check.observe.profile import quiet_kineto
from kernels_check.probe.result import Attempt, Exactness, PathReport, ProbeStatus, Speed
from kernels_check.rules import classify

Outputs: TypeAlias = Mapping[str, Tensor]

_FLASH_TESTS = "flash-attention, tests/test_flash_attn.py: {factor} times the error of the same mathematics in bfloat16"
_TORCH_BFLOAT16 = 1.6e-2
"""``torch.testing.assert_close``, relative tolerance of bfloat16."""


def step_of(function: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> Callable[[], Outputs]:
    """A forward and a backward pass: output of ``function``, and the gradient of each input for a fixed direction.

    All that is not ``function`` is made here, so that calls can be timed. The output has the shape of the first input.
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    first = next(iter(inputs.values()))
    direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(3)).to(first)

    def step() -> Outputs:
        output = function(*leaves.values())
        gradients = torch.autograd.grad(output, list(leaves.values()), direction)
        return {"output": output.detach(), **{f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}}

    return step


def with_gradients(function: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> Outputs:
    """One such step."""
    return step_of(function, inputs)()


def cast(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same values in another precision."""
    return {name: value.to(dtype) for name, value in inputs.items()}


def against_same_precision(found: Outputs, plain: Outputs, exact: Outputs) -> tuple[Exactness, ...]:
    """The rule of flash-attention: 2 times (gradients 3 times) the largest error of the plain path, and 1e-5.

    A bound in absolute numbers would depend on the sizes; the plain path in the same precision carries them.
    """
    comparisons = []
    for name, truth in exact.items():
        factor = 2 if name == "output" else 3
        allowed = factor * _largest(plain[name], truth) + 1e-5
        comparisons.append(
            Exactness(
                what=f"largest error of {name}",
                error=_largest(found[name], truth),
                bound=allowed,
                source=_FLASH_TESTS.format(factor=factor),
            )
        )
    return tuple(comparisons)


def relative(found: Outputs, exact: Outputs, names: Sequence[str] = ("output", "dinput")) -> tuple[Exactness, ...]:
    """Relative error in the Frobenius norm, against torch's own tolerance for bfloat16."""
    return tuple(
        Exactness(
            what=f"relative error of {name}",
            error=float((found[name].double() - exact[name].double()).norm() / exact[name].double().norm()),
            bound=_TORCH_BFLOAT16,
            source="torch.testing.assert_close, bfloat16",
        )
        for name in names
    )


def mean_error(found: Tensor, exact: Tensor, *, scale: float) -> Exactness:
    """Mean error of a product with quantised weights against the unquantised, scaled to weights of 1/sqrt(inputs)."""
    error = float((found.double() - exact).abs().mean()) * scale
    source = "bitsandbytes, tests/test_autograd.py (test_matmul_4bit)"
    return Exactness(what="mean error of the product", error=error, bound=0.115, source=source)


def update(found: Sequence[Tensor], exact: Sequence[Tensor]) -> Exactness:
    """Parameters after some optimizer steps, by the tolerance of bitsandbytes for float32: 1e-6 and 1e-5 relative."""
    excess = max(
        float(((value.double().cpu() - truth.cpu()).abs() / (1e-6 + 1e-5 * truth.cpu().abs())).max())
        for value, truth in zip(found, exact, strict=True)
    )
    source = "bitsandbytes, tests/test_optim.py: atol 1e-6, rtol 1e-5 in float32"
    return Exactness(what="largest error of a parameter, in tolerances", error=excess, bound=1.0, source=source)


def _largest(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).abs().max())


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
    """Try one path; whatever it raises becomes its reason only."""
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
