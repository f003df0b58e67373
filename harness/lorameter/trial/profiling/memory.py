"""Breaks down the memory of a watched call into everything that can be counted towards its measured peak.

Tensors that are resident between steps are counted one by one. Tensors that live during the step are watched
(`LiveTensors`) and counted as they were where the memory was highest; memory that an operator held beyond its results
at that point (a packed weight, an accumulator) shows in the peak around it. On the host the kernel counts the pages of
code and of mapped weights (proc_pid_smaps(5)). Objects of libraries and of the interpreter on the heap, and free memory
that malloc keeps, are not counted: they are most of the unexplained remainder.

The results of every operator pass a dispatch mode, which keeps a weak reference to each storage: its bytes count while
it lives. Tensors that autograd saves for the backward pass pass its own hooks
(torch.autograd.graph.saved_tensors_hooks): under checkpointing these are the inputs of blocks, and not what will be
computed again. Views share a storage and count once; memory that an operator allocates and frees itself is not seen. A
compiled step runs without the mode, which would make it run uncompiled: only saved tensors and gradients are then seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorameter.machine.memory import PeakMemoryTracker, host_bytes
from lorameter.records.memory_account import MemoryAccount, MemoryPhase, in_order
from lorameter.trial.memory import resident_tensors, storage_bytes
from lorameter.trial.process import give_back_free


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """Resident bytes of this process, and the part of them that is mapped from files or generated code."""

    resident_bytes: int
    files: Mapping[str, int]
    """By path."""
    generated_bytes: int
    """Executable pages of no file: code that a library has generated, as oneDNN does for each new shape."""
    ranges: tuple[tuple[int, int, str], ...]
    """First address, end and path of each mapping."""

    def file_at(self, address: int) -> str | None:
        """Path of the file that is mapped at an address; None if there is none."""
        return next((path for first, end, path in self.ranges if first <= address < end), None)


def read_pages() -> Pages:
    """Read the mappings of this process; takes milliseconds. Free memory of malloc is returned to the system first."""
    give_back_free()
    files: Counter[str] = Counter()
    ranges: list[tuple[int, int, str]] = []
    generated = 0
    for one in psutil.Process().memory_maps(grouped=False):
        if one.path.startswith("/"):
            first, _, end = one.addr.partition("-")
            ranges.append((int(first, 16), int(end, 16), one.path))
            files[one.path] += one.rss
        elif one.path == "[anon]" and "x" in one.perms:  # the kernel's own pages have names
            generated += one.rss
    return Pages(resident_bytes=host_bytes("VmRSS"), files=files, generated_bytes=generated, ranges=tuple(ranges))


# --- live tensors -----------------------------------------------------------------------------------------------------

RANK = ("temporaries", "activations", "gradients", "kv_cache", "logits")
"""A storage's kind can only rise in this order: a temporary becomes an activation when it is saved."""


class LiveTensors(TorchDispatchMode):
    """Bytes of live storages by kind, without the resident ones; a dispatch mode, which sees the results of all
    operators."""

    def __init__(
        self, *, resident: Collection[int], vocabulary: int, device: str, looked: Callable[[dict[str, int]], None]
    ) -> None:
        """Count tensors, and report to `looked`.

        Args:
            resident: addresses of storages that are counted elsewhere.
            vocabulary: a tensor whose last dimension is this is one of logits.
            device: tensors elsewhere are not counted.
            looked: called with the bytes by kind after each operator; it must not change them.
        """
        super().__init__()
        self._resident = resident
        self._vocabulary = vocabulary
        self._device = torch.device(device).type
        self._looked = looked
        self._alive: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self.bytes: dict[str, int] = dict.fromkeys(RANK, 0)
        """Bytes that are alive now."""

    def note(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor's storage under this kind, unless it has a higher one."""
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
        if RANK.index(kind) > RANK.index(before):
            self._alive[key] = reference, kind, size
            self.bytes[before] -= size
            self.bytes[kind] += size

    def _forget(self, key: int) -> None:
        _, kind, size = self._alive.pop(key)
        self.bytes[kind] -= size

    @contextlib.contextmanager
    def watching(self, parameters: Sequence[torch.nn.Parameter], *, compiled: bool = False) -> Iterator[None]:
        """Watch a step on these trained parameters."""
        with contextlib.ExitStack() as stack:
            for parameter in parameters:
                stack.callback(parameter.register_post_accumulate_grad_hook(self._accumulated).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor))
            if not compiled:
                stack.enter_context(self)
            yield

    def _saved(self, tensor: torch.Tensor) -> torch.Tensor:
        self.note(tensor, "activations")
        self._looked(self.bytes)
        return tensor.detach()  # the tensor itself would be in a cycle, which only the collector frees

    def _accumulated(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.note(parameter.grad, "gradients")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator and counts its results."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf, "temporaries")
        self._looked(self.bytes)
        return result


# --- the account ------------------------------------------------------------------------------------------------------

WATCHED: dict[MemoryPhase, tuple[str, ...]] = {
    "train": ("activations", "logits", "gradients"),
    "generate": ("kv_cache", "logits"),
}
"""Kinds that a phase's breakdown lists even where no tensor of them was alive at the peak."""


def measure_breakdown(
    model: Any,
    optimizer: torch.optim.Optimizer,
    call: Callable[[], object],
    *,
    birth: Pages,
    device: str,
    phase: MemoryPhase = "train",
    compiled: bool = False,
) -> MemoryAccount:
    """The memory of one call: a training step that has been taken before, or a request for tokens.

    The call is watched operator by operator, takes several times as long and must not be timed. The caller restores the
    model. At least one step must have been taken before in this process, or one-time allocations (optimizer state, code
    touched for the first time) would count as temporary.

    Args:
        model: as PEFT makes it; a plain transformers model works too.
        optimizer: its state counts as resident, as do gradients that are there; clear both before a request is watched.
        call: does everything of the phase; gradients that it leaves behind stay.
        birth: from `read_pages()`, before the model was loaded.
        device: as torch names it.
        phase: what `call` is.
        compiled: whether the step was compiled; see `LiveTensors`.
    """
    cuda, tensors = device.startswith("cuda"), resident_tensors(model, optimizer)
    kinds = {kind: sum(map(storage_bytes, found)) for kind, found in tensors.items()}
    resident = [tensor for found in tensors.values() for tensor in found]
    crest, gauge = _PeakTracker(cuda=cuda), PeakMemoryTracker(device)
    vocabulary = model.get_input_embeddings().weight.shape[0] if hasattr(model, "get_input_embeddings") else 0
    live = LiveTensors(
        resident={tensor.untyped_storage().data_ptr() for tensor in resident}, vocabulary=int(vocabulary),
        device=device, looked=crest.look,
    )  # fmt: skip
    give_back_free()  # else this step would reuse the heap of earlier ones, and its own peak would not show
    gauge.begin()
    crest.look(live.bytes)  # the peak before the first operator
    with contextlib.ExitStack() as stack:
        for hook in watch_cache(model, live):
            stack.callback(hook.remove)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        stack.enter_context(live.watching(trained, compiled=compiled))
        call()
    peaks = gauge.peaks(phase)
    kinds |= {kind: kinds.get(kind, 0) + size for kind, size in crest.kinds.items()}
    outside_allocator: dict[str, int] = {}
    if cuda:
        peak = peaks[f"device_peak_allocated_{phase}_bytes"]
        kinds |= _allocator_bytes()
        outside_allocator["fragmentation"] = peaks[f"device_peak_reserved_{phase}_bytes"] - peak
        outside_allocator["paged_optimizer_state"] = kinds.pop("paged_optimizer_state", 0)
    else:
        peak = peaks[f"host_peak_{phase}_bytes"]
        kinds |= _file_bytes(birth, resident) | {"heap_growth": max(0, peak - crest.peak)}
    return MemoryAccount(
        phase=phase, kinds=in_order(kinds, named=WATCHED[phase]), peak_bytes=peak, outside_allocator=outside_allocator
    )


class _PeakTracker:
    """The kinds of memory after the operator in which the memory was highest.

    On CUDA that is where the allocator's peak last rose. On the host the resident set stays high when tensors are freed
    and grows while malloc serves small blocks; there it is where the live tensors and the operator's own memory were
    largest, and any later growth is a kind of its own.
    """

    def __init__(self, *, cuda: bool) -> None:
        self._cuda = cuda
        self._highest = 0
        self._most = -1
        self.peak = 0
        self.kinds: dict[str, int] = {}

    def look(self, kinds: dict[str, int]) -> None:
        """Keep the kinds that are alive now, if they are the most so far."""
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


def _file_bytes(birth: Pages, resident: Collection[torch.Tensor]) -> dict[str, int]:
    """Kinds of memory outside torch: pages of files and of code."""
    now, mapped = read_pages(), Counter[str]()
    for tensor in resident:
        if path := now.file_at(tensor.untyped_storage().data_ptr()):
            mapped[path] += storage_bytes(tensor)
    code, before = (sum(size for path, size in pages.files.items() if path not in mapped) for pages in (now, birth))
    return {
        "process": birth.resident_bytes,
        "library_code": code - before,
        "generated_code": now.generated_bytes - birth.generated_bytes,
        "checkpoint_pages": sum(now.files[path] - size for path, size in mapped.items()),
    }


def _allocator_bytes() -> dict[str, int]:
    """Memory that CUDA's allocator adds: rounding, by its own two counts, and the workspace of cuBLAS in it."""
    stats, before = torch.cuda.memory_stats(), torch.cuda.memory_allocated()
    requested = stats.get("requested_bytes.all.current")
    rounding = {} if requested is None else {"rounding": int(stats["allocated_bytes.all.current"] - requested)}
    torch._C._cuda_clearCublasWorkspaces()
    return rounding | {"blas_workspace": before - torch.cuda.memory_allocated()}


def watch_cache(model: Any, live: LiveTensors) -> list[Any]:
    """Count the keys and values of each layer when its attention has updated them; returns the hooks to remove."""

    def mark(module: Any, args: Any, given: dict[str, Any], output: Any) -> None:
        cache = given.get("cache", given.get("past_key_values"))  # the name changed within transformers 5
        for layer in getattr(cache, "layers", ())[module.layer_idx : module.layer_idx + 1]:
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if isinstance(tensor, torch.Tensor):
                    live.note(tensor, "kv_cache")

    attentions = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    return [module.register_forward_hook(mark, with_kwargs=True) for module in attentions]
