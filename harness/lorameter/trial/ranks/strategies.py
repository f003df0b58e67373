"""How ranks train one model together: by torch's own DistributedDataParallel or FSDP2, as a script would ask for them.

Each block of the model is sharded by itself and then the rest, which is what FSDP2's documentation and accelerate do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from kernels_check.ranks import Strategy
from lorameter.studies.workload import Repair
from lorameter.trial.building.packing import linear4bit_layers


def distribute(model: Any, strategy: Strategy, *, device: str, repair: Repair) -> Any:
    """Have `model` train together with those of the other ranks; returns what is called in its place.

    Args:
        model: PEFT's, whole, on this rank's device, its adapter attached.
        strategy: "ddp" or "fsdp2".
        device: of this rank.
        repair: what is mended first; "quant_state" sets the quantisation state of a 4-bit layer on the weight that
            stands in it, where bitsandbytes registers a new one inside each forward.
    """
    if strategy == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=[0] if device.startswith("cuda") else None)
    from torch.distributed.fsdp import fully_shard

    for layer in linear4bit_layers(model):
        layer.quant_state = layer.weight.quant_state  # the weight is about to be another
    if repair == "quant_state":
        keep_quantisation_states()
    for block in blocks_of(model):
        fully_shard(block)
    return fully_shard(model)


def blocks_of(model: Any) -> list[Any]:
    """The modules that the architecture says are not to be split: its decoder layers."""
    kinds = set(getattr(model.get_base_model(), "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


def keep_quantisation_states() -> None:
    """Mend bitsandbytes for FSDP2, in this process.

    `fix_4bit_weight_quant_state_from_module` makes a new parameter of what FSDP2 has gathered for a forward and
    registers it. What becomes of that one is lost to the next gathering. A state that is set on the gathered parameter
    itself stays with it.
    """
    import bitsandbytes.nn.modules as modules

    def set_state(layer: Any) -> None:
        if getattr(layer.weight, "quant_state", None) is None:
            layer.weight.quant_state = layer.quant_state

    modules.fix_4bit_weight_quant_state_from_module = set_state


@contextlib.contextmanager
def exchanging(forward: Any, *, now: bool) -> Iterator[None]:
    """A backward pass after which gradients are exchanged, or only added up where more of them follow in the step."""
    if isinstance(forward, torch.nn.parallel.DistributedDataParallel):
        with contextlib.nullcontext() if now else forward.no_sync():
            yield
        return
    forward.set_requires_gradient_sync(now)
    yield


def shard_again(model: Any) -> None:
    """Let go of what a forward without a backward pass has left whole, so that what stands in the model is its own."""
    for module in model.modules():
        if hasattr(module, "set_requires_gradient_sync"):  # FSDP2 gives a module that it shards a class with this
            module.reshard()
