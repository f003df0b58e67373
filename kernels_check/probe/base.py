"""Quantised base layers, tried on a layer of 1024 x 1024 with 128 tokens, forward and backward.

The weights are drawn from the normal distribution, for which bitsandbytes knows the mean error of each format: an error
of quantisation outside its window means another format or block size, whatever the layer says of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from kernels_check.observe.base import read_storage
from kernels_check.probe.attempt import (
    Try,
    UnavailableError,
    cast,
    mean_error,
    paired,
    relative,
    step_of,
    watch,
    with_gradients,
)
from kernels_check.probe.result import Attempt, Exactness

_SIZE, _TOKENS = 1024, 128
_MEAN_ERRORS = {"nf4": (0.072798, 0.000074), "fp4": (0.096543, 0.000111)}
"""Mean and standard deviation of the mean absolute error on normal weights, in blocks of 64."""
_QUANTISATION_TESTS = "bitsandbytes, tests/test_functional.py: mean error of blocks of 64, 7 standard deviations around"
_BITS = {False: 4.5, True: 4.127}
"""A float32 scale for 64 weights; with double quantisation a byte, and a float32 for 256 of these."""
_INT8_LIMITS = ((0.01, 0.1, 0.021), (0.035, 0.2, 0.001))
"""Absolute and relative tolerance, and the share of outputs that may lie outside."""
_INT8_OPERATORS = ("MatMul8bitFp", "MatMul8bitLt", "bitsandbytes::int8_vectorwise_quant", "aten::_int_mm")


@cache
def _weight() -> Tensor:
    return torch.randn(_SIZE, _SIZE, generator=torch.Generator().manual_seed(5))


@cache
def _batch(device: str) -> Mapping[str, Tensor]:
    tokens = torch.randn(_TOKENS, _SIZE, generator=torch.Generator().manual_seed(6))
    return {"input": tokens.to(device, torch.bfloat16)}


def _plain(device: str, scale: float = 1.0) -> torch.nn.Linear:
    """The same weights in bfloat16."""
    linear = torch.nn.Linear(_SIZE, _SIZE, bias=False)
    linear.weight = torch.nn.Parameter(_weight() * scale, requires_grad=False)
    return linear.to(device, torch.bfloat16)


def _fourbit(device: str, quant_type: str, *, double: bool) -> Any:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(_SIZE, _SIZE, bias=False, compute_dtype=torch.bfloat16)
    layer.weight = bnb.nn.Params4bit(
        _weight().bfloat16(), requires_grad=False, compress_statistics=double, quant_type=quant_type, module=layer
    )
    return layer.to(device)


def _restored(layer: Any) -> Tensor:
    """The weights as they are stored, in bfloat16, [outputs, inputs]."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


def _quantised(device: str, *, quant_type: str, double: bool) -> Attempt:
    layer, plain, batch = _fourbit(device, quant_type, double=double), _plain(device), _batch(device)
    step = step_of(layer, batch)
    found, executed, stored, restored = step(), watch(step), read_storage(layer), _restored(layer)
    operators = sorted(name for name in executed.operators if name.startswith("bitsandbytes::"))
    kernels = sorted(rule for rule in executed.kernels if rule.startswith("BNB-"))
    density = f"{stored.bits_per_weight or 0.0:.3f} bits a weight"
    evidence = ", ".join([f"{stored.quant_type}", density, *operators, *kernels])
    ran = (
        stored.bits == 4
        and stored.quant_type == quant_type
        and stored.double_quant is double
        and abs((stored.bits_per_weight or 0.0) - _BITS[double]) < 0.01
        and any(name.startswith("bitsandbytes::ge") for name in operators)
    )
    if not ran:
        return Attempt(ran=False, evidence=f"{evidence}, {stored.problem or ''}")
    mean, deviation = _MEAN_ERRORS[quant_type]
    quantisation = Exactness(
        what="mean error of the stored weights",
        error=float((restored.float().cpu() - _weight()).abs().mean()),
        least=mean - 7 * deviation,
        bound=mean + 7 * deviation,
        source=_QUANTISATION_TESTS,
    )
    doubled = cast(batch, torch.float64)
    exact = with_gradients(lambda value: value @ restored.double().t(), doubled)
    unquantised = doubled["input"] @ _weight().to(restored.device).double().t()
    product = mean_error(found["output"], unquantised, scale=_SIZE**-0.5)
    speed = paired(step, step_of(plain, batch), "bfloat16 linear")
    return Attempt(ran=True, evidence=evidence, exactness=(quantisation, product, *relative(found, exact)), speed=speed)


def _int8(device: str) -> Attempt:
    """LLM.int8: the inputs are quantised by row, so that its errors are those of bitsandbytes' own test of it."""
    import bitsandbytes as bnb

    scale = _SIZE**-0.5
    layer = bnb.nn.Linear8bitLt(_SIZE, _SIZE, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params((_weight() * scale).half(), requires_grad=False, has_fp16_weights=False)
    layer, plain, batch = layer.to(device), _plain(device, scale), _batch(device)
    step = step_of(layer, batch)
    found, executed, stored = step(), watch(step), read_storage(layer)
    operators = [name for name in _INT8_OPERATORS if name in executed.operators]
    evidence = ", ".join([f"{layer.weight.dtype} weights".removeprefix("torch."), *operators])
    if stored.bits != 8 or not operators:
        return Attempt(ran=False, evidence=evidence)
    exact = with_gradients(lambda value: value @ _weight().to(value).t() * scale, cast(batch, torch.float64))
    outliers = tuple(_outliers(found["output"], exact["output"], *limits) for limits in _INT8_LIMITS)
    speed = paired(step, step_of(plain, batch), "bfloat16 linear")
    return Attempt(ran=True, evidence=evidence, exactness=outliers, speed=speed)


def _outliers(found: Tensor, exact: Tensor, atol: float, rtol: float, bound: float) -> Exactness:
    close = torch.isclose(found.double(), exact, atol=atol, rtol=rtol)
    return Exactness(
        what=f"share of outputs outside atol {atol}, rtol {rtol}",
        error=float((~close).double().mean()),
        bound=bound,
        source="bitsandbytes, tests/test_autograd.py (test_matmullt)",
    )


def _fused(device: str) -> Attempt:
    """One token without gradients, where the product is fused with the dequantisation: the shape of decoding."""
    layer, plain = _fourbit(device, "nf4", double=True).eval(), _plain(device)
    token = _batch(device)["input"][:1]
    restored = _restored(layer)
    if device == "cpu" and not getattr(layer, "support_avx512bf16_for_cpu", False):
        raise UnavailableError(
            "bitsandbytes has a fused 4-bit product for CPUs with AVX512_BF16 only, and this is none"
        )

    @torch.no_grad()
    def step() -> Tensor:
        output: Tensor = layer(token)
        return output

    found, executed = step(), watch(step)
    fused = "bitsandbytes::gemv_4bit" if device == "cpu" else "BNB-GEMM4"
    seen = {**executed.operators, **executed.kernels}
    evidence = ", ".join(sorted(name for name in seen if name.startswith(("bitsandbytes::", "BNB-"))))
    dequantised = any(name.startswith("BNB-DEQ-NF4") or name == "bitsandbytes::dequantize_4bit" for name in seen)
    if fused not in seen or dequantised:
        return Attempt(ran=False, evidence=evidence or "no 4-bit operator")
    exact = {"output": token.double() @ restored.double().t()}

    @torch.no_grad()
    def plainly() -> Tensor:
        output: Tensor = plain(token)
        return output

    speed = paired(step, plainly, "bfloat16 linear")
    return Attempt(ran=True, evidence=evidence, exactness=relative({"output": found}, exact, ("output",)), speed=speed)


TRIES: Mapping[str, Try] = {
    "NF4": partial(_quantised, quant_type="nf4", double=False),
    "FP4": partial(_quantised, quant_type="fp4", double=False),
    "int8": _int8,
    "double quantisation": partial(_quantised, quant_type="nf4", double=True),
    "fused 4-bit GEMM": _fused,
}
