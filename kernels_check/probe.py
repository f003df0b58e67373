"""``python -m kernels_check probe``: which fast paths this machine runs, how exact, and why the others do not run.

Each path is tried on a small real layer, forward and backward. It counts as run only by the operators, kernels or
stored bytes that it left; that it was accepted without complaint proves nothing. Its results are compared with the same
mathematics in float64, by the relative error in the Frobenius norm.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask
from torch.profiler import ProfilerActivity, profile

from kernels_check.judges.attention import KERNEL_BACKENDS
from kernels_check.observe.base import wrapped_storage
from kernels_check.observe.modules import ModelTree, synchronise
from kernels_check.observe.profile import quiet_kineto
from kernels_check.rules import attention_backend, classify
from kernels_check.terminal import escape_control_chars

SCHEMA = 1
EXIT_FAILED = 4
_LIBRARIES = ("torch", "transformers", "bitsandbytes", "triton", "flash-attn", "flash-attn-4", "liger-kernel")
_BFLOAT16 = 1.6e-2
"""The relative tolerance of ``torch.testing.assert_close`` in bfloat16."""
Outputs: TypeAlias = Mapping[str, Tensor]


class Executed(NamedTuple):
    """What one call executed, by name."""

    operators: Mapping[str, int]
    kernels: Mapping[str, int]
    """Launches by rule; ``unclassified`` for names that no rule knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What came of one path."""

    ran: bool
    evidence: str | None = None
    """The operators, kernels or stored bytes that prove it, or what was there instead."""
    reason: str | None = None
    """Why it was refused, in the words of the library that raised or warned."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Relative error of the output and of each gradient."""
    bound: float = _BFLOAT16

    @property
    def status(self) -> Literal["exact", "inexact", "claimed", "unavailable"]:
        """``exact``: ran, within its bound. ``inexact``: ran, outside it, or with an error that is no number.
        ``claimed``: accepted in silence, and did not run, which misleads a user. ``unavailable``: refused."""
        if not self.ran:
            return "claimed" if self.reason is None else "unavailable"
        return "exact" if self.errors and all(error <= self.bound for error in self.errors.values()) else "inexact"

    def to_json(self) -> dict[str, Any]:
        """Its fields and its status; an error that is no finite number is null, which JSON lacks."""
        errors = {what: error if math.isfinite(error) else None for what, error in self.errors.items()}
        return {"status": self.status, **asdict(self), "errors": errors}


Try: TypeAlias = Callable[[str], Attempt]
"""From the device to what came of it."""
Proof: TypeAlias = Callable[[Executed], tuple[bool, str]]
"""From what was executed to whether the path ran, and the evidence."""


def run(arguments: argparse.Namespace) -> int:
    """Probe, print the table or one JSON document, and return 4 if a path was inexact or claimed to run and did not."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers would look for attention kernels on the hub
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for name, path in PATHS.items():
        print(f"kernels_check probe: {name}", file=sys.stderr)
        found[name] = attempt(path, device)
    machine = {
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: metadata.version(name) for name in _LIBRARIES if find_spec(name.replace("-", "_"))},
    }
    failed = [name for name, one in found.items() if one.status in ("inexact", "claimed")]
    if arguments.json:
        paths = [{"name": name, **one.to_json()} for name, one in found.items()]
        print(json.dumps({"schema": SCHEMA, "machine": machine, "failed": failed, "paths": paths}, indent=2))
    else:
        _show(found, machine, failed)
    return EXIT_FAILED if failed else 0


def attempt(path: Try, device: str) -> Attempt:
    """Try one path: an exception, or a warning where it did not run, is the reason why it cannot run."""
    with _warnings_collected() as warned:
        try:
            found = path(device)
        except Exception as error:
            return Attempt(ran=False, reason=" ".join(f"{type(error).__name__}: {error}".split()))
    reasons = [" ".join(words.split()) for words in warned if _ADMITS.search(words)]
    return found if found.ran or not reasons else replace(found, reason=reasons[0])


_MARKS = {
    "exact": "[green]ran, exact[/]",
    "inexact": "[red]ran, INEXACT[/]",
    "claimed": "[red]CLAIMED, did not run[/]",
    "unavailable": "[yellow]cannot run[/]",
}


def _show(found: Mapping[str, Attempt], machine: Mapping[str, Any], failed: Iterable[str]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("path", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("evidence, or why not", overflow="fold", ratio=3)
    table.add_column("largest relative error", overflow="fold", ratio=1)
    for name, one in found.items():
        words = escape(escape_control_chars((one.reason or one.evidence or "")[:240]))
        table.add_row(name, _MARKS[one.status], words, _largest_error(one))
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    heading = f"{machine['device']} ({machine['name']}, {machine['cpu_capability']}); {versions}"
    console.print(escape_control_chars(heading), markup=False)
    console.print(table)
    verdict = f"wrong: {', '.join(failed)}" if failed else "each that ran agrees with float64"
    console.print(f"{sum(one.ran for one in found.values())} of {len(found)} paths ran; {verdict}")


def _largest_error(one: Attempt) -> str:
    if not one.errors:
        return ""
    what, error = max(one.errors.items(), key=lambda item: (math.isnan(item[1]), item[1]))
    return f"{what}: {error:.2g} {'≤' if error <= one.bound else '>'} {one.bound:.2g}"


_LOGGERS = ("transformers", "bitsandbytes", "torch", "liger_kernel")
_ADMITS = re.compile(
    r"not (been )?(support|avail|align|install|implement|compiled)|fall(s|ing)?[ -]?back|instead|unable|cannot|"
    r"disabled|unfused|requires",
    re.IGNORECASE,
)
"""How a library warns that it does something else than what was required."""


@contextmanager
def _warnings_collected() -> Iterator[list[str]]:
    """Collect warnings and logged warnings instead of showing them; deprecations are not about a path."""
    words: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: words.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield words
            unrelated = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
            words += [str(one.message) for one in caught if not issubclass(one.category, unrelated)]
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


def execute(call: Callable[[], object]) -> Executed:
    """Run ``call`` under the profiler; again where CUDA is in use and no kernel was recorded (a race in CUPTI)."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    operators, kernels = Counter[str](), Counter[str]()
    for _ in range(2):
        synchronise()
        with quiet_kineto(), profile(activities=activities) as recorded:
            call()
            synchronise()
        result: Any = getattr(recorded.profiler, "kineto_results", None)
        operators.clear()
        for event in result.events() if result is not None else ():
            if event.device_type() == DeviceType.CPU:
                operators[event.name()] += 1
            elif not event.is_user_annotation():
                rule = classify(event.name())
                kernels["unclassified" if rule is None else rule.name] += 1
        if kernels or not torch.cuda.is_initialized():
            break
    return Executed(operators, kernels)


def step_of(function: Callable[..., Tensor], inputs: Outputs) -> Callable[[], Outputs]:
    """A forward and a backward pass: the output of ``function``, and the gradient of each input for a fixed direction.

    The output has the shape of the first input.
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    first = next(iter(inputs.values()))
    direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(3)).to(first)

    def step() -> Outputs:
        output = function(*leaves.values())
        gradients = torch.autograd.grad(output, list(leaves.values()), direction)
        return {"output": output.detach(), **{f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}}

    return step


def judge(
    fast: Callable[..., Tensor],
    exactly: Callable[..., Tensor],
    inputs: Outputs,
    proof: Proof,
    bound: float = _BFLOAT16,
) -> Attempt:
    """Run ``fast``, forward and backward, and compare it with ``exactly``, which is given the inputs in float64."""
    step = step_of(fast, inputs)
    found = step()  # which also compiles
    ran, evidence = proof(execute(step))
    if not ran:
        return Attempt(ran=False, evidence=evidence)
    truth = step_of(exactly, {name: value.double() for name, value in inputs.items()})()
    errors = {name: relative_error(found[name], truth[name]) for name in truth}
    return Attempt(ran=True, evidence=evidence, errors=errors, bound=bound)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """In the Frobenius norm."""
    return float((found.detach().to(truth) - truth).norm() / truth.norm())


def _random(device: str, *shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)


_HEADS, _TOKENS, _HEAD_SIZE = 4, 256, 64


def _attend_exactly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, [rows, heads, tokens, head size]."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(_HEAD_SIZE)
    future = scores.new_ones(_TOKENS, _TOKENS).triu(1).bool()
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ value


def _attention(device: str, *, backend: str, implementation: str = "sdpa", only: str | None = None) -> Attempt:
    """Attention as a Llama layer of transformers calls it, in bfloat16; ``only``: the one backend that SDPA may use."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = LlamaConfig(
        vocab_size=32, hidden_size=_HEADS * _HEAD_SIZE, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=_HEADS, num_key_value_heads=_HEADS,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.bfloat16)
    layer: Any = model.to(device).train().model.layers[0].self_attn
    forward, mask = ALL_ATTENTION_FUNCTIONS[implementation], None
    if implementation == "flex_attention":
        causal: Any = lambda batch, head, query, key: query >= key  # noqa: E731
        mask = create_block_mask(causal, None, None, _TOKENS, _TOKENS, device=device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with nullcontext() if only is None else sdpa_kernel(getattr(SDPBackend, only)):
            output: Tensor = forward(layer, query, key, value, mask, scaling=layer.scaling, dropout=0.0)[0]
        return output.transpose(1, 2)

    def proof(executed: Executed) -> tuple[bool, str]:
        by_operator = {attention_backend(name) for name in executed.operators} - {None}
        by_kernel = {KERNEL_BACKENDS[rule] for rule in executed.kernels if rule in KERNEL_BACKENDS}
        # Where kernels show the version of flash, they overrule its operator, which is the same for all.
        if "flash" in by_operator and by_kernel & {"flash_attention_3", "flash_attention_4"}:
            by_operator.discard("flash")
        names = sorted(name for name in executed.operators if attention_backend(name) and "ackward" not in name)
        names += sorted(rule for rule in executed.kernels if rule.startswith("ATT-"))
        return by_operator | by_kernel == {backend}, ", ".join(names) or "no attention operator or kernel"

    shape = 2, _HEADS, _TOKENS, _HEAD_SIZE
    inputs = {name: _random(device, *shape, seed=seed) for seed, name in enumerate("qkv", 11)}
    return judge(attend, _attend_exactly, inputs, proof)


_WEIGHTS = 1024
_QUANTISATION = {"nf4": 0.11, "fp4": 0.15, "int8": 0.03}
"""Largest relative error of a product with normal weights after quantisation."""


def _weight() -> Tensor:
    return _random("cpu", _WEIGHTS, _WEIGHTS, seed=5)


def _fourbit(device: str, quant_type: str, *, double: bool) -> Any:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(_WEIGHTS, _WEIGHTS, bias=False, compute_dtype=torch.bfloat16)
    layer.weight = bnb.nn.Params4bit(
        _weight(), requires_grad=False, compress_statistics=double, quant_type=quant_type, module=layer
    )
    return layer.to(device)


def _quantised(device: str, *, quant_type: str, double: bool = False) -> Attempt:
    layer = _fourbit(device, quant_type, double=double)
    stored = wrapped_storage(ModelTree.of(layer), layer)

    def proof(executed: Executed) -> tuple[bool, str]:
        names = sorted(name for name in executed.operators if name.startswith("bitsandbytes::"))
        evidence = [f"{stored.quant_type}", f"{stored.bits_per_weight or math.nan:.3f} bits a weight", *names]
        evidence += sorted(rule for rule in executed.kernels if rule.startswith("BNB-"))
        as_required = (stored.bits, stored.quant_type, stored.double_quant) == (4, quant_type, double)
        return as_required and any(name.startswith("bitsandbytes::ge") for name in names), ", ".join(evidence)

    return _judge_linear(device, layer, proof, _QUANTISATION[quant_type])


def _judge_linear(device: str, layer: Any, proof: Proof, bound: float) -> Attempt:
    """Compare a quantised layer with its weights before quantisation: another format has another error."""
    weight = _weight().to(device).double()
    return judge(
        layer, lambda value: value @ weight.t(), {"input": _random(device, 128, _WEIGHTS, seed=6)}, proof, bound
    )


def _int8(device: str) -> Attempt:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(_WEIGHTS, _WEIGHTS, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(_weight().half(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to(device)

    def proof(executed: Executed) -> tuple[bool, str]:
        known = ("MatMul8bitFp", "MatMul8bitLt", "bitsandbytes::int8_vectorwise_quant", "aten::_int_mm")
        names = [name for name in known if name in executed.operators]
        evidence = ", ".join([f"{layer.weight.dtype} weights".removeprefix("torch."), *names])
        return wrapped_storage(ModelTree.of(layer), layer).bits == 8 and bool(names), evidence

    return _judge_linear(device, layer, proof, _QUANTISATION["int8"])


def _fused_fourbit(device: str) -> Attempt:
    """One token without gradients, where the product is fused with the dequantisation: the shape of decoding."""
    layer = _fourbit(device, "nf4", double=True).eval()
    if device == "cpu" and not getattr(layer, "support_avx512bf16_for_cpu", False):
        raise RuntimeError("bitsandbytes has a fused 4-bit product for CPUs with AVX512_BF16 only, and this is none")
    token = _random(device, 1, _WEIGHTS, seed=6)
    with torch.no_grad():
        found, executed = layer(token), execute(lambda: layer(token))
    names = {**executed.operators, **executed.kernels}
    evidence = ", ".join(sorted(name for name in names if name.startswith(("bitsandbytes::", "BNB-"))))
    fused = "bitsandbytes::gemv_4bit" if device == "cpu" else "BNB-GEMM4"
    dequantised = any(name.startswith(("BNB-DEQ-NF4", "bitsandbytes::dequantize_4bit")) for name in names)
    if fused not in names or dequantised:
        return Attempt(ran=False, evidence=evidence or "no 4-bit operator")
    error = relative_error(found, token.double() @ _weight().to(device).double().t())
    return Attempt(ran=True, evidence=evidence, errors={"output": error}, bound=_QUANTISATION["nf4"])


def _updates(
    device: str, build: Callable[[list[Tensor]], Any], proof: Callable[[Any, Executed], str | None]
) -> Attempt:
    """Ten updates of an AdamW in float32, with the same gradients as in float64."""
    start = [_random("cpu", 512, 512, seed=17), _random("cpu", 512, seed=18)]
    gradients = [[_random("cpu", *value.shape, seed=step) for value in start] for step in range(10)]

    def update(values: list[Tensor], optimizer: Any) -> None:
        for given in gradients:
            for value, gradient in zip(values, given, strict=True):
                value.grad = gradient.to(value)
            optimizer.step()

    exact = [value.double().requires_grad_() for value in start]
    update(exact, _adamw(exact, foreach=False, fused=False))
    found = [value.to(device, torch.float32).requires_grad_() for value in start]
    optimizer = build(found)
    executed = execute(lambda: update(found, optimizer))
    proved = proof(optimizer, executed)
    names = [name for name in executed.operators if name.startswith(("aten::_fused_", "bitsandbytes::", "aten::addc"))]
    evidence = ", ".join(sorted(names)) or "no update operator that is known"
    if proved is None:
        return Attempt(ran=False, evidence=evidence)
    error = max(relative_error(value.cpu(), truth) for value, truth in zip(found, exact, strict=True))
    return Attempt(ran=True, evidence=f"{proved}, {evidence}", errors={"parameters": error}, bound=1e-5)


def _adamw(parameters: list[Tensor], **options: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-3, **options)


def _paged(device: str) -> Attempt:
    import bitsandbytes as bnb

    def proof(optimizer: Any, executed: Executed) -> str | None:
        state = [value for held in optimizer.state.values() for value in held.values() if hasattr(value, "nbytes")]
        paged = sum(value.nbytes for value in state if getattr(value, "is_paged", False) is True)
        return f"{paged / sum(value.nbytes for value in state):.0%} of the state paged" if paged else None

    return _updates(device, partial(bnb.optim.PagedAdamW32bit, lr=1e-3), proof)


def _fused_optimizer(device: str) -> Attempt:
    def proof(optimizer: Any, executed: Executed) -> str | None:
        updates = executed.operators.get("aten::_fused_adamw_", 0)
        return f"{updates} updates" if updates and (device == "cpu" or "OPT-TORCH-FUSED" in executed.kernels) else None

    return _updates(device, partial(_adamw, fused=True), proof)


def _tf32(device: str) -> Attempt:
    """A product of float32 matrices; the error of float32 is 2.5e-7, of TF32 2.9e-4, of bfloat16 2.4e-3."""
    left, right = (torch.randn(1024, 1024, generator=torch.Generator().manual_seed(seed)) for seed in (23, 24))
    first, second = left.to("cuda"), right.to("cuda")  # raises without CUDA, in torch's own words
    matmul: Any = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        found, executed = (first @ second).cpu(), execute(lambda: first @ second)
    finally:
        matmul.fp32_precision = before
    error = relative_error(found, left.double() @ right.double())
    evidence = f"{', '.join(executed.kernels)}, relative error {error:.1e}"
    return Attempt(ran=error > 3e-5, evidence=evidence, errors={"output": error}, bound=1e-3)


def _compiled(device: str) -> Attempt:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(29)
    plain: Any = LlamaMLP(LlamaConfig(hidden_size=256, intermediate_size=768)).requires_grad_(False)
    plain = plain.to(device, torch.bfloat16)

    def proof(executed: Executed) -> tuple[bool, str]:
        regions = sum(name.startswith("Torch-Compiled Region") for name in executed.operators)
        graphs = sum(name.startswith("## Call CompiledFxGraph") for name in executed.operators)
        return bool(regions and graphs), f"{regions} compiled regions, {graphs} Inductor graphs"

    try:
        exactly = deepcopy(plain).double()
        return judge(torch.compile(plain), exactly, {"input": _random(device, 256, 256, seed=31)}, proof)
    finally:
        torch.compiler.reset()


def _liger(device: str) -> Attempt:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    fast = import_module("liger_kernel.transformers.rms_norm").LigerRMSNorm(256).to(device, torch.bfloat16)

    def proof(executed: Executed) -> tuple[bool, str]:
        launches = executed.kernels.get("LIGER", 0)
        return bool(launches), f"{launches} Liger kernels"

    inputs = {"input": _random(device, 256, 256, seed=31)}
    exactly: Any = LlamaRMSNorm(256).requires_grad_(False).to(device).double()
    return judge(fast.requires_grad_(False), exactly, inputs, proof)


PATHS: Mapping[str, Try] = {
    "SDPA flash": partial(_attention, backend="flash", only="FLASH_ATTENTION"),
    "SDPA cuDNN": partial(_attention, backend="cudnn", only="CUDNN_ATTENTION"),
    "SDPA memory-efficient": partial(_attention, backend="efficient", only="EFFICIENT_ATTENTION"),
    "SDPA math": partial(_attention, backend="math", only="MATH"),
    "flash-attn 2 package": partial(_attention, backend="flash_attention_2", implementation="flash_attention_2"),
    "flash-attn 3 package": partial(_attention, backend="flash_attention_3", implementation="flash_attention_3"),
    "flash-attn 4 package": partial(_attention, backend="flash_attention_4", implementation="flash_attention_4"),
    "flex attention": partial(_attention, backend="flex", implementation="flex_attention"),
    "NF4": partial(_quantised, quant_type="nf4"),
    "FP4": partial(_quantised, quant_type="fp4"),
    "int8": _int8,
    "double quantisation": partial(_quantised, quant_type="nf4", double=True),
    "fused 4-bit GEMM": _fused_fourbit,
    "paged optimizer": _paged,
    "fused optimizer": _fused_optimizer,
    "tf32": _tf32,
    "compile": _compiled,
    "Liger": _liger,
}
