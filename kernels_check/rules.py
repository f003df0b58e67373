"""Which code a CUDA kernel name, or the name of an operator on the host, belongs to.

Kernel names are the only evidence that survives CUDA-graph replay, and they change without notice: a tool that
hard-coded ``ncclKernel`` reported no communication at all after NCCL renamed it (HolisticTraceAnalysis issue 122).
So the rules are data, stamped with the versions they were checked against, and a name that none of them knows stays
visible as unclassified. Order matters: cuDNN's attention kernels carry the word "flash".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Literal, TypeAlias, get_args

Category: TypeAlias = Literal[
    "matmul", "dequantize", "attention", "elementwise", "copy", "loss", "optimizer", "communication", "other"
]
CATEGORIES: tuple[Category, ...] = get_args(Category)

GRADES = {
    "X": "experiment",
    "B": "binary read",
    "S": "source read",
    "G": "published GPU trace",
    "I": "issue",
    "D": "derived",
}
"""How a rule is known."""

UNDECIDED = "math_or_eager"
"""Backend of a rule for softmax: SDPA's math, a model that writes attention out, or no attention at all."""

# `(int)128`, `(unsigned long)4096` and `(bool)1`: only a cast comes directly before a number.
_C_CAST = re.compile(r"\((?:(?:unsigned|signed|long) )*[\w:<>]+\)(?=-?\d)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One ordered rule: the first whose ``pattern`` is found in the normalised name wins."""

    name: str
    pattern: str
    meaning: str
    category: Category
    evidence: str
    """Letters of ``GRADES``."""
    gpu_only: bool
    """Whether nothing that a CPU runs can match, so that only a GPU can confirm the rule."""
    library: str | None
    """Whose version in ``validated_against`` counts; None where only published traces were at hand."""
    backend: str | None = None
    """Attention implementation, in the words of the requirement ``attention.backend``."""
    path: str | None = None
    """4-bit path, in the words of the requirement ``base.gemm_path`` where it has one."""
    quant_type: str | None = None
    dtype: str | None = None
    """What the name alone says of the number format."""
    finer: Mapping[Category, str] = field(default_factory=dict, hash=False)
    """Patterns of those matching names that spend their time on another category than ``category``."""

    def __post_init__(self) -> None:
        unknown = {self.category, *self.finer} - set(CATEGORIES)
        if unknown:
            raise ValueError(f"rule {self.name}: category {unknown} is none of {', '.join(CATEGORIES)}")

    def category_of(self, name: str) -> Category:
        """What a kernel that this rule matches spends its time on; the rule may be coarser than that."""
        return next((finer for finer, pattern in self.finer.items() if re.search(pattern, name)), self.category)


def normalise(kernel: str) -> str:
    """Spell a demangled name as Kineto does.

    nsys and ncu print C casts (``(int)128``) and ``<unnamed>``; Kineto prints ``128`` and ``(anonymous namespace)``,
    and a leading ``void``, which says nothing. Recorders of AMD add the ending of a kernel descriptor, ``.kd``.
    """
    bare = kernel.strip().removeprefix("void ").removesuffix(".kd")
    return _C_CAST.sub("", bare).replace("<unnamed>", "(anonymous namespace)")


@cache
def _document() -> dict[str, object]:
    text = (files(__package__) / "kernel_rules.json").read_text(encoding="utf-8")
    document: dict[str, object] = json.loads(text)
    return document


def _read(table: str) -> tuple[Rule, ...]:
    entries = _document()[table]
    assert isinstance(entries, list)
    return tuple(Rule(**entry) for entry in entries)


@cache
def load_rules() -> tuple[Rule, ...]:
    """All rules for kernels, in matching order."""
    return _read("rules")


@cache
def load_operator_rules() -> tuple[Rule, ...]:
    """All rules for operators on the host, in matching order."""
    return _read("operators")


def validated_against() -> dict[str, str]:
    """Library versions whose kernels the rules were checked on."""
    stamp = _document()["validated_against"]
    assert isinstance(stamp, dict)
    return dict(stamp)


@cache
def _patterns(rules: tuple[Rule, ...]) -> tuple[tuple[re.Pattern[str], Rule], ...]:
    return tuple((re.compile(rule.pattern), rule) for rule in rules)


@cache
def classify(kernel: str) -> Rule | None:
    """Find the rule of a kernel name; None where no rule knows it."""
    name = normalise(kernel)
    return next((rule for pattern, rule in _patterns(load_rules()) if pattern.search(name)), None)


@cache
def classify_operator(operator: str) -> Rule | None:
    """Find the rule of an operator's name, such as ``aten::mm``; None where no rule knows it."""
    return next((rule for pattern, rule in _patterns(load_operator_rules()) if pattern.search(operator)), None)


@cache
def attention_backend(operator: str) -> str | None:
    """Name the attention implementation an operator belongs to; None for any other, and for a softmax by itself."""
    rule = classify_operator(operator)
    return None if rule is None or rule.backend == UNDECIDED else rule.backend
