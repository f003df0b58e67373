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
import re
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorameter.machine.memory import PeakMemoryTracker, host_bytes
from lorameter.records.memory_account import MemoryAccount, MemoryPhase, in_order
from lorameter.trial.memory import resident_tensors, storage_bytes
from lorameter.trial.process import give_back_free, resident_now

_SMAPS = Path("/proc/self/smaps")
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \d+ *(.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """Resident bytes of this process that are mapped from files, or that it runs as code."""

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
    """Read /proc/self/smaps; some milliseconds."""
    files: dict[str, int] = {}
    ranges: list[tuple[int, int, str]] = []
    path, runs, generated = "", False, 0
    for line in _SMAPS.read_text().splitlines():
        if header := _HEADER.fullmatch(line):
            path, runs = header[4], "x" in header[3]
            if path.startswith("/"):
                ranges.append((int(header[1], 16), int(header[2], 16), path))
        elif line.startswith("Rss:"):
            size = int(line.split()[1]) * 1024
            if path.startswith("/"):
                files[path] = files.get(path, 0) + size
            elif runs and not path.startswith("["):  # the kernel's own pages have names in brackets
                generated += size
    return Pages(files=files, generated_bytes=generated, ranges=tuple(ranges))


# --- live tensors -----------------------------------------------------------------------------------------------------

RANK = ("temporaries", "activations", "gradients", "kv_cache", "logits")
"""A storage's kind can only rise in this order: a temporary becomes an activation when it is saved."""


class LiveTensors:
    """Bytes of live storages by kind, the resident ones left out."""

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
        self._resident = resident
        self._vocabulary = vocabulary
        self._device = torch.device(device).type
        self._looked = looked
        self._kinds: dict[int, str] = {}
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}
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
            self._alive[key] = weakref.ref(storage, lambda _: self._forget(key))
            self._kinds[key], self._sizes[key] = kind, storage.nbytes()
            self.bytes[kind] += self._sizes[key]
        elif RANK.index(kind) > RANK.index(self._kinds[key]):
            self.bytes[self._kinds[key]] -= self._sizes[key]
            self.bytes[kind] += self._sizes[key]
            self._kinds[key] = kind

    @contextlib.contextmanager
    def watching(self, parameters: Sequence[torch.nn.Parameter], *, compiled: bool = False) -> Iterator[None]:
        """For the time of a step on these trained parameters."""
        mode = contextlib.nullcontext() if compiled else _Mode(self)
        hooks = [parameter.register_post_accumulate_grad_hook(self._accumulated) for parameter in parameters]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._saved, _unpacked), mode:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def look(self) -> None:
        """Something has changed."""
        self._looked(self.bytes)

    def _saved(self, tensor: torch.Tensor) -> torch.Tensor:
        self.note(tensor, "activations")
        self.look()
        return tensor.detach()  # itself would be a cycle, which only the collector frees

    def _accumulated(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.note(parameter.grad, "gradients")

    def _forget(self, key: int) -> None:
        self.bytes[self._kinds.pop(key)] -= self._sizes.pop(key)
        del self._alive[key]


def _unpacked(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class _Mode(TorchDispatchMode):
    def __init__(self, live: LiveTensors) -> None:
        super().__init__()
        self._live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._live.note(leaf, "temporaries")
        self._live.look()
        return result


# --- the account ------------------------------------------------------------------------------------------------------

WATCHED: dict[MemoryPhase, tuple[str, ...]] = {
    "train": ("activations", "logits", "gradients"),
    "generate": ("kv_cache", "logits"),
}
"""Kinds that a phase's account names even where nothing of them was alive at the peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessBaseline:
    """The process before it loads anything; taken first of all in a trial's process."""

    resident_bytes: int
    pages: Pages


def take_birth() -> ProcessBaseline:
    """Take it now; what is free then, and kept by malloc, is given back first, as it will be before the call."""
    give_back_free()
    return ProcessBaseline(resident_bytes=host_bytes("VmRSS"), pages=read_pages())


def measure_breakdown(
    model: Any,
    optimizer: torch.optim.Optimizer,
    call: Callable[[], object],
    *,
    birth: ProcessBaseline,
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
        birth: from `take_birth()`, before the model was loaded.
        device: as torch names it.
        phase: what `call` is.
        compiled: whether the step was compiled; see `LiveTensors`.
    """
    tensors = resident_tensors(model, optimizer)
    kinds = {kind: sum(map(storage_bytes, found)) for kind, found in tensors.items()}
    resident = [tensor for found in tensors.values() for tensor in found]
    crest = _PeakTracker(cuda=device.startswith("cuda"))
    addresses = {tensor.untyped_storage().data_ptr() for tensor in resident}
    live = LiveTensors(resident=addresses, vocabulary=_vocabulary(model), device=device, looked=crest.look)
    gauge = PeakMemoryTracker(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    give_back_free()  # else what earlier steps have left on the heap would serve this one, and its own peak not show
    gauge.begin()
    crest.look(live.bytes)  # the peak so far is no operator's
    with contextlib.ExitStack() as stack:
        for hook in watch_cache(model, live):
            stack.callback(hook.remove)
        stack.enter_context(live.watching(trained, compiled=compiled))
        call()
    peaks = gauge.peaks(phase)
    kinds |= {kind: kinds.get(kind, 0) + size for kind, size in crest.kinds.items()}
    if device.startswith("cuda"):
        return _on_cuda(phase, kinds, peaks)
    kinds |= _on_host(birth, resident)
    peak = peaks[f"host_peak_{phase}_bytes"]
    kinds["heap_growth"] = max(0, peak - crest.peak)
    return MemoryAccount(phase=phase, kinds=in_order(kinds, named=WATCHED[phase]), peak_bytes=peak)


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
            now = torch.cuda.memory_allocated() if self._cuda else resident_now()
            scratch = max(0, peak - now)
        self._highest = peak
        most = peak if self._cuda else sum(kinds.values()) + scratch
        if most > self._most:
            self._most, self.peak = most, peak
            self.kinds = kinds | {"operator_scratch": scratch}


def _on_host(birth: ProcessBaseline, resident: Collection[torch.Tensor]) -> dict[str, int]:
    """Kinds that torch does not know: pages of files."""
    now = read_pages()
    mapped: dict[str, int] = {}
    for tensor in resident:
        path = now.file_at(tensor.untyped_storage().data_ptr())
        if path is not None:
            mapped[path] = mapped.get(path, 0) + storage_bytes(tensor)
    code = sum(size for path, size in now.files.items() if path not in mapped)
    return {
        "process": birth.resident_bytes,
        "library_code": code - sum(size for path, size in birth.pages.files.items() if path not in mapped),
        "generated_code": now.generated_bytes - birth.pages.generated_bytes,
        "checkpoint_pages": sum(now.files[path] - size for path, size in mapped.items()),
    }


def _on_cuda(phase: MemoryPhase, kinds: dict[str, int], peaks: dict[str, int]) -> MemoryAccount:
    """What the allocator itself adds: rounding, by its own two counts, and the workspace that cuBLAS holds in it."""
    stats = torch.cuda.memory_stats()
    asked = stats.get("requested_bytes.all.current")
    if asked is not None:
        kinds["rounding"] = int(stats["allocated_bytes.all.current"] - asked)
    before = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    kinds["blas_workspace"] = before - torch.cuda.memory_allocated()
    peak = peaks[f"device_peak_allocated_{phase}_bytes"]
    beside = {"fragmentation": peaks[f"device_peak_reserved_{phase}_bytes"] - peak}
    beside["paged_optimizer_state"] = kinds.pop("paged_optimizer_state", 0)
    return MemoryAccount(phase=phase, kinds=in_order(kinds, named=WATCHED[phase]), peak_bytes=peak, beside=beside)


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0]) if hasattr(model, "get_input_embeddings") else 0


def watch_cache(model: Any, live: LiveTensors) -> list[Any]:
    """Mark keys and values of each layer as soon as its attention has added to them; returns the hooks to remove."""

    def mark(module: Any, args: Any, given: dict[str, Any], output: Any) -> None:
        cache = given.get("cache", given.get("past_key_values"))  # the name changed within transformers 5
        layers = getattr(cache, "layers", ())
        if module.layer_idx < len(layers):
            for name in ("keys", "values"):
                tensor = getattr(layers[module.layer_idx], name, None)
                if isinstance(tensor, torch.Tensor):
                    live.note(tensor, "kv_cache")

    attentions = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    return [module.register_forward_hook(mark, with_kwargs=True) for module in attentions]
