"""The account of a trial's memory: one watched call, and beside the measured peak everything that can be counted.

What is resident between steps is counted tensor by tensor. What lives during the step is watched
(`harness.meters.live`) and taken as it stood where the memory was highest; what one operator held beyond its results at
that point (a packed weight, an accumulator) shows in the peak around it. On the host the kernel counts the pages of
code and of mapped weights, and malloc what it holds; the two meet in what malloc keeps although it is free.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from harness.memory_account import MemoryAccount, MemoryPhase, in_order
from harness.meters.live import LiveTensors
from harness.meters.memory import MemoryGauge, host_bytes, resident_tensors, storage_bytes
from harness.meters.pages import Heap, Pages, read_heap, read_pages, resident_now

RISE = 0.001
"""A new maximum is looked at closely when it is this much above the last: reading every mapping takes milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """The process before it loads anything; taken first of all in a trial's process."""

    resident_bytes: int
    pages: Pages
    heap: Heap | None


def born() -> Birth:
    """Take it now."""
    return Birth(resident_bytes=host_bytes("VmRSS"), pages=read_pages(), heap=read_heap())


def account(
    model: Any,
    optimizer: torch.optim.Optimizer,
    call: Callable[[], object],
    *,
    birth: Birth,
    device: str,
    phase: MemoryPhase = "train",
    compiled: bool = False,
) -> MemoryAccount:
    """The memory of one call: a training step that has been taken before, or a request for tokens.

    The call is watched operator by operator, takes several times as long and must not be timed. It is a real step:
    whoever must find the model as it was restores it. At least one step must have been taken before in this process, or
    what is built once (optimizer state, code touched for the first time) would count as temporary.

    Args:
        model: as PEFT makes it; a plain transformers model works too.
        optimizer: its state counts as resident, as do gradients that are there; clear both before a request is watched.
        call: does everything of the phase; gradients that it leaves behind stay.
        birth: from `born()`, before the model was loaded.
        device: as torch names it.
        phase: what `call` is.
        compiled: whether the step was compiled; see `harness.meters.live`.
    """
    tensors = resident_tensors(model, optimizer)
    kinds = {kind: sum(map(storage_bytes, found)) for kind, found in tensors.items()}
    addresses = {tensor.untyped_storage().data_ptr() for found in tensors.values() for tensor in found}
    cuda = device.startswith("cuda")
    crest = _Crest(cuda=cuda)
    live = LiveTensors(resident=addresses, vocabulary=_vocabulary(model), device=device, looked=crest.look)
    gauge = MemoryGauge(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = watch_cache(model, live)
    gauge.begin()
    try:
        with live.watching(trained, compiled=compiled):
            call()
    finally:
        for hook in hooks:
            hook.remove()
    peaks = gauge.peaks(phase)
    kinds |= {kind: kinds.get(kind, 0) + size for kind, size in crest.kinds.items()}
    if cuda:
        return _on_cuda(phase, kinds, peaks)
    kinds |= _on_host(birth, crest, [tensor for found in tensors.values() for tensor in found])
    return MemoryAccount(phase=phase, kinds=in_order(kinds), peak_bytes=peaks[f"host_peak_{phase}_bytes"])


class _Crest:
    """The state after the operator in which the memory was highest."""

    def __init__(self, *, cuda: bool) -> None:
        self._cuda = cuda
        self._highest = 0.0
        self.kinds: dict[str, int] = {}
        self.pages: Pages | None = None
        self.heap: Heap | None = None

    def look(self, kinds: dict[str, int]) -> None:
        """Keep what is alive now, if the peak has risen since the last look."""
        peak = torch.cuda.max_memory_allocated() if self._cuda else host_bytes("VmHWM")
        if peak <= self._highest * (1 if self._cuda else 1 + RISE):
            return
        self._highest = peak
        now = torch.cuda.memory_allocated() if self._cuda else resident_now()
        self.kinds = kinds | {"operator_scratch": max(0, peak - now)}
        if not self._cuda:
            self.pages, self.heap = read_pages(), read_heap()


def _on_host(birth: Birth, crest: _Crest, resident: Collection[torch.Tensor]) -> dict[str, int]:
    """Kinds of which torch knows nothing: pages of files, and the heap beyond the tensors."""
    now, heap = read_pages(), read_heap()
    mapped: dict[str, int] = {}
    for tensor in resident:
        path = now.file_at(tensor.untyped_storage().data_ptr())
        if path is not None:
            mapped[path] = mapped.get(path, 0) + storage_bytes(tensor)
    code = sum(size for path, size in now.files.items() if path not in mapped)
    kinds = {
        "process": birth.resident_bytes,
        "library_code": code - sum(size for path, size in birth.pages.files.items() if path not in mapped),
        "checkpoint_pages": sum(now.files[path] - size for path, size in mapped.items()),
    }
    if heap is not None and birth.heap is not None:
        allocated = sum(map(storage_bytes, resident)) - sum(mapped.values())
        mappings = now.anonymous_bytes - heap.mapped_bytes
        kinds["interpreter"] = mappings - (birth.pages.anonymous_bytes - birth.heap.mapped_bytes)
        kinds["library_heap"] = heap.used_bytes - birth.heap.used_bytes - allocated
    if crest.pages is not None and crest.heap is not None and birth.heap is not None:
        before = birth.pages.heap_bytes - birth.heap.arena_used_bytes
        kinds["heap_slack"] = crest.pages.heap_bytes - crest.heap.arena_used_bytes - before
    return kinds


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
    return MemoryAccount(phase=phase, kinds=in_order(kinds), peak_bytes=peak, beside=beside)


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
