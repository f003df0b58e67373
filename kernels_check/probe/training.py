"""Optimizers, TF32, compilation and Liger, tried on small real layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels_check.probe.attempt import (
    Executed,
    Try,
    against_same_precision,
    cast,
    paired,
    step_of,
    update,
    watch,
    with_gradients,
)
from kernels_check.probe.result import Attempt, Exactness

_SIZE, _STEPS = 512, 10
_TF32_ERROR = (3e-5, 1e-3)
"""Relative error of a product of 1024 x 1024: float32 has 2.5e-7, TF32 2.9e-4, bfloat16 2.4e-3."""


class _Updates:
    """The same gradients given to an optimizer, step by step; parameters large enough to be paged."""

    def __init__(self, device: str, dtype: torch.dtype, make: Callable[[list[Tensor]], Any]) -> None:
        generator = torch.Generator().manual_seed(17)
        start = [torch.randn(_SIZE, _SIZE, generator=generator), torch.randn(_SIZE, generator=generator)]
        self._gradients = [
            [torch.randn(value.shape, generator=generator).to(device, dtype) for value in start] for _ in range(_STEPS)
        ]
        self.parameters = [value.to(device, dtype).requires_grad_() for value in start]
        self.optimizer = make(self.parameters)

    def run(self) -> list[Tensor]:
        for gradients in self._gradients:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            self.optimizer.step()
        return [value.detach() for value in self.parameters]


def _adamw(parameters: list[Tensor], **options: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-3, **options)


def _updated(device: str, make: Callable[[list[Tensor]], Any], proof: Callable[[Any, Executed], str | None]) -> Attempt:
    loop = partial(_adamw, foreach=False, fused=False)
    exact = _Updates("cpu", torch.float64, loop).run()
    found = _Updates(device, torch.float32, make).run()
    watched = _Updates(device, torch.float32, make)
    executed = watch(watched.run)
    proved = proof(watched.optimizer, executed)
    names = [name for name in executed.operators if name.startswith(("aten::_fused_", "bitsandbytes::", "aten::addc"))]
    evidence = ", ".join(sorted(names)) or "no update operator that is known"
    if proved is None:
        return Attempt(ran=False, evidence=evidence)
    plain = _Updates(device, torch.float32, loop)
    speed = paired(watched.run, plain.run, "loop over tensors")
    return Attempt(ran=True, evidence=f"{proved}, {evidence}", exactness=(update(found, exact),), speed=speed)


def _paged(device: str) -> Attempt:
    import bitsandbytes as bnb

    def proof(optimizer: Any, executed: Executed) -> str | None:
        state = [value for held in optimizer.state.values() for value in held.values() if isinstance(value, Tensor)]
        paged = sum(value.nbytes for value in state if getattr(value, "is_paged", False) is True)
        return f"{paged / sum(value.nbytes for value in state):.0%} of the state paged" if paged else None

    return _updated(device, partial(bnb.optim.PagedAdamW32bit, lr=1e-3), proof)


def _fused(device: str) -> Attempt:
    def proof(optimizer: Any, executed: Executed) -> str | None:
        kernel = device == "cpu" or executed.kernels.get("OPT-TORCH-FUSED", 0)
        return f"{executed.operators['aten::_fused_adamw_']} updates" if _has_fused(executed) and kernel else None

    return _updated(device, partial(_adamw, fused=True), proof)


def _has_fused(executed: Executed) -> bool:
    return executed.operators.get("aten::_fused_adamw_", 0) > 0


def _tf32(device: str) -> Attempt:
    generator = torch.Generator().manual_seed(23)
    left, right = (torch.randn(1024, 1024, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    first, second = left.to("cuda"), right.to("cuda")  # raises without CUDA, in torch's own words

    def product(precision: str) -> Tensor:
        with _matmul_precision(precision):
            return first @ second

    found, executed = product("tf32").cpu(), watch(partial(product, "tf32"))
    evidence = ", ".join(f"{count} {rule}" for rule, count in executed.kernels.items())
    error = float((found.double() - exact).norm() / exact.norm())
    if not executed.kernels.get("GEMM-TF32") and error < _TF32_ERROR[0]:
        return Attempt(ran=False, evidence=f"{evidence}, relative error {error:.1e}: that of float32")
    low, high = _TF32_ERROR
    source = "products of 10-bit mantissas, simulated; float32 lies below the window, bfloat16 above it"
    exactness = Exactness(what="relative error of a product", error=error, least=low, bound=high, source=source)
    speed = paired(partial(product, "tf32"), partial(product, "ieee"), "float32 product")
    return Attempt(ran=True, evidence=evidence, exactness=(exactness,), speed=speed)


@contextmanager
def _matmul_precision(wanted: str) -> Iterator[None]:
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = wanted
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _feed_forward() -> Any:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(29)
    return LlamaMLP(LlamaConfig(hidden_size=256, intermediate_size=768)).requires_grad_(False)


def _compared(
    device: str, plain: Any, fast: Callable[[Tensor], Tensor], proof: Callable[[Executed], list[str]]
) -> Attempt:
    """Compare a faster version of a module with the module, in bfloat16, and with itself in double precision."""
    tokens = torch.randn(256, 256, generator=torch.Generator().manual_seed(31))
    batch = {"input": tokens.to(device, torch.bfloat16)}
    exactly = deepcopy(plain).double()
    step = step_of(fast, batch)
    found = step()
    proved = proof(watch(step))
    if not proved:
        return Attempt(ran=False, evidence="the eager module")
    exact = with_gradients(exactly, cast(batch, torch.float64))
    comparisons = against_same_precision(found, with_gradients(plain, batch), exact)
    speed = paired(step, step_of(plain, batch), "eager module")
    return Attempt(ran=True, evidence=", ".join(proved), exactness=comparisons, speed=speed)


def _compiled(device: str) -> Attempt:
    plain = _feed_forward().to(device, torch.bfloat16)

    def proof(executed: Executed) -> list[str]:
        marks = ("Torch-Compiled Region", "## Call CompiledFxGraph")
        regions = [name for name in executed.operators if name.startswith(marks[0])]
        graphs = [name for name in executed.operators if name.startswith(marks[1])]
        return [f"{len(regions)} compiled region", f"{len(graphs)} Inductor graphs"] if regions and graphs else []

    try:
        return _compared(device, plain, torch.compile(plain), proof)
    finally:
        torch.compiler.reset()


def _liger(device: str) -> Attempt:
    from importlib import import_module

    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    fast = import_module("liger_kernel.transformers.rms_norm").LigerRMSNorm
    plain = LlamaRMSNorm(256).requires_grad_(False).to(device, torch.bfloat16)

    def proof(executed: Executed) -> list[str]:
        return [f"{executed.kernels['LIGER']} Liger kernels"] if executed.kernels.get("LIGER") else []

    return _compared(device, plain, fast(256).requires_grad_(False).to(device, torch.bfloat16), proof)


TRIES: Mapping[str, Try] = {
    "paged optimizer": _paged,
    "fused optimizer": _fused,
    "tf32": _tf32,
    "compile": _compiled,
    "Liger": _liger,
}
