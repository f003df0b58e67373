"""What torch.compile did in this process so far: where graphs broke, what it compiled again, what it refused to.

A step shows which compiled code it enters and nothing of how that code came about, which was settled in steps before.
Dynamo keeps it on record: a reason for each graph break since the process began (or ``torch._dynamo.reset()``), and
metrics of the latest compilations. The record is that of the process and not of one model: models of one class share
their code, and with it the recompile limit.

One break in the user's code is on record many times, once for each caller that Dynamo resumes after it, and a break
inside a loop is none at all but a compilation that failed, after which the whole function runs as plain Python. So both
are told by place, and a place counts once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from traceback import FrameSummary
from typing import Any

from kernels_check.check import name_some


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilations:
    """The record of this process; every entry is a phrase that names what, where and why."""

    breaks: tuple[str, ...] = ()
    """Places in the user's code where a graph ended early."""
    uncompiled: tuple[str, ...] = ()
    """Functions that Dynamo gave up on at first sight; what they call may be compiled."""
    recompiles: tuple[str, ...] = ()
    """Functions that were compiled again, each time with the guard that failed."""
    refused: tuple[str, ...] = ()
    """Recompilations that failed, such as those beyond the limit: what they were for runs eagerly."""
    complete: bool = True
    """Whether no compilation has dropped out of the record yet."""
    unreadable: str | None = None
    """Why this version of torch does not tell."""

    def __str__(self) -> str:
        if self.unreadable is not None:
            return f"graph breaks and recompiles cannot be told: {self.unreadable}"
        parts = [_counted(self.breaks, "graph breaks"), _counted(self.recompiles, "recompiles")]
        parts += [_counted(self.uncompiled, "functions left uncompiled")] if self.uncompiled else []
        parts += [_counted(self.refused, "recompiles refused")] if self.refused else []
        more = "; TORCH_LOGS=graph_breaks,recompiles shows each as it happens" if self != Compilations() else ""
        return f"in this process so far{'' if self.complete else ' at least'} {', '.join(parts)}{more}"


def read() -> Compilations:
    """Read the record; empty where nothing has loaded the compiler."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return Compilations()
    try:
        return _read(dynamo)
    except (AttributeError, TypeError) as error:
        return Compilations(unreadable=str(error))


@contextmanager
def compiler_held(stance: str = "eager_on_recompile") -> Iterator[None]:
    """Start no compilation: what is compiled already runs, all else runs eagerly. Nothing to hold where none is loaded.

    Under ``force_eager`` what is compiled runs eagerly, too.

    A hook or a dispatch mode that a compiler met would be traced into the code, which keeps it for good.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    from torch import compiler

    with compiler.set_stance(stance):
        yield


def forget() -> None:
    """Drop all compiled code and the record of it, for runs in one process that must not see each other's."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
        dynamo.utils.clear_compilation_metrics()


def _read(dynamo: Any) -> Compilations:
    metrics = dynamo.get_compilation_metrics()
    first = [one for one in metrics if one.recompile_reason is None]
    again = [one for one in metrics if one.recompile_reason is not None]
    placed = [one for one in metrics if one.fail_user_frame_filename is not None]
    places = [_place(reason.reason, reason.user_stack) for reason in dynamo.graph_break_reasons]
    places += [_place(one.fail_reason, [_frame(one)]) for one in placed]
    return Compilations(
        breaks=_distinct(places),
        uncompiled=_distinct(_function(one) for one in first if one.fail_reason is not None),
        recompiles=tuple(f"{_function(one)}: {_guard(one)}" for one in again if one.fail_reason is None),
        refused=_distinct(f"{_title(one.fail_reason)}: {_guard(one)}" for one in again if one.fail_reason is not None),
        complete=len(metrics) < dynamo.DEFAULT_COMPILATION_METRICS_LIMIT,
    )


def _frame(compilation: Any) -> FrameSummary:
    return FrameSummary(compilation.fail_user_frame_filename, compilation.fail_user_frame_lineno, "")


def _place(reason: str, stack: Sequence[FrameSummary]) -> str:
    """The innermost frame; a break before the first line of a function has none."""
    if not stack:
        return _title(reason)
    code = f" `{stack[-1].line}`" if stack[-1].line else ""
    return f"{_title(reason)} at {_short(stack[-1].filename)}:{stack[-1].lineno}{code}"


def _function(compilation: Any) -> str:
    return f"{compilation.co_name} at {_short(compilation.co_filename)}:{compilation.co_firstlineno}"


def _guard(compilation: Any) -> str:
    """The guard that failed, without the compilation it belongs to (``0/1: ``) and the source line behind it."""
    reason = str(compilation.recompile_reason).partition(": ")[2]
    return _title(reason).partition("  # ")[0].rstrip()


def _title(reason: str) -> str:
    return reason.partition("\n")[0]


def _short(file: str) -> str:
    return "/".join(PurePath(file).parts[-2:])


def _distinct(phrases: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(phrases))


def _counted(phrases: tuple[str, ...], what: str) -> str:
    return f"{len(phrases)} {what}" + (f" ({name_some(phrases, '; ')})" if phrases else "")
