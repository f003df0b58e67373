"""Counts the memory of a training by kind: between its steps, and at the measured peak of an observed call.

Tensors that are resident between steps are counted one by one. Tensors that live during the step are tracked
(`LiveTensors`) and counted at the memory peak; memory that an operator used beyond its results at that point (a packed
weight, an accumulator) is visible in the peak around it. On the host the kernel counts the pages of code and of mapped
weights (proc_pid_smaps(5)). Objects of libraries and of the interpreter on the heap, and free memory that malloc keeps,
are not counted: they are most of the unexplained remainder.

A dispatch mode sees the results of every operator and keeps a weak reference to each storage: its bytes count while it
lives. Autograd's hooks (torch.autograd.graph.saved_tensors_hooks) see the tensors saved for the backward pass: with
checkpointing these are the inputs of blocks, not the recomputed tensors. Views share a storage and count once; memory
that an operator allocates and frees itself is not seen. A compiled step runs without the dispatch mode, which would
disable the compiled code: then only saved tensors and gradients are seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels_check.observe.base import quantisation_parts
from lorameter.machine.host import PeakMemoryTracker, host_bytes
from lorameter.records.record import MemoryAccount, MemoryPhase, order_memory_kinds
from lorameter.trial.process import give_back_free


def resident_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Exact bytes that are resident between steps, by kind; tied tensors count once, sharded ones with the part on this
    rank.

    `base_weight_bytes` and `quantization_state_bytes` (constants of 4-bit and 8-bit layers) are the frozen base,
    `adapter_bytes` all parameters that train, `gradient_bytes` the current gradients, `optimizer_state_bytes` all state
    of the optimizer, and `paged_optimizer_state_bytes` the part of that state in managed memory.
    """
    sizes = {
        kind: sum(tensor.nbytes for tensor in tensors) for kind, tensors in resident_tensors(model, optimizer).items()
    }
    trained, paged, gradients, state, quantization = (
        sizes.pop(kind)
        for kind in ("adapter", "paged_optimizer_state", "gradients", "optimizer_state", "quantization_state")
    )
    return {
        "base_weight_bytes": sum(sizes.values()),
        "quantization_state_bytes": quantization,
        "adapter_bytes": trained,
        "gradient_bytes": gradients,
        "optimizer_state_bytes": state + paged,
        "paged_optimizer_state_bytes": paged,
    }


def resident_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, list[torch.Tensor]]:
    """Tensors that are resident between steps, by kind (`lorameter.records.record.MEMORY_KINDS`); each storage
    counts once.

    Embeddings (with the output head), norms and frozen buffers are distinguished by type.
    """
    addresses: set[int] = set()
    kinds: dict[str, list[torch.Tensor]] = {"linear_weights": []}
    head = output_head(model)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                kind = _kind(module, parameter, head)
                kinds.setdefault(kind, []).extend(_take_new((parameter,), addresses))
    kinds["adapter"] = list(_take_new((p for p in model.parameters() if p.requires_grad), addresses))
    for buffer in _take_new(model.buffers(), addresses):
        kinds.setdefault(f"buffers_{_name(buffer)}", []).append(buffer)
    kinds["quantization_state"] = list(_take_new(_quantization_state(model), addresses))
    kinds["gradients"] = [_local_part(p.grad) for p in model.parameters() if p.grad is not None]
    states = () if optimizer is None else optimizer.state.values()
    entries = (item for values in states for item in values.values())
    # Tables are shared.
    state = list(_take_new((item for item in entries if isinstance(item, torch.Tensor)), addresses))
    kinds["paged_optimizer_state"] = [item for item in state if getattr(item, "is_paged", False)]
    kinds["optimizer_state"] = [item for item in state if not getattr(item, "is_paged", False)]
    return kinds


def storage_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's storage; for a view this is the storage of the larger tensor."""
    return int(tensor.untyped_storage().nbytes())


def output_head(model: torch.nn.Module) -> torch.nn.Module | None:
    """The base's output head, also if an adapter is on it; None if the model has none."""
    getter = getattr(model, "get_output_embeddings", None)  # transformers' and PEFT's models have it
    head = None if getter is None else getter()
    return getattr(head, "base_layer", head)  # PEFT's layer wraps it


def _kind(module: torch.nn.Module, parameter: torch.Tensor, head: torch.nn.Module | None) -> str:
    if module is head or isinstance(module, torch.nn.Embedding):
        return f"embeddings_{_name(parameter)}"
    if isinstance(module, torch.nn.Linear) or parameter.dim() > 1:  # Conv1D, GPT-2's linear layer, is not a Linear
        return "linear_weights"
    return f"norms_{_name(parameter)}"


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _quantization_state(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        parts = (part for name, part in quantisation_parts(module) if name != "CB")  # that is the weight itself
        yield from (part for part in parts if isinstance(part, torch.Tensor))


def _take_new(tensors: Iterable[torch.Tensor], addresses: set[int]) -> Iterator[torch.Tensor]:
    for tensor in map(_local_part, tensors):
        key = tensor.untyped_storage().data_ptr()
        if key not in addresses:
            addresses.add(key)
            yield tensor


def _local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The local part of a sharded tensor; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """Resident bytes of this process, and the part mapped from files or generated code."""

    resident_bytes: int
    files: Mapping[str, int]
    """Bytes by path."""
    generated_bytes: int
    """Anonymous executable pages: code generated by a library, as oneDNN does for each new shape."""
    ranges: tuple[tuple[int, int, str], ...]
    """First address, end and path of each mapping."""


def read_pages() -> Pages:
    """Read the mappings of this process; takes milliseconds. First returns malloc's free memory to the system."""
    give_back_free()
    resident_bytes = host_bytes("VmRSS")  # first, since the list of the mappings takes megabytes itself
    files: Counter[str] = Counter()
    ranges: list[tuple[int, int, str]] = []
    generated = 0
    for mapping in psutil.Process().memory_maps(grouped=False):
        if mapping.path.startswith("/"):
            first, _, end = mapping.addr.partition("-")
            ranges.append((int(first, 16), int(end, 16), mapping.path))
            files[mapping.path] += mapping.rss
        elif mapping.path == "[anon]" and "x" in mapping.perms:  # the kernel's own pages have names
            generated += mapping.rss
    return Pages(resident_bytes=resident_bytes, files=files, generated_bytes=generated, ranges=tuple(ranges))


# --- live tensors -----------------------------------------------------------------------------------------------------

KIND_ORDER = ("temporaries", "activations", "gradients", "kv_cache", "logits")
"""A storage's kind can only rise in this order: a temporary becomes an activation when it is saved."""


class LiveTensors(TorchDispatchMode):
    """Bytes of live storages by kind, without the resident ones; a dispatch mode that sees the results of all
    operators."""

    def __init__(
        self, *, resident: Collection[int], vocabulary: int, device: str, on_change: Callable[[dict[str, int]], None]
    ) -> None:
        """Count tensors, and call `on_change` with the counts.

        Args:
            resident: addresses of storages that are counted elsewhere.
            vocabulary: a tensor with this last dimension counts as logits.
            device: tensors on other devices are not counted.
            on_change: called with the bytes by kind after each operator; it must not change them.
        """
        super().__init__()
        self._resident = resident
        self._vocabulary = vocabulary
        self._device = torch.device(device).type
        self._on_change = on_change
        self._alive: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self.bytes: dict[str, int] = dict.fromkeys(KIND_ORDER, 0)
        """Bytes that are currently alive."""

    def count(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor's storage under this kind, unless it has a higher kind."""
        if tensor.device.type != self._device or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._resident:
            return
        if tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary:
            kind = "logits"
        key = id(storage)
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._forget(key)), kind, storage.nbytes()
            self.bytes[kind] += storage.nbytes()
            return
        reference, before, size = self._alive[key]
        if KIND_ORDER.index(kind) > KIND_ORDER.index(before):
            self._alive[key] = reference, kind, size
            self.bytes[before] -= size
            self.bytes[kind] += size

    def _forget(self, key: int) -> None:
        _, kind, size = self._alive.pop(key)
        self.bytes[kind] -= size

    @contextlib.contextmanager
    def watching(self, parameters: Sequence[torch.nn.Parameter], *, compiled: bool = False) -> Iterator[None]:
        """Track a step with these trained parameters."""
        with contextlib.ExitStack() as stack:
            for parameter in parameters:
                stack.callback(parameter.register_post_accumulate_grad_hook(self._accumulated).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor))
            if not compiled:
                stack.enter_context(self)
            yield

    def _saved(self, tensor: torch.Tensor) -> torch.Tensor:
        self.count(tensor, "activations")
        self._on_change(self.bytes)
        return tensor.detach()  # the tensor itself would form a reference cycle, which only garbage collection frees

    def _accumulated(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.count(parameter.grad, "gradients")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator and count its results."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf, "temporaries")
        self._on_change(self.bytes)
        return result


# --- the account ------------------------------------------------------------------------------------------------------

WATCHED: dict[MemoryPhase, tuple[str, ...]] = {
    "train": ("activations", "logits", "gradients"),
    "generate": ("kv_cache", "logits"),
}
"""Kinds that a phase's breakdown lists even if no tensor of the kind was alive at the peak."""


def measure_breakdown(
    model: Any,
    optimizer: torch.optim.Optimizer,
    call: Callable[[], object],
    *,
    initial_pages: Pages,
    device: str,
    phase: MemoryPhase = "train",
    compiled: bool = False,
) -> MemoryAccount:
    """Measure the memory of one call: a training step, or a request.

    The call is observed operator by operator, takes several times as long and must not be timed. The caller restores
    the model. At least one step must have run before in this process; otherwise one-time allocations (optimizer state,
    code used for the first time) would count as temporary.

    Args:
        model: a PEFT model, or a plain transformers model.
        optimizer: its state and existing gradients count as resident; clear both before a request is observed.
        call: runs the whole phase; gradients that it leaves behind stay.
        initial_pages: result of `read_pages()` before the model was loaded.
        device: torch device type.
        phase: phase of `call`.
        compiled: whether the step was compiled; see `LiveTensors`.
    """
    cuda, tensors = device.startswith("cuda"), resident_tensors(model, optimizer)
    kinds = {kind: sum(map(storage_bytes, found)) for kind, found in tensors.items()}
    resident = [tensor for found in tensors.values() for tensor in found]
    tracker, gauge = _PeakTracker(cuda=cuda), PeakMemoryTracker(device)
    vocabulary = model.get_input_embeddings().weight.shape[0] if hasattr(model, "get_input_embeddings") else 0
    live = LiveTensors(
        resident={tensor.untyped_storage().data_ptr() for tensor in resident}, vocabulary=int(vocabulary),
        device=device, on_change=tracker.update,
    )  # fmt: skip
    give_back_free()  # otherwise this step would reuse the heap of earlier ones, and its own peak would be hidden
    gauge.begin()
    tracker.update(live.bytes)  # the peak before the first operator
    with contextlib.ExitStack() as stack:
        for hook in watch_cache(model, live):
            stack.callback(hook.remove)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        stack.enter_context(live.watching(trained, compiled=compiled))
        call()
    peaks = gauge.peaks(phase)
    kinds |= {kind: kinds.get(kind, 0) + size for kind, size in tracker.kinds.items()}
    outside_allocator: dict[str, int] = {}
    if cuda:
        peak = peaks[f"device_peak_allocated_{phase}_bytes"]
        kinds |= _allocator_bytes()
        outside_allocator["fragmentation"] = peaks[f"device_peak_reserved_{phase}_bytes"] - peak
        outside_allocator["paged_optimizer_state"] = kinds.pop("paged_optimizer_state", 0)
    else:
        peak = peaks[f"host_peak_{phase}_bytes"]
        kinds |= _file_bytes(initial_pages, resident) | {"heap_growth": max(0, peak - tracker.peak)}
    return MemoryAccount(
        phase=phase,
        kinds=order_memory_kinds(kinds, named=WATCHED[phase]),
        peak_bytes=peak,
        outside_allocator=outside_allocator,
    )


class _PeakTracker:
    """The kinds of memory after the operator at which memory was highest.

    On CUDA that is the operator at which the allocator's peak last rose. On the host the resident set stays high after
    tensors are freed and grows while malloc serves small blocks, so it is the operator at which the live tensors plus
    the operator's own memory were largest, and any later growth is a separate kind.
    """

    def __init__(self, *, cuda: bool) -> None:
        self._cuda = cuda
        self._highest = 0
        self._most = -1
        self.peak = 0
        self.kinds: dict[str, int] = {}

    def update(self, kinds: dict[str, int]) -> None:
        """Keep the current kinds if their sum is the largest so far."""
        peak = torch.cuda.max_memory_allocated() if self._cuda else host_bytes("VmHWM")
        scratch = 0
        if peak > self._highest:
            now = torch.cuda.memory_allocated() if self._cuda else host_bytes("VmRSS")
            scratch = max(0, peak - now)
        self._highest = peak
        most = peak if self._cuda else sum(kinds.values()) + scratch
        if most > self._most:
            self._most, self.peak = most, peak
            self.kinds = kinds | {"operator_scratch": scratch}


def _file_bytes(initial_pages: Pages, resident: Collection[torch.Tensor]) -> dict[str, int]:
    """Kinds of memory outside torch: pages of files and of code."""
    now, mapped = read_pages(), Counter[str]()
    for tensor in resident:
        address = tensor.untyped_storage().data_ptr()
        path = next((path for first, end, path in now.ranges if first <= address < end), None)
        if path is not None:
            mapped[path] += storage_bytes(tensor)
    code, before = (
        sum(size for path, size in pages.files.items() if path not in mapped) for pages in (now, initial_pages)
    )
    return {
        "process": initial_pages.resident_bytes,
        "library_code": code - before,
        "generated_code": now.generated_bytes - initial_pages.generated_bytes,
        "checkpoint_pages": sum(now.files[path] - size for path, size in mapped.items()),
    }


def _allocator_bytes() -> dict[str, int]:
    """Memory that CUDA's allocator adds: rounding, from its own two counts, and the cuBLAS workspace."""
    stats, before = torch.cuda.memory_stats(), torch.cuda.memory_allocated()
    requested = stats.get("requested_bytes.all.current")
    rounding = {} if requested is None else {"rounding": int(stats["allocated_bytes.all.current"] - requested)}
    torch._C._cuda_clearCublasWorkspaces()
    return rounding | {"blas_workspace": before - torch.cuda.memory_allocated()}


def watch_cache(model: Any, live: LiveTensors) -> list[Any]:
    """Count the keys and values of each layer after its attention has updated them; returns the hooks to remove."""

    def mark(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        for tensor in cached_tensors(find_cache(kwargs), slice(module.layer_idx, module.layer_idx + 1)):
            live.count(tensor, "kv_cache")

    attentions = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    return [module.register_forward_hook(mark, with_kwargs=True) for module in attentions]


def find_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache in the arguments or the output of a forward pass; its name changed during transformers 5."""
    return next((found for name in ("cache", "past_key_values") if (found := arguments.get(name)) is not None), None)


def cached_tensors(cache: Any, layers: slice = slice(None)) -> list[torch.Tensor]:
    """The keys and values of these layers of a cache, by default of all."""
    chosen = getattr(cache, "layers", [])[layers]
    tensors = [getattr(layer, name, None) for layer in chosen for name in ("keys", "values")]
    return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
