"""What a training is: its device, its ranks, how many parameters it has and how many of them train."""

from __future__ import annotations

import os
from typing import Any

import torch


def device_of(model: Any) -> torch.device:
    """The device of the first parameter that trains, else of the first; the CPU where there is none."""
    parameters = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    trained = (parameter for parameter in parameters if parameter.requires_grad)
    first = next(trained, parameters[0] if parameters else None)
    return torch.device("cpu") if first is None else first.device


def rank_of() -> tuple[int, int]:
    """This process's rank and how many there are, from torch.distributed, else as a launcher left them."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    try:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 0, 1


def count_parameters(model: Any) -> tuple[int | None, int | None]:
    """Parameters that train, and all; weights of 4 bits count as what they stand for. None of what is no model.

    PEFT and transformers count their own, since a packed weight has half as many elements as it stands for.
    """
    if not isinstance(model, torch.nn.Module):
        return None, None
    by_peft: Any = getattr(model, "get_nb_trainable_parameters", None)
    if callable(by_peft):
        trainable, total = by_peft()
        return int(trainable), int(total)
    by_transformers: Any = getattr(model, "num_parameters", None)
    if callable(by_transformers):
        return int(by_transformers(only_trainable=True)), int(by_transformers())
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in parameters)
