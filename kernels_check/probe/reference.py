"""References in double precision, and how far a path in bfloat16 may be from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kernels_check.probe.result import Exactness

Outputs: TypeAlias = Mapping[str, Tensor]

_FLASH_TESTS = "flash-attention, tests/test_flash_attn.py: {factor} times the error of the same mathematics in bfloat16"
_TORCH_BFLOAT16 = 1.6e-2
"""``torch.testing.assert_close``, relative tolerance of bfloat16."""


def step_of(function: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> Callable[[], Outputs]:
    """A forward and a backward pass: output of ``function``, and the gradient of each input for a fixed direction.

    All that is not ``function`` is made here, so that calls can be timed. The output has the shape of the first input.
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    first = next(iter(inputs.values()))
    direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(3)).to(first)

    def step() -> Outputs:
        output = function(*leaves.values())
        gradients = torch.autograd.grad(output, list(leaves.values()), direction)
        return {"output": output.detach(), **{f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}}

    return step


def with_gradients(function: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> Outputs:
    """One such step."""
    return step_of(function, inputs)()


def cast(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same values in another precision."""
    return {name: value.to(dtype) for name, value in inputs.items()}


def against_same_precision(found: Outputs, plain: Outputs, exact: Outputs) -> tuple[Exactness, ...]:
    """The rule of flash-attention: 2 times (gradients 3 times) the largest error of the plain path, and 1e-5.

    A bound in absolute numbers would depend on the sizes; the plain path in the same precision carries them.
    """
    comparisons = []
    for name, truth in exact.items():
        factor = 2 if name == "output" else 3
        allowed = factor * _largest(plain[name], truth) + 1e-5
        comparisons.append(
            Exactness(
                what=f"largest error of {name}",
                error=_largest(found[name], truth),
                bound=allowed,
                source=_FLASH_TESTS.format(factor=factor),
            )
        )
    return tuple(comparisons)


def relative(found: Outputs, exact: Outputs, names: Sequence[str] = ("output", "dinput")) -> tuple[Exactness, ...]:
    """Relative error in the Frobenius norm, against torch's own tolerance for bfloat16."""
    return tuple(
        Exactness(
            what=f"relative error of {name}",
            error=float((found[name].double() - exact[name].double()).norm() / exact[name].double().norm()),
            bound=_TORCH_BFLOAT16,
            source="torch.testing.assert_close, bfloat16",
        )
        for name in names
    )


def mean_error(found: Tensor, exact: Tensor, *, scale: float) -> Exactness:
    """Mean error of a product with quantised weights against the unquantised, scaled to weights of 1/sqrt(inputs)."""
    error = float((found.double() - exact).abs().mean()) * scale
    source = "bitsandbytes, tests/test_autograd.py (test_matmul_4bit)"
    return Exactness(what="mean error of the product", error=error, bound=0.115, source=source)


def update(found: Sequence[Tensor], exact: Sequence[Tensor]) -> Exactness:
    """Parameters after some optimizer steps, by the tolerance of bitsandbytes for float32: 1e-6 and 1e-5 relative."""
    excess = max(
        float(((value.double().cpu() - truth.cpu()).abs() / (1e-6 + 1e-5 * truth.cpu().abs())).max())
        for value, truth in zip(found, exact, strict=True)
    )
    source = "bitsandbytes, tests/test_optim.py: atol 1e-6, rtol 1e-5 in float32"
    return Exactness(what="largest error of a parameter, in tolerances", error=excess, bound=1.0, source=source)


def _largest(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).abs().max())
