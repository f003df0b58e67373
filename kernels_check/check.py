"""Requirements for a configuration, and the checks that answer them.

Only the status ``active`` meets a requirement: missing, ambiguous or broken evidence never passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

Json: TypeAlias = bool | int | float | str | None
Status: TypeAlias = Literal["active", "fallback", "absent", "unknown", "not_applicable"]

STATUSES: tuple[Status, ...] = get_args(Status)
"""``active``: observed, as required. ``fallback``: another implementation ran instead. ``absent``: not present at all.
``unknown``: the evidence is not conclusive. ``not_applicable``: the path has no meaning here."""

NAMES_SHOWN = 4
"""Maximum offenders that a reason names before it only counts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One requirement, its observed value, and the verdict with its reason; every field is a JSON value."""

    path: str
    required: Json
    observed: Json
    status: Status
    reason: str

    @property
    def met(self) -> bool:
        """Whether the requirement holds; only ``active`` does."""
        return self.status == "active"


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """The values that a path accepts."""

    kind: Literal["flag", "choice", "bits", "share", "text", "class"]
    choices: tuple[Json, ...] = ()
    """Accepted values of a ``choice`` or of ``bits``."""

    def problem(self, value: object) -> str | None:
        """What is wrong with ``value``; None if it is acceptable."""
        if self.kind == "flag":
            return None if isinstance(value, bool) else "must be true or false"
        if self.kind == "share":
            number = isinstance(value, int | float) and not isinstance(value, bool)
            return None if number and 0.0 <= float(value) <= 1.0 else "must be a number from 0 to 1"  # type: ignore[arg-type]
        if self.kind == "text":
            return None if isinstance(value, str) and value else "must be a non-empty string"
        if self.kind == "class":
            if isinstance(value, str) and all(value.partition(".")):
                return None
            name = value if isinstance(value, str) and value else "AdamW"
            return f"must name the class with its package, as in 'torch.optim.{name}' or 'bitsandbytes.optim.{name}'"
        kind = int if self.kind == "bits" else str
        accepted = isinstance(value, kind) and not isinstance(value, bool) and value in self.choices
        return None if accepted else f"must be one of {', '.join(map(str, self.choices))}"


FLAG = Requirement(kind="flag")
SHARE = Requirement(kind="share")
DTYPE = Requirement(kind="choice", choices=("float64", "float32", "bfloat16", "float16"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PathObservation:
    """A judge's observation of one path, before it is compared with the requirement."""

    observed: Json
    reason: str
    status: Status | None = None
    """Set if comparing ``observed`` with ``required`` is not conclusive."""
    present: bool = True
    """Whether the feature was present at all: decides the status of a path that was not required."""
    satisfies: bool | None = None
    """Set if meeting the requirement is not plain equality."""

    def against(self, path: str, required: Json) -> Check:
        """Convert the observation into a check of ``path``."""
        status = self.status
        if required is None:
            # An exception or an ambiguity stays unknown; a path that is not required never fails.
            status = status if status == "unknown" else "active" if self.present else "not_applicable"
        elif status is None:
            met = self.satisfies if self.satisfies is not None else self.observed == required
            status = "active" if met else "fallback" if self.present else "absent"
        return Check(path=path, required=required, observed=self.observed, status=status, reason=self.reason)


def passed(reason: str) -> PathObservation:
    """The path is active as required: True."""
    return PathObservation(observed=True, reason=reason)


def failed(reason: str) -> PathObservation:
    """The path is present, but not as required: False."""
    return PathObservation(observed=False, reason=reason)


def undecided(reason: str, *, present: bool = True) -> PathObservation:
    """The evidence is not conclusive."""
    return PathObservation(observed=None, status="unknown", reason=reason, present=present)


def absent(reason: str) -> PathObservation:
    """The path is not present at all."""
    return PathObservation(observed=None, reason=reason, present=False)


def at_least(share: float, required: Json, reason: str, *, perhaps: float = 0.0) -> PathObservation:
    """A share with a required minimum; ``perhaps`` is its largest possible value, if a part of it is unknown."""
    minimum = float(required) if isinstance(required, int | float) else 0.0
    return PathObservation(
        observed=round(share, 6),
        reason=reason,
        status="unknown" if share < minimum <= perhaps else None,
        satisfies=share >= minimum,
        present=share > 0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedPath:
    """One path: the values that it accepts, its judge, and the evidence that the judge needs."""

    requirement: Requirement
    judge: Callable[[Any, Json], PathObservation]
    """Function from the ``Observation`` and the required value (None if there is none) to the finding."""
    by_operators: bool = False
    """Whether the path is judged by profiler records, so that it is unknown without them."""
    on_request: bool = False
    """Whether the path is judged only if it is required: it concerns packed records, or several ranks."""
    by_modules: bool = True
    """Whether the path is judged by module calls, so that it cannot be judged if those could not be observed."""
    needs_update: bool = False
    """Whether the path cannot be judged by a step without an update."""
    further_steps: str | None = None
    """Why one step may not be conclusive although another may be, and what to do."""


def judge_safely(path: str, required: Json, judge: Callable[[], PathObservation]) -> Check:
    """Convert a judge's finding into a check; a judge that raises never passes, and affects only its own path."""
    try:
        return judge().against(path, required)
    except Exception as error:
        return Check(
            path=path, required=required, observed=None, status="unknown", reason=f"{type(error).__name__}: {error}"
        )


def format_count(count: int, noun: str) -> str:
    """A count with its noun, whose plural ends in s: "1 step", "2 steps"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def name_some(names: Iterable[str], separator: str = ", ") -> str:
    """Name the first few offenders and count the rest."""
    all_names = list(names)
    shown = separator.join(all_names[:NAMES_SHOWN])
    hidden = len(all_names) - NAMES_SHOWN
    return f"{shown} and {hidden} more" if hidden > 0 else shown


def join_clauses(*clauses: str | None) -> str:
    """Join the clauses of a reason; empty ones are left out."""
    return "; ".join(filter(None, clauses))


def join_values(values: Iterable[str]) -> str | None:
    """Join a set of observed values: the only value, ``a+b`` for a mix, None for none."""
    distinct = sorted(set(values))
    return "+".join(distinct) if distinct else None


def count_values(values: Iterable[str]) -> str:
    """List the number of occurrences of each value, most frequent first."""
    return ", ".join(f"{count} {value}" for value, count in Counter(values).most_common())
