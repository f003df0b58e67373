"""The account of a trial's memory: one watched call, and everything that can be counted towards its measured peak.

What is resident between steps is counted tensor by tensor. What lives during the step is watched (`LiveTensors`) and
taken as it was where the memory was highest; what one operator held beyond its results at that point (a packed weight,
an accumulator) shows in the peak around it. On the host the kernel counts the pages of code and of mapped weights
(proc_pid_smaps(5)). Objects of libraries and of the interpreter on the heap, and what malloc keeps although it is free,
are not counted: most of what stays unexplained there.

The allocator is not asked which tensors are alive. Every operator's results pass a dispatch mode, which keeps a weak
reference to each storage: while that lives, its bytes count. What autograd keeps for the backward pass is seen by its
own hooks (torch.autograd.graph.saved_tensors_hooks): under checkpointing they see what is kept, and not what will be
computed again. Views share a storage and count once; what an operator allocates and frees inside itself is never seen.
A compiled step runs without the mode, which would make it run uncompiled: only what is saved and the gradients are then
seen.
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
    """Resident bytes of this process, and what of them is mapped from files or is run as code."""

    resident_bytes: int
    files: Mapping[str, int]
    """By path."""
    generated_bytes: int
    """Of what may be run and is from no file: code that a library has made, as oneDNN does for each new shape."""
    ranges: tuple[tuple[int, int, str], ...]
    """First address, end and path of each mapping."""

    def file_at(self, address: int) -> str | None:
        """Path of the file that is mapped at an address; None if there is none."""
        return next((path for first, end, path in self.ranges if first <= address < end), None)


def read_pages() -> Pages:
    """Read the mappings of this process; some milliseconds. What is free, and kept by malloc, is given back first."""
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
    """Bytes of live storages by kind, the resident ones left out; as a dispatch mode it sees the results of all
    operators."""

    def __init__(
        self, *, resident: Collection[int], vocabulary: int, device: str, looked: Callable[[dict[str, int]], None]
    ) -> None:
        """Counts tensors, and reports to `looked`.

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
        """Alive now."""

    def note(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor's storage as of this kind, or of a higher one that it has."""
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
        """For the time of a step on these trained parameters."""
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
        return tensor.detach()  # itself would be a cycle, which only the collector frees

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
"""Kinds that a phase's account names even where nothing of them was alive at the peak."""


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
    model. At least one step must have been taken before in this process, or what is built once (optimizer state, code
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
    give_back_free()  # else what earlier steps have left on the heap would serve this one, and its own peak not show
    gauge.begin()
    crest.look(live.bytes)  # the peak so far is no operator's
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
    """The state after the operator in which the memory was highest.

    On CUDA that is where the allocator's peak last rose. A resident set stays high when tensors are freed, and creeps
    on while malloc serves small blocks from it; there it is where most was alive, counting what the operator itself
    held, and what the peak rose later is a kind of its own.
    """

    def __init__(self, *, cuda: bool) -> None:
        self._cuda = cuda
        self._highest = 0
        self._most = -1
        self.peak = 0
        self.kinds: dict[str, int] = {}

    def look(self, kinds: dict[str, int]) -> None:
        """Keep what is alive now, if it is more than ever."""
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
    """Kinds that torch does not know: pages of files, and of code."""
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
    """What CUDA's allocator itself adds: rounding, by its own two counts, and the workspace that cuBLAS holds in it."""
    stats, before = torch.cuda.memory_stats(), torch.cuda.memory_allocated()
    asked = stats.get("requested_bytes.all.current")
    rounding = {} if asked is None else {"rounding": int(stats["allocated_bytes.all.current"] - asked)}
    torch._C._cuda_clearCublasWorkspaces()
    return rounding | {"blas_workspace": before - torch.cuda.memory_allocated()}


def watch_cache(model: Any, live: LiveTensors) -> list[Any]:
    """Mark keys and values of each layer as soon as its attention has added to them; returns the hooks to remove."""

    def mark(module: Any, args: Any, given: dict[str, Any], output: Any) -> None:
        cache = given.get("cache", given.get("past_key_values"))  # the name changed within transformers 5
        for layer in getattr(cache, "layers", ())[module.layer_idx : module.layer_idx + 1]:
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if isinstance(tensor, torch.Tensor):
                    live.note(tensor, "kv_cache")

    attentions = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    return [module.register_forward_hook(mark, with_kwargs=True) for module in attentions]
