"""Checks whether the fast paths that a fine-tuning configuration requires actually ran.

A flag shows what was requested; only the operators, tensors and gradients of the measured process show what happened.
The package is independent: it does not import ``lorameter``, and importing it loads neither torch nor numpy.

The modules that turn a call of ``watch`` into a verdict: ``step_watch`` opens the watch and calls the judges;
``judges.paths`` lists the judge of each path; ``check`` turns its finding into a verdict; ``observe.observation``
observes the step. The evidence of the paths comes from ``profile``, ``operators`` and ``layers`` for attention and
products; ``calls`` and ``execution`` for recomputation and compilation; ``learning`` and ``adapter`` for the adapter
and the optimizer; ``base`` and ``digest`` for the base; ``calls``, ``loss`` and ``padding`` for the inputs; ``parts``
for embeddings, norms and target names. All of them use ``modules``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels_check.check import STATUSES, Check, Requirement
    from kernels_check.judges.paths import REQUIREMENTS
    from kernels_check.observe.isolation import probe_isolation
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
    "probe_isolation": "observe.isolation",
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
