"""Checks whether the fast paths that a fine-tuning configuration requires are the ones that ran.

A flag shows what was requested; only the operators, tensors and gradients of the measured process show what happened.
The package is independent: nothing of ``lorameter`` is imported, and importing it loads neither torch nor numpy.

From a call of ``watch`` to a verdict a reader opens eight modules at most: ``step_watch``, which opens the watch and
judges; ``judges.paths``, which names the judge of each path; the judge's own; ``check``, which turns what it found into
a verdict; ``observe.observation``, which observes the step; and the modules that make the evidence of the path. Those
are ``profile``, ``operators`` and ``layers`` for attention and products; ``calls`` and ``execution`` for recomputation
and compilation; ``learning`` and ``adapter`` for the adapter and the optimizer; ``base`` and ``digest`` for the base;
``calls``, ``loss`` and ``padding`` for the inputs; ``parts`` for embeddings, norms and names of targets. ``modules``
has what all of them share.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels_check.check import STATUSES, Check, Requirement
    from kernels_check.isolation import probe_isolation
    from kernels_check.judges.paths import REQUIREMENTS
    from kernels_check.rules import Rule, classify
    from kernels_check.step_watch import Watch, verify, watch, watch_request
    from kernels_check.trace.recording import TraceError
    from kernels_check.trace.summary import KernelSummary, read_trace

__all__ = [
    "REQUIREMENTS",
    "STATUSES",
    "Check",
    "KernelSummary",
    "Requirement",
    "Rule",
    "TraceError",
    "Watch",
    "classify",
    "probe_isolation",
    "read_trace",
    "verify",
    "watch",
    "watch_request",
]

_HOME = {
    "REQUIREMENTS": "judges.paths",
    "STATUSES": "check",
    "Check": "check",
    "KernelSummary": "trace.summary",
    "Requirement": "check",
    "Rule": "rules",
    "TraceError": "trace.recording",
    "classify": "rules",
    "probe_isolation": "isolation",
    "read_trace": "trace.summary",
    "verify": "step_watch",
    "Watch": "step_watch",
    "watch": "step_watch",
    "watch_request": "step_watch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
