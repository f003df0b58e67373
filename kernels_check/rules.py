"""Which code a CUDA kernel name belongs to.

Kernel names are the only evidence that survives CUDA-graph replay, and they change without notice: a tool that
hard-coded ``ncclKernel`` reported no communication at all after NCCL renamed it (HolisticTraceAnalysis issue 122).
So the rules are data, stamped with the versions they were checked against, and a name that none of them knows stays
visible as unclassified. Order matters: cuDNN's attention kernels carry the word "flash".
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_C_CAST = re.compile(r"\((?:unsigned |signed )?[\w:]+\)(?=-?\d)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One ordered rule: the first whose ``pattern`` is found in the normalised name wins."""

    name: str
    pattern: str
    meaning: str
    evidence: str
    """Grades: X experiment, B binary read, S source read, G published GPU trace, I issue, D derived."""


def normalise(kernel: str) -> str:
    """Spell a demangled name as Kineto does: no leading ``void``, no C casts such as ``(int)128`` of nsys and ncu."""
    return _C_CAST.sub("", kernel.removeprefix("void "))


@cache
def _document() -> dict[str, object]:
    text = (files(__package__) / "kernel_rules.json").read_text(encoding="utf-8")
    document: dict[str, object] = json.loads(text)
    return document


@cache
def load_rules() -> tuple[Rule, ...]:
    """All rules, in matching order."""
    entries = _document()["rules"]
    assert isinstance(entries, list)
    return tuple(Rule(**entry) for entry in entries)


def validated_against() -> dict[str, str]:
    """Library versions whose kernels the rules were checked on."""
    stamp = _document()["validated_against"]
    assert isinstance(stamp, dict)
    return dict(stamp)


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], Rule], ...]:
    return tuple((re.compile(rule.pattern), rule) for rule in load_rules())


@cache
def classify(kernel: str) -> Rule | None:
    """Find the rule of a kernel name; None where no rule knows it."""
    name = normalise(kernel)
    return next((rule for pattern, rule in _patterns() if pattern.search(name)), None)
