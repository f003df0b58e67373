"""Claims of a study, in a form that data can support or refute, and the engine that they are about.

[[claim]]
id = "3"
says = "inference gets faster as alpha rises"
original = "3.48 s at alpha 16, 2.56 s at alpha 256"        # the published numbers, for the report
parts = [{ rule = "trend-down", axis = "lora_alpha", metric = "request_time_s" }]

A claim is the conjunction of its parts: supported if every part is, refuted if one part is. `lorameter.verdicts.claims`
judges claims. For any axis other than `engine`, three rules take a pair of levels:

[[claim]]
id = "nf4"
says = "nf4 needs less memory than bf16 and is at most 10 % slower"
parts = [
    { rule = "lowers", axis = "quantization", levels = ["none", "nf4"], metric = "peak_memory" },
    { rule = "costs-at-most", axis = "quantization", levels = ["none", "nf4"], metric = "step_time_s", by = 0.1 },
]

An engine is a third-party feature that promises faster or smaller training. The axis `engine` has two levels, the
reference and the variant that has the engine:

[engine]
title = "Liger Kernel"            # the name in reports
variant = "liger"                 # the variant with the engine; the reference is the variant without it
needs = "cuda"                    # the required device; omit it if any device will do
package = "liger-kernel"          # the distribution whose version is stored with results
flag = "{--use_liger_kernel}"     # a typical flag of a training script, in braces, for messages

[engine.proof]                    # kernels_check paths, each with its value if the engine runs

A claim is judged only if the engine demonstrably ran in its variant and not in the reference: otherwise a flag that a
script ignores would refute a claim that was never tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lorameter.errors import refused_value, require, shorten
from lorameter.measurements.metrics import METRICS
from lorameter.studies import protocol

ENGINE = "engine"
"""The axis of a study's engine."""
PEAK = "peak_memory"
"""Peak memory in training: of the device's allocator, or of the process on a CPU. For "lowers" and "costs-at-most",
which also accept the name of a kind of memory (`device_peak_allocated_generate_bytes`)."""
Level = float | bool | str
"""A value of an axis; a non-numeric value is written as in the study."""
UNSET = "not set"
"""The level of a field without a value."""

Rule = Literal[
    "trend-up", "trend-down", "no-trend", "equal", "differs", "highest", "lowest", "best", "largest-effect", "rises",
    "faster", "lowers", "costs-at-most",
]  # fmt: skip
"""trend-up, trend-down: the metric rises (falls) along the axis by more than the tolerance from the first level to the
last, by a straight line through all levels · no-trend: that line changes by no more than the margin · equal: all levels
lie within the margin of each other · differs: the two `levels` differ by more than the tolerance · highest, lowest: the
one level of `levels` is above (below) every other by more than the tolerance · best: the one level of `levels` has the
lowest weighted sum of log `metrics` of all levels · largest-effect: the line changes more along `axis` than along each
axis of `against`, in either direction · rises: a counted quantity (parameters, bytes) is strictly larger at every level
than at the previous one · faster: with the engine, or at the second of `levels` compared with the first, the same work
takes less time, by a factor of more than 1 + `by` · lowers: the metric falls by more than the share `by` ·
costs-at-most: the metric rises by no more than the share `by`.

A rule has one limit (the tolerance of an effect, the margin of an equality, or the claimed amount), and its negation is
the other side of this limit. So "differs" is refuted if two levels are within the tolerance, not within the margin:
otherwise few replicates would refute a real difference of 3 % and many would support it.
"""

_LEVELS: dict[Rule, int] = {"differs": 2, "highest": 1, "lowest": 1, "best": 1}
_LIMITED: dict[Rule, Literal["tolerance", "margin", "by"]] = {
    "trend-up": "tolerance",
    "trend-down": "tolerance",
    "differs": "tolerance",
    "highest": "tolerance",
    "lowest": "tolerance",
    "no-trend": "margin",
    "equal": "margin",
    "faster": "by",
    "lowers": "by",
    "costs-at-most": "by",
}
OF_PAIRS: tuple[Rule, ...] = ("faster", "lowers", "costs-at-most")
"""Rules that compare two levels: the variant with the engine and the reference, or the second and the first of
`levels`."""
RULES: tuple[Rule, ...] = get_args(Rule)
LINEAR: tuple[Rule, ...] = ("trend-up", "trend-down", "no-trend", "equal", "largest-effect")
"""Rules that fit a line through the levels ("equal" for its estimate), and so use the scale."""
COUNTED = ("trainable_parameters", "adapter_bytes", "optimizer_state_bytes")
"""Quantities that are counted instead of sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimPart:
    """One testable statement. Raises `UsageError` if the rule and the other fields do not match."""

    rule: Rule
    """The statement, see below."""
    axis: str
    """A field of any kind of variant, a field of the workload such as "workload.batch_size" or "workload.model", or
    "engine"; its levels are the variants that differ from the reference only in this field."""
    metric: str = ""
    """Name of the measured metric; for "rises", of a counted quantity."""
    metrics: dict[str, float] = field(default_factory=dict)
    """For "best": weight of each metric; weights of 1 and 1 treat one per cent of each metric alike."""
    levels: tuple[Level, ...] = ()
    """Values of the axis to which the rule applies."""
    against: tuple[str, ...] = ()
    """For "largest-effect": the other axes."""
    scale: Literal["log", "linear"] = "log"
    """Distance between levels: by logarithm or by value. The axes of `against` use the logarithm if all their levels
    are above zero."""
    tolerance: float = 0.01
    """Smallest effect that counts, a fraction; for "trend-up", "trend-down", "differs", "highest" and "lowest"."""
    margin: float = 0.05
    """Two values within it count as equal, a fraction; for "no-trend" and "equal"."""
    by: float = 0.01
    """The claimed effect of an engine or a pair, a fraction: 0.2 means 1.2 times as fast, a metric that falls to 0.8,
    or one that rises to at most 1.2. A claim without a figure uses the smallest effect that counts, 1 %."""

    def __post_init__(self) -> None:
        where = f"claim part {self.rule!r} on {self.axis!r}"
        is_pair = self.rule in OF_PAIRS and self.axis != ENGINE
        needed = 2 if is_pair else _LEVELS.get(self.rule, 0)
        remedy = f', the base first, or write axis = "{ENGINE}"' if is_pair else ""
        listed = f"{where}: levels = {list(self.levels)}"
        require(len(self.levels) == needed, f"{listed}: {needed} expected. Name that many of the axis{remedy}.")
        require(len(set(self.levels)) == len(self.levels), f"{listed}: the same level twice. Name two different ones.")
        best = self.rule == "best"
        require(
            bool(self.metrics) == best and bool(self.metric) != best,
            f"{where}: give metrics (with weights) for rule 'best' and metric for any other rule.",
        )
        others = f"{where}: against = {list(self.against)}"
        require(
            bool(self.against) == (self.rule == "largest-effect"),
            f"{others}: needed by 'largest-effect', and by it only.",
        )
        require(self.axis not in self.against, f"{others}: contains the axis itself. Leave it out.")
        about_memory = self.rule in ("lowers", "costs-at-most")
        if self.rule == "faster":
            known: tuple[str, ...] = tuple(name for name, metric in METRICS.items() if metric.unit == "s")
        else:
            known = COUNTED if self.rule == "rises" else (*METRICS, *([PEAK] if about_memory else []))
        for name in self.metrics or (self.metric,):
            require(
                name in known or (about_memory and name.endswith("_bytes")),
                f"{where}: metric {name!r}: not known for this rule. Known: {', '.join(known)}.",
            )
        name, limit = self.limit
        if name in ("tolerance", "margin"):
            protocol.check_fraction(where, name, limit, zero=True)
        if name == "by":
            require(
                0 < limit < (1 if self.rule == "lowers" else 1000),
                f"{where}: by = {limit}: not a possible share. 0.2 means 20 %; a metric cannot fall by 1 or more.",
            )

    @property
    def of_memory(self) -> bool:
        """Whether it is about bytes, which are compared by their maximum instead of a test."""
        return self.metric == PEAK or (self.rule in OF_PAIRS and self.metric.endswith("_bytes"))

    @property
    def limit(self) -> tuple[str, float]:
        """Name and value of the rule's limit, a fraction; "" and 0 for rules without a limit."""
        name = _LIMITED.get(self.rule)
        return (name, float(getattr(self, name))) if name else ("", 0.0)


def check_limits(part: Mapping[str, Any], where: str) -> None:
    """Raise `UsageError` if a part sets a limit that its rule does not use, since it would have no effect. A study in a
    record has all limits, with their defaults."""
    rule = part.get("rule")
    own = _LIMITED.get(rule) if rule in RULES else None
    for name in ("tolerance", "margin", "by"):
        if rule in RULES and name in part and name != own:
            why = f"rule {rule!r} does not use it: its limit is {own!r}" if own else f"rule {rule!r} has no limit"
            raise refused_value(where, name, part[name], why, "Leave it out.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A sentence and its testable parts."""

    id: str
    """Its name in the report."""
    says: str
    """The sentence."""
    parts: tuple[ClaimPart, ...]
    """The parts, which must all hold."""
    original: str = ""
    """The figures published by the source."""
    pretrained: bool = False
    """Whether it needs a pretrained model, for example because it is about losses."""
    source: str = ""
    """The page with the claim, and the date on which it was read."""

    def __post_init__(self) -> None:
        complete = self.id and self.says and self.parts
        require(complete, f"claim {self.id!r}: id, says and at least one of parts are needed. Add them.")

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis of the claim."""
        return tuple(dict.fromkeys(axis for part in self.parts for axis in (part.axis, *part.against)))


def format_level(level: Level) -> str:
    """A level in words."""
    if isinstance(level, bool):
        return str(level).lower()
    return level if isinstance(level, str) else f"{level:g}"


def is_number(level: Level) -> bool:
    """Whether levels of this kind are numeric."""
    return not isinstance(level, (bool, str))


# --- engines ----------------------------------------------------------------------------------------------------------

ANY = "any"
"""Required value of a path that reports how much of a feature is present: some with the engine, none without."""
LESS = "less"
"""Required value of a share: with the engine, less than half of its value without."""
SAFE = "not false"
"""Required value of a path that must not be false, so that a gain is not unfair; a path that could not be observed is
accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An engine whose claims a study judges. Raises `UsageError` for invalid fields."""

    title: str
    """Its name."""
    variant: str
    """The variant that uses it."""
    proof: dict[str, Any]
    """Paths of kernels_check with their required values: true, a word, or one of "any", "less" and "not false"."""
    needs: Literal["", "cuda"] = ""
    """The device that it needs; on other devices it cannot be measured."""
    package: str = ""
    """The distribution whose version is part of a result."""
    flag: str = ""
    """Its usual option in a training script, in braces; shown in messages."""

    def __post_init__(self) -> None:
        require(self.title and self.variant, "[engine]: title and variant are needed. Add them.")
        for key in ("title", "package", "flag"):
            protocol.check_word("[engine]", key, getattr(self, key))
        require(
            any(value != SAFE for value in self.proof.values()),
            "[engine.proof]: nothing would show that the engine runs. Name a path of kernels_check, as in "
            '"optimizer.fused" = true.',
        )
        for path, value in self.proof.items():
            require(
                value is True or (isinstance(value, str) and value),
                f"[engine.proof]: {shorten(path, 60)} = {shorten(repr(value), 60)}: no observable value. Use "
                f'true, a word, "{ANY}", "{LESS}" or "{SAFE}".',
            )
