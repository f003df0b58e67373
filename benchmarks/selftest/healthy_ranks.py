"""Healthy runs of two ranks over gloo, each verified in both of its processes; and one that computes wrong losses.

A base in NF4 that FSDP2 has sharded is right in training mode. Left in eval mode on a processor with AVX512_BF16,
bitsandbytes 0.50 stores its weights anew in the first forward, FSDP2 gathers the old ones for the next, and from the
second forward on the losses are those of another model, without a word. That run is sick: what is claimed of it must
not all be active. On processors where its losses are right it is skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from healthy import PLAIN, RATE, SkippedError, Twin, adapted, llama, stepping, trained, words
from torch import multiprocessing, nn

RANKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A run of two ranks."""

    build: Callable[[], Twin]
    """Called in each rank, after the group of processes was made."""
    sick: bool = False


def _parallel(quant: str | None, dtype: torch.dtype, **told: Any) -> Twin:
    model = adapted(llama(quant=quant, dtype=dtype))
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)
    return Twin(model=wrapped, step=stepping(wrapped, optimizer), required=PLAIN | told)


def _sharded(quant: str | None, *, training: bool = True, **told: Any) -> Twin:
    import bitsandbytes as bnb
    from torch.distributed.fsdp import fully_shard

    model = llama(dtype=torch.bfloat16)
    for name, module in [*model.named_modules()]:
        if quant is not None and isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, last = name.rpartition(".")
            small = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type=quant,
                quant_storage=torch.bfloat16,
            )  # fmt: skip
            small.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type=quant, quant_storage=torch.bfloat16, module=small
            )
            setattr(model.get_submodule(parent), last, small.to("cpu"))
    import peft

    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).train(training)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)
    required = PLAIN | {"base.bits": 16} | told
    return Twin(model=model, step=stepping(model, optimizer), required=required)


FOUR = {"base.bits": 4, "base.quant_type": "nf4", "base.compute_dtype": "bfloat16"}
RANKED: dict[str, Ranked] = {
    "ranks: DDP, float32": Ranked(build=lambda: _parallel(None, torch.float32)),
    "ranks: DDP, bfloat16": Ranked(build=lambda: _parallel(None, torch.bfloat16, **{"base.bits": 16})),
    "ranks: DDP, NF4": Ranked(build=lambda: _parallel("nf4", torch.bfloat16, **FOUR)),
    "ranks: FSDP2, bfloat16": Ranked(build=lambda: _sharded(None)),
    "ranks: FSDP2, NF4": Ranked(build=lambda: _sharded("nf4", **FOUR)),
    "ranks: FSDP2, NF4, left in eval mode, computes wrong losses": Ranked(
        build=lambda: _sharded("nf4", training=False, **FOUR, mode="eval"), sick=True
    ),
}
"""Runs of two ranks by name."""


def verified(name: str, instrument: str) -> tuple[Mapping[str, Any], list[list[dict[str, Any]]]]:
    """What is required of a run, and the checks of each rank.

    Raises:
        SkippedError: it is to be sick, and is not on this processor.
        RuntimeError: a rank ended without checks.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.spawn(_rank, (name, instrument, _free_port(), folder), nprocs=RANKS, join=True)
        except Exception as error:
            raise RuntimeError(f"{name}: a rank ended: {str(error).strip().splitlines()[-1]}") from error
        told = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(RANKS)]
    if not all(told):
        raise SkippedError("its losses are right on this processor, so that there is nothing to find")
    return told[0]["required"], [one["checks"] for one in told]


def _rank(rank: int, name: str, instrument: str, port: int, folder: str) -> None:
    from dataclasses import asdict

    import kernels_check

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    told: dict[str, Any] = {}
    if not RANKED[name].sick or _computes_wrong_losses(RANKED[name].build()):
        run = RANKED[name].build()
        checks = kernels_check.verify(run.model, run.step, dict(run.required), instrument=instrument)  # type: ignore[arg-type]
        told = {"required": dict(run.required), "checks": [asdict(check) for check in checks]}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(told))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _computes_wrong_losses(run: Twin) -> bool:
    """Whether forwards of the same batch, between which nothing is updated, give different losses."""
    losses = []
    for _ in range(3):
        loss = run.model(input_ids=(ids := words()), labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
    return len(set(losses)) > 1


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
