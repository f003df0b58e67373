"""Which code a CUDA kernel name, or the name of an operator on the host, belongs to, and what the name proves.

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

    def category_of(self, name: str) -> Category:
        """The category of a kernel that this rule matches, which may be finer than the rule's."""
        return next((finer for finer, pattern in self.finer.items() if re.search(pattern, name)), self.category)


def normalise(kernel: str) -> str:
    """Spell a demangled name as Kineto does.

    nsys and ncu print C casts (``(int)128``) and ``<unnamed>``; Kineto prints ``128`` and ``(anonymous namespace)``,
    and a leading ``void``, which says nothing. Recorders of AMD add the ending of a kernel descriptor, ``.kd``.
    """
    bare = kernel.strip().removeprefix("void ").removesuffix(".kd")
    return _C_CAST.sub("", bare).replace("<unnamed>", "(anonymous namespace)")


@cache
def load_rules(table: Literal["rules", "operators"]) -> tuple[Rule, ...]:
    """The ``rules`` for kernels, or those for ``operators`` on the host, in matching order."""
    document = json.loads((files(__package__) / "kernel_rules.json").read_text(encoding="utf-8"))
    return tuple(Rule(**entry) for entry in document[table])


@cache
def classify(kernel: str) -> Rule | None:
    """Find the rule of a kernel name; None where no rule knows it."""
    name = normalise(kernel)
    return next((rule for rule in load_rules("rules") if re.search(rule.pattern, name)), None)


@cache
def classify_operator(operator: str) -> Rule | None:
    """Find the rule of an operator's name, such as ``aten::mm``; None where no rule knows it."""
    return next((rule for rule in load_rules("operators") if re.search(rule.pattern, operator)), None)


@cache
def attention_backend(operator: str) -> str | None:
    """Name the attention implementation an operator belongs to; None for any other, and for a softmax by itself."""
    rule = classify_operator(operator)
    return None if rule is None or rule.backend == UNDECIDED else rule.backend


# Position of Is_causal after the template's name; the kernel traits come first in flash-attn 2.
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
"""Of cuBLAS' small products, whose first template argument is what they add up in."""
_TENSILE = re.compile(r"Cijk_A[a-z]+_B[a-z]+_(F8|B8|[BHSD])(?!\d)")
_TENSILE_DTYPES = {"F8": "float8", "B8": "float8", "B": "bfloat16", "H": "float16", "S": "float32", "D": "float64"}
_CAUSAL_WORD = re.compile(r"^fmhaSm\d+\w*?(Causal|Dense)")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelNameFacts:
    """Facts that one kernel's name proves."""

    dtype: str | None
    """What it computes in; None where the name does not say."""
    causal: bool | None
    direction: Literal["forward", "backward"] | None


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
    """Arguments of the first ``template<...>`` in a name, outermost commas only; empty where it has none.

    A name that was cut off in the middle gives the arguments that are complete.
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
        return None  # cuDNN writes f16 for bfloat16 as well
    if rule.name.startswith("ATT-FA3"):
        for mainloop in ("CollectiveMainloopFwdSm90", "CollectiveMainloopBwdSm90"):
            elements = [dtype for argument in template_arguments(name, mainloop)[4:7] if (dtype := _named(argument))]
            if elements:
                return elements[0]  # the element type comes before the accumulator's
    if rule.name == "GEMM-AMD":
        letters = _TENSILE.search(name)
        return None if letters is None else _TENSILE_DTYPES[letters.group(1)]
    if re.match(r"gemm(SN|k1)_|dot_kernel<|reduce_1Block_kernel<", name):
        operand = _OPERANDS.search(name)
        return None if operand is None else _named(operand.group(1))
    if rule.name.startswith(("BNB-", "ATT-SOFTMAX")):
        return _named(_first_argument(name))
    named = _named(name)
    # Every flash kernel refuses float32, so the word can only come from its parameters.
    return None if named == "float32" and (rule.backend or "").startswith("flash") else named


def _first_argument(name: str) -> str:
    """First template argument of the innermost function: types in its argument list do not show the compute dtype."""
    found = re.search(r"\b(?:k?\w*(?:Blockwise|4bit\w*|softmax_warp_\w+))<([^,<>]+)", name)
    if found is not None:
        return found.group(1)
    found = re.search(r"\bcunn_\w*<\w+, ([^,<>]+)", name)  # the vector width comes first
    return found.group(1) if found is not None else ""


def _named(text: str) -> str | None:
    return next((dtype for dtype, pattern in _DTYPES if pattern.search(text)), None)
