"""What a study claims, in a form that data can support or refute: `[[claim]]` in the study's TOML.

[[claim]]
id = "3"
says = "inference gets faster as alpha rises"
original = "3.48 s at alpha 16, 2.56 s at alpha 256"        # what the source published, for the report
parts = [{ rule = "trend-down", axis = "lora_alpha", metric = "request_time_s" }]

A claim is the conjunction of its parts: supported if every part is, refuted if one part is. `harness.verdicts.claims`
judges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from harness.errors import UsageError
from harness.records.metrics import METRICS

Rule = Literal[
    "trend-up", "trend-down", "no-trend", "equal", "differs", "highest", "lowest", "best", "largest-effect", "rises"
]
"""trend-up, trend-down: the metric rises (falls) along the axis by more than the tolerance from the first level to the
last, by a straight line through all levels · no-trend: that line changes by no more than the margin · equal: all levels
lie within the margin of each other · differs: the two `levels` differ by more than the tolerance · highest, lowest: the
one level of `levels` is above (below) every other by more than the tolerance · best: the one level of `levels` has the
lowest weighted sum of log `metrics` of all levels · largest-effect: the line changes more along `axis` than along each
axis of `against`, in either direction · rises: a counted quantity (parameters, bytes) is larger at every level than at
the one before, exactly.

A rule has one limit, the tolerance of an effect or the margin of an equality, and its negation is what lies on the
limit's other side. So "differs" is refuted where two levels are within the tolerance, not within the margin: a real
difference of 3 % would else be refuted by few replicates and supported by many."""

_LEVELS: dict[Rule, int] = {"differs": 2, "highest": 1, "lowest": 1, "best": 1}
_LIMITED: dict[Rule, Literal["tolerance", "margin"]] = {
    "trend-up": "tolerance",
    "trend-down": "tolerance",
    "differs": "tolerance",
    "highest": "tolerance",
    "lowest": "tolerance",
    "no-trend": "margin",
    "equal": "margin",
}
LINEAR: tuple[Rule, ...] = ("trend-up", "trend-down", "no-trend", "equal", "largest-effect")
"""Rules that lay a line through the levels ("equal" for its estimate), and so use the scale."""
COUNTED = ("trainable_parameters", "adapter_bytes", "optimizer_state_bytes")
"""Quantities that are counted, not sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One testable statement. Raises `UsageError` where the rule and the rest do not go together."""

    rule: Rule
    axis: str
    """Field of Variant; its levels are the variants that differ from the reference in this field only."""
    metric: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    """For "best": weight of each metric; 1 and 1 say that one per cent of either counts the same."""
    levels: tuple[float, ...] = ()
    """Values of the axis that the rule is about."""
    against: tuple[str, ...] = ()
    """For "largest-effect": the other axes."""
    scale: Literal["log", "linear"] = "log"
    """How far apart levels are: by their logarithm or by their value. The axes of `against` go by their logarithm where
    all their levels are above zero."""
    tolerance: float = 0.01
    """Smallest effect worth the word, a fraction; of no use to "no-trend", "equal" and what has no limit."""
    margin: float = 0.05
    """Within it two things count as equal, a fraction; for "no-trend" and "equal"."""

    def __post_init__(self) -> None:
        where = f"claim part {self.rule!r} on {self.axis!r}"
        needed = _LEVELS.get(self.rule, 0)
        if len(self.levels) != needed:
            raise UsageError(f"{where}: levels = {list(self.levels)}: {needed} expected. Name that many of the axis.")
        if len(set(self.levels)) < len(self.levels):
            raise UsageError(f"{where}: levels = {list(self.levels)}: the same one twice. Name two.")
        if bool(self.metrics) != (self.rule == "best") or bool(self.metric) == (self.rule == "best"):
            raise UsageError(f"{where}: give metrics (with weights) for rule 'best' and metric for any other rule.")
        if bool(self.against) != (self.rule == "largest-effect"):
            raise UsageError(f"{where}: against = {list(self.against)}: needed by 'largest-effect', and by it only.")
        if self.axis in self.against:
            raise UsageError(f"{where}: against = {list(self.against)}: holds the axis itself. Leave it out.")
        known = COUNTED if self.rule == "rises" else tuple(METRICS)
        for name in self.metrics or (self.metric,):
            if name not in known:
                raise UsageError(f"{where}: metric {name!r}: not known for this rule. Known: {', '.join(known)}.")
        if not 0 <= self.tolerance <= self.margin < 1:
            raise UsageError(
                f"{where}: tolerance = {self.tolerance}, margin = {self.margin}: 0 <= tolerance <= margin < 1 expected."
            )

    @property
    def limit(self) -> tuple[str, float]:
        """What the rule's limit is called and its value, a fraction; "" and 0 for rules without one."""
        name = _LIMITED.get(self.rule)
        return (name, self.tolerance if name == "tolerance" else self.margin) if name else ("", 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A sentence and the parts that it stands on."""

    id: str
    says: str
    parts: tuple[Part, ...]
    original: str = ""
    """What the source of the claim published."""
    pretrained: bool = False
    """Whether it says nothing of a model with random weights (a loss)."""

    def __post_init__(self) -> None:
        if not self.id or not self.says or not self.parts:
            raise UsageError(f"claim {self.id!r}: id, says and at least one of parts are needed. Add them.")

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis that the claim speaks of."""
        return tuple(dict.fromkeys(axis for part in self.parts for axis in (part.axis, *part.against)))


RULES: tuple[Rule, ...] = get_args(Rule)
