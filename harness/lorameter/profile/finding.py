"""What a rule finds: one thing that a step or a request spends time or memory on, its cost, and what to try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that a step spends time or memory on, and what to try."""

    code: str
    message: str
    """What was seen, with its number."""
    cost_s: float | None
    """Seconds of `metric` that were seen to hang on it; None where it costs memory alone."""
    cost_share: float | None
    metric: str = "step_time_s"
    """What the cost is a part of, and what a remedy is judged by; of requests one of theirs."""
    cost_bytes: int | None = None
    remedy: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the variant to change, with their values: what can be tried against the present one."""
    workload_changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the workload to change, for a trial of the same variant on another workload."""
    obstacle: str = ""
    """Why nothing can be tried here, where there are no changes."""

    @property
    def suggestion(self) -> Mapping[str, Any]:
        """What `--try` changes: fields of the variant or, where none help, of the workload; empty where neither do."""
        return self.changes or self.workload_changes
