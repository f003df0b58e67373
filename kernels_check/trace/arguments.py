"""What a kernel's template arguments say: number format, causality, direction.

The compiler writes the choices of a templated kernel into its name, so the name proves them. The positions come from
the headers of flash-attn 2.8.3 (``flash_fwd_launch_template.h``, also bundled in torch 2.13), of FlashAttention-3
(``mainloop_fwd_sm90_tma_gmma_ws.hpp``) and of bitsandbytes 0.50 (``kDequantizeBlockwise<T, ..., DATA_TYPE>``), and
were compared with the instantiations in the shipped binaries. Tensile writes the formats of its operands as letters
(``BBS``: bfloat16 in and out, float32 sums). What a name leaves open is None.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from kernels_check.rules import Rule, normalise

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
    """What one kernel's name proves about it."""

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
    if said := _CAUSAL_WORD.search(name):
        return said.group(1) == "Causal"
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
                return elements[0]  # the element type stands before the accumulator's
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
    """Of the innermost function: the argument list's own types say nothing of what it computes in."""
    found = re.search(r"\b(?:k?\w*(?:Blockwise|4bit\w*|softmax_warp_\w+))<([^,<>]+)", name)
    if found is not None:
        return found.group(1)
    found = re.search(r"\bcunn_\w*<\w+, ([^,<>]+)", name)  # the vector width comes first
    return found.group(1) if found is not None else ""


def _named(text: str) -> str | None:
    return next((dtype for dtype, pattern in _DTYPES if pattern.search(text)), None)
