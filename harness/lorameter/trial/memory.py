"""Counts the bytes that are resident between training steps, by kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch


def resident_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Exact bytes that are resident between steps, by kind; tied tensors count once, sharded ones with the part on this
    rank.

    `base_weight_bytes` and `quantization_state_bytes` (constants of 4-bit and 8-bit layers) are the frozen base,
    `adapter_bytes` all parameters that train, `gradient_bytes` the current gradients, `optimizer_state_bytes` all state
    of the optimizer, and `paged_optimizer_state_bytes` the part of that state in managed memory.
    """
    sizes = {kind: sum(one.nbytes for one in tensors) for kind, tensors in resident_tensors(model, optimizer).items()}
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
    """Tensors that are resident between steps, by kind (`lorameter.records.memory_account.MEMORY_KINDS`); each storage
    counts once.

    Embeddings (with the output head), norms and frozen buffers are distinguished by type.
    """
    seen: set[int] = set()
    kinds: dict[str, list[torch.Tensor]] = {"linear_weights": []}
    head = output_head(model)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                kind = _kind(module, parameter, head)
                kinds.setdefault(kind, []).extend(_not_yet_seen((parameter,), seen))
    kinds["adapter"] = list(_not_yet_seen((p for p in model.parameters() if p.requires_grad), seen))
    for buffer in _not_yet_seen(model.buffers(), seen):
        kinds.setdefault(f"buffers_{_name(buffer)}", []).append(buffer)
    kinds["quantization_state"] = list(_not_yet_seen(_quantization_state(model), seen))
    kinds["gradients"] = [_local_part(p.grad) for p in model.parameters() if p.grad is not None]
    states = () if optimizer is None else optimizer.state.values()
    entries = (item for values in states for item in values.values())
    state = list(_not_yet_seen((item for item in entries if isinstance(item, torch.Tensor)), seen))  # tables are shared
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
    holders = [
        holder  # 8-bit layers move their row scales from the weight to the layer's own state
        for module in model.modules()
        for holder in (getattr(module, "weight", None), getattr(module, "state", None))
    ]
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    states += [vars(module).get("quant_state") for module in model.modules()]  # for sharded weights
    states += [getattr(state, "state2", None) for state in states]  # a state repacked for a CPU has none
    for holder in (*holders, *states):
        for name in ("SCB", "absmax", "code", "offset"):
            tensor = vars(holder).get(name) if hasattr(holder, "__dict__") else None
            if isinstance(tensor, torch.Tensor):
                yield tensor


def _not_yet_seen(tensors: Iterable[torch.Tensor], seen: set[int]) -> Iterator[torch.Tensor]:
    for tensor in map(_local_part, tensors):
        key = tensor.untyped_storage().data_ptr()
        if key not in seen:
            seen.add(key)
            yield tensor


def _local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The local part of a sharded tensor; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
