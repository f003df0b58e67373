"""Classifies CUDA kernel names and CPU operator names by their code, and reads what a name proves.

Kernel names are the only evidence that survives CUDA-graph replay, and they change without notice: a tool that
hard-coded ``ncclKernel`` reported no communication at all after NCCL renamed it (HolisticTraceAnalysis issue 122). So
the rules are data with the versions against which they were checked, and a name that matches no rule is reported as
unclassified. Order matters: the names of cuDNN's attention kernels contain "flash".
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

UNDECIDED = "math_or_eager"
"""Backend of a softmax rule: SDPA's math, eager attention, or no attention at all."""

# `(int)128`, `(unsigned long)4096` and `(bool)1`: only a cast directly precedes a number.
_C_CAST = re.compile(r"\((?:(?:unsigned|signed|long) )*[\w:<>]+\)(?=-?\d)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One ordered rule: the first whose ``pattern`` is found in the normalised name wins."""

    name: str
    pattern: str
    meaning: str
    category: Category
    evidence: str
    """X: experiment; B: read in a binary; S: read in the source; G: published GPU trace; I: issue; D: derived."""
    gpu_only: bool
    """Whether no name from a CPU can match, so that only a GPU can confirm the rule."""
    library: str | None
    """The library whose version in ``validated_against`` counts; None if only published traces were available."""
    backend: str | None = None
    """Attention implementation, by the values of the requirement ``attention.backend``."""
    path: str | None = None
    """4-bit path, by the values of the requirement ``base.gemm_path`` if there is one."""
    quant_type: str | None = None
    dtype: str | None = None
    """The number format, as far as the name alone shows it."""
    finer: Mapping[Category, str] = field(default_factory=dict, hash=False)
    """Patterns for matching names that belong to another category than ``category``."""

    def category_of(self, name: str) -> Category:
        """The category of a kernel that matches this rule, which may be finer than the rule's."""
        return next((finer for finer, pattern in self.finer.items() if re.search(pattern, name)), self.category)


def normalise(kernel: str) -> str:
    """Normalise a demangled name to Kineto's spelling.

    nsys and ncu print C casts (``(int)128``) and ``<unnamed>``; Kineto prints ``128`` and ``(anonymous namespace)``,
    and a redundant leading ``void``. AMD recorders add the suffix of a kernel descriptor, ``.kd``.
    """
    bare = kernel.strip().removeprefix("void ").removesuffix(".kd")
    return _C_CAST.sub("", bare).replace("<unnamed>", "(anonymous namespace)")


@cache
def load_rules(table: Literal["rules", "operators"]) -> tuple[Rule, ...]:
    """The ``rules`` for kernels or for CPU ``operators``, in matching order."""
    document = json.loads((files(__package__) / "kernel_rules.json").read_text(encoding="utf-8"))
    return tuple(Rule(**entry) for entry in document[table])


@cache
def classify(kernel: str) -> Rule | None:
    """Find the rule for a kernel name; None if no rule matches."""
    name = normalise(kernel)
    return next((rule for rule in load_rules("rules") if re.search(rule.pattern, name)), None)


@cache
def classify_operator(operator: str) -> Rule | None:
    """Find the rule for an operator's name, such as ``aten::mm``; None if no rule matches."""
    return next((rule for rule in load_rules("operators") if re.search(rule.pattern, operator)), None)


@cache
def attention_backend(operator: str) -> str | None:
    """The attention implementation to which an operator belongs; None for other operators, and for a softmax alone."""
    rule = classify_operator(operator)
    return None if rule is None or rule.backend == UNDECIDED else rule.backend


# Index of Is_causal among the template arguments; in flash-attn 2 the kernel traits come first.
_IS_CAUSAL = (
    ("flash_fwd_kernel", 2),
    ("flash_fwd_splitkv_kernel", 1),
    ("flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", 2),
    ("CollectiveMainloopFwdSm90", 7),
)
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_DTYPES = (
    ("bfloat16", re.compile(r"\b(?:__nv_bfloat16|bfloat16_t|BFloat16|bf16)\b|_bf16[_x]|_Q(?:kv)?Bfloat16")),
    ("float16", re.compile(r"\b(?:__half|half_t|Half|half|f16)\b|_f(?:p16x|16_)|_Q(?:kv)?Fp16")),
    ("float8", re.compile(r"\b(?:__nv_fp8\w*|float_e[45]m[23]_t|Float8_e[45]m[23]\w*)\b|_Q(?:kv)?E4m3")),
    ("float32", re.compile(r"\bfloat\b|_f32_")),
    ("float64", re.compile(r"\bdouble\b")),
)
_BACKWARD = re.compile(
    r"bwd|bprop|backward|fmha_cutlassB_|_grad_|cudnn::fusion::(?:compute_dot_do_o|convert_dq|fmha_reduce_head)",
    re.IGNORECASE,
)
_FORWARD = re.compile(r"fwd|fprop|forward|fmha_cutlassF_|decoding|splitkv|lean_reduction|^fmhaSm\d+", re.IGNORECASE)
_OPERANDS = re.compile(r"cublasGemvTensor\w*<(?:const )?([\w:]+)")
"""For cuBLAS' small products, whose first template argument is the accumulator type."""
_TENSILE = re.compile(r"Cijk_A[a-z]+_B[a-z]+_(F8|B8|[BHSD])(?!\d)")
_TENSILE_DTYPES = {"F8": "float8", "B8": "float8", "B": "bfloat16", "H": "float16", "S": "float32", "D": "float64"}
_CAUSAL_WORD = re.compile(r"^fmhaSm\d+\w*?(Causal|Dense)")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelNameFacts:
    """Facts that one kernel's name proves; None if it does not show them."""

    dtype: str | None = None
    """Compute dtype."""
    causal: bool | None = None
    direction: Literal["forward", "backward"] | None = None


@cache
def read_facts(kernel: str, rule: Rule) -> KernelNameFacts:
    """Read the name of a kernel that ``rule`` matched."""
    name = normalise(kernel)
    backward, forward = _BACKWARD.search(name), _FORWARD.search(name)
    return KernelNameFacts(
        dtype=_dtype(name, rule),
        causal=_causal(name) if rule.category == "attention" else None,
        direction="backward" if backward else "forward" if forward else None,
    )


def template_arguments(name: str, template: str) -> list[str]:
    """Arguments of the first ``template<...>`` in a name, split at outermost commas; empty if there is none.

    A truncated name gives the complete arguments.
    """
    found = re.search(rf"\b{re.escape(template)}<", name)
    if found is None:
        return []
    arguments, depth, start = [], 0, found.end()
    for position in range(found.end(), len(name)):
        letter = name[position]
        if letter in "<([{":
            depth += 1
        elif letter in ">)]}" and depth:
            depth -= 1
        elif letter == ">" or (letter == "," and not depth):
            arguments.append(name[start:position].strip())
            start = position + 1
            if letter == ">":
                break
    return arguments


def _causal(name: str) -> bool | None:
    if word := _CAUSAL_WORD.search(name):
        return word.group(1) == "Causal"
    for template, position in _IS_CAUSAL:
        arguments = template_arguments(name, template)
        if len(arguments) > position:
            return _BOOLEANS.get(arguments[position])
    return None


def _dtype(name: str, rule: Rule) -> str | None:
    if rule.dtype is not None:
        return rule.dtype
    if rule.backend == "cudnn" or rule.category not in ("attention", "dequantize", "matmul"):
        return None  # cuDNN also writes f16 for bfloat16
    if rule.name.startswith("ATT-FA3"):
        for mainloop in ("CollectiveMainloopFwdSm90", "CollectiveMainloopBwdSm90"):
            elements = [dtype for argument in template_arguments(name, mainloop)[4:7] if (dtype := _named(argument))]
            if elements:
                return elements[0]  # the element type precedes the accumulator's type
    if rule.name == "GEMM-AMD":
        letters = _TENSILE.search(name)
        return None if letters is None else _TENSILE_DTYPES[letters.group(1)]
    if re.match(r"gemm(SN|k1)_|dot_kernel<|reduce_1Block_kernel<", name):
        operand = _OPERANDS.search(name)
        return None if operand is None else _named(operand.group(1))
    if rule.name.startswith(("BNB-", "ATT-SOFTMAX")):
        return _named(_first_argument(name))
    named = _named(name)
    # Every flash kernel refuses float32, so the word must come from its parameters.
    return None if named == "float32" and (rule.backend or "").startswith("flash") else named


def _first_argument(name: str) -> str:
    """First template argument of the innermost function: types in its argument list do not show the compute dtype."""
    found = re.search(r"\b\w*(?:Blockwise|4bit\w*|softmax_warp_\w+)<([^,<>]+)", name) or re.search(
        r"\bcunn_\w*<\w+, ([^,<>]+)",
        name,  # the vector width comes first
    )
    return found.group(1) if found is not None else ""


def _named(text: str) -> str | None:
    return next((dtype for dtype, pattern in _DTYPES if pattern.search(text)), None)
