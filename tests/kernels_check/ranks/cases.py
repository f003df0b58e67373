"""Steps of two ranks over gloo under ``watch``, some of them faulty: each rank prints a line of JSON for each case.

It runs as a script with the rank's number and a rendezvous file. One pair of processes takes all cases.
"""

from __future__ import annotations

import contextlib
import json
import sys

import bitsandbytes as bnb
import peft
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import kernels_check

REQUIRED = dict.fromkeys(("ranks.base", "ranks.adapters", "ranks.gradients", "ranks.steps"), True)


class Plain(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.up, self.down = linear(64, 128), linear(128, 64)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def in_four_bits(inputs, outputs):
    return bnb.nn.Linear4bit(inputs, outputs, compute_dtype=torch.float32, quant_type="nf4")


def adapted(*, dropout=0.0, linear=nn.Linear):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["up", "down"], lora_dropout=dropout, init_lora_weights=False)
    return peft.get_peft_model(Plain(linear).to("cpu"), config)


class Training:
    """A DDP loop as in a script; `skip` and `sync` set what a rank does in each step."""

    def __init__(self, rank, *, clip=0.0, accumulate=1, **model):
        torch.manual_seed(7)
        self.model = adapted(**model)
        self.ddp = DistributedDataParallel(self.model)
        trained = [value for value in self.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)
        self.rank, self.clip, self.accumulate, self.trained = rank, clip, accumulate, trained
        self.data = torch.Generator().manual_seed(rank)
        self.watched = kernels_check.watch(self.model, REQUIRED)

    def step(self, *, skip=False, sync=True):
        for left in reversed(range(self.accumulate)):
            x = torch.randn(8, 64, generator=self.data)
            with contextlib.nullcontext() if sync and not left else self.ddp.no_sync():
                self.ddp(x).square().mean().backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.trained, self.clip)
        if not skip:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def checks(self, **how):
        with self.watched:
            self.step(**how)
        return self.watched.checks


def healthy(rank, **how):
    training = Training(rank, **how)
    training.step()
    return training.checks()


def watched_step(model, called):
    """Take the first step of a model by its callable, and return the checks."""
    optimizer = torch.optim.AdamW([value for value in called.parameters() if value.requires_grad], lr=1e-2)
    with (watched := kernels_check.watch(model, REQUIRED)):
        called(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
    return watched.checks


def sharded(rank):
    torch.manual_seed(7)
    model = adapted()
    fully_shard(model.base_model.model.up)
    return watched_step(model, fully_shard(model))


def flat(rank):
    """FSDP1 flattens all parameters of a module into one, of which each rank holds a part."""
    torch.manual_seed(7)
    model = adapted()
    return watched_step(model, FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")))


def scales_differ(rank):
    training = Training(rank, linear=in_four_bits)
    if rank:
        state = training.model.base_model.model.up.base_layer.weight.quant_state
        state.absmax = state.absmax * 1.02
    return training.checks()


def exchanged_at_first_only(rank):
    """With dropout, gradients are not exchanged from the second step on, which the first check does not see."""
    training = Training(rank, dropout=0.5)
    first = training.checks()
    assert all(check.met for check in first if check.path in REQUIRED), first
    return training.checks(sync=False)


def left_out_later(rank):
    """Rank 1 skips one update before the watched step."""
    training = Training(rank)
    for number in range(3):
        training.step(skip=rank == 1 and number == 1)
    return training.checks()


def never_steps(rank):
    return Training(rank).checks(skip=rank == 1)


def verified_without_updates(rank):
    """`verify` takes the same number of steps on every rank, although one rank never updates."""
    training = Training(rank)
    return kernels_check.verify(training.model, lambda: training.step(skip=rank == 1), REQUIRED)


def nothing_ran(rank):
    """Rank 1 watches a model that is not the trained one."""
    training, other = Training(rank), adapted()
    if rank:
        training.watched = kernels_check.watch(other, REQUIRED)
    return training.checks()


CASES = {
    "ddp": lambda rank: healthy(rank, dropout=0.5, clip=1e-3, accumulate=2),
    "four bits": lambda rank: healthy(rank, linear=in_four_bits),
    "fsdp2": sharded,
    "fsdp1": flat,
    "scales differ": scales_differ,
    "exchanged at first only": exchanged_at_first_only,
    "left out later": left_out_later,
    "never steps": never_steps,
    "verified without updates": verified_without_updates,
    "nothing ran": nothing_ran,
}


def main(rank, meeting):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for name, case in CASES.items():
        checks = case(rank)
        found = {check.path: (check.status, check.reason) for check in checks if check.path.startswith("ranks.")}
        print(json.dumps({"case": name, "found": found}), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
