"""One rank among those that train together: how it meets them, and what it tells them outside of every timed step."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

PATIENCE = 0.4
"""How long an exchange may take, as a share of a command's time and less than the ranks have of it: then those who wait
say so, and who hangs is known."""


class ProcessGroup:
    """The process group of a trial's ranks; nothing is shared before `join`."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self._device = "cpu"

    def join(self, folder: Path, device: str, timeout_s: float) -> None:
        """Meet the others, in a file of this folder; NCCL on a GPU, gloo on a CPU.

        Ranks of one trial are on one machine, so gloo is kept off the network unless the user names an interface.
        """
        cuda = device.startswith("cuda")
        self._device = device
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        distributed.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=(folder / "ranks").as_uri(),
            rank=self.rank,
            world_size=self.ranks,
            timeout=datetime.timedelta(seconds=max(1.0, PATIENCE * timeout_s)),
            device_id=torch.device("cuda", 0) if cuda else None,
        )

    def barrier(self) -> None:
        """Wait until all ranks are here, and on a GPU until its queue is empty."""
        distributed.barrier()
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of every rank, in their order; each gives as many."""
        own = torch.tensor(list(values), dtype=torch.float64, device=self._device)
        found = [torch.empty_like(own) for _ in range(self.ranks)]
        distributed.all_gather(found, own)
        return [one.tolist() for one in found]

    def gather_data(self, data: Any) -> list[Any]:
        """What every rank has to say, in their order."""
        found: list[Any] = [None] * self.ranks
        distributed.all_gather_object(found, data)
        return found
