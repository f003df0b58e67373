"""One rank of a trial: the commands of any trial, with barriers around each step.

After each step, outside its time, the ranks exchange their times and their parts of the loss. So all of them make the
same decisions (when a warm-up has ended), and a step's time is that of the slowest rank.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from torch import distributed

import kernels_check
from kernels_check.check import Check, judge_safely
from kernels_check.judges.ranks import PATHS, compare_adapters
from kernels_check.observe.modules import without_repacking
from kernels_check.observe.ranks import RankEvidence, counted_updates, fingerprints
from kernels_check.ranks import RankFacts, Strategy, judge_ranks, merge_checks, observe_rank
from lorameter.machine.nvml import GENERATIONS
from lorameter.records.record import PartialRecord
from lorameter.studies.request import TrialRequest
from lorameter.studies.workload import Repair
from lorameter.trial.building import peft_methods
from lorameter.trial.building.build import SharedBase, judge_checks
from lorameter.trial.building.quantizers import linear4bit_layers
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.process import Lap
from lorameter.trial.step import TrainStep, compute_loss, model_inputs
from lorameter.trial.trial import ISOLATED, Trial

_TRAINED = "ranks.trained"
COLLECTIVE_TIMEOUT_SHARE = 0.4
"""Timeout of a collective operation, as a share of a command's time limit and less than the share of the ranks: the
ranks that wait report it, which identifies the rank that hangs."""


class RankStep(TrainStep):
    """A step on this rank's part of each batch; the losses of all ranks add up to that of the batch."""

    @contextlib.contextmanager
    def without_clipping(self) -> Iterator[None]:
        """Run steps without clipping, so that the optimizer receives the exchanged gradients."""
        clip, self._clip = self._clip, 0.0
        try:
            yield
        finally:
            self._clip = clip

    def gradients(self) -> torch.Tensor:
        """Run forward and backward passes over this rank's part of the accumulated batches."""
        total = torch.zeros((), device=self._device)
        for left in reversed(range(self._accumulate)):
            batch, share = self._stream.take_share()
            with exchanging_gradients(self._trainee.forward, now=not left):
                part = self.loss(batch) * (share / self._accumulate)
                (part * self._stream.ranks).backward()  # gradients are averaged over ranks, while the parts add up
            total += part.detach()
        return total


class RankTrial(Trial):
    """State of one rank of a trial between commands.

    The ranks communicate outside of timed steps as one process group: by NCCL on GPUs, by gloo on CPUs. They are on one
    machine, so gloo does not use the network unless the user names an interface.
    """

    STEP = RankStep

    def __init__(self, request: TrialRequest, rank: int) -> None:
        super().__init__(request, SharedBase(), generations=GENERATIONS + 1, rank=rank)
        self._ranks = request.workload.ranks
        self._strategy = cast(Strategy, request.workload.strategy)
        self._isolation: list[Check] = []
        self._base_loss_whole = float("nan")
        self._laps: list[list[float]] = []
        """The times of every rank in each step since the start of the last turn, in seconds."""
        self._cuda = request.device.startswith("cuda")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        distributed.init_process_group(
            "nccl" if self._cuda else "gloo",
            init_method=(Path(request.scratch) / "ranks").as_uri(),
            rank=rank,
            world_size=self._ranks,
            timeout=datetime.timedelta(seconds=max(1.0, COLLECTIVE_TIMEOUT_SHARE * request.protocol.step_timeout_s)),
            device_id=torch.device("cuda", 0) if self._cuda else None,
        )

    def _barrier(self) -> None:
        """Wait until all ranks have reached the barrier, and on a GPU until its queue is empty."""
        distributed.barrier()
        if self._cuda:
            torch.cuda.synchronize()

    def _gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of every rank, in rank order; each rank passes the same number of values."""
        own = torch.tensor(list(values), dtype=torch.float64, device=self.request.device)
        gathered = [torch.empty_like(own) for _ in range(self._ranks)]
        distributed.all_gather(gathered, own)
        return [values.tolist() for values in gathered]

    def _gather_data(self, data: Any) -> list[Any]:
        """The data of every rank, in rank order."""
        gathered: list[Any] = [None] * self._ranks
        distributed.all_gather_object(gathered, data)
        return gathered

    def build(self) -> PartialRecord:
        """Load the base, attach the adapter, distribute the model, and run the first step."""
        fragment, ranks = super().build(), self._ranks
        threads = float(ranks * self.request.threads)  # waiting ranks must not count as other work
        return msgspec.structs.replace(fragment, values=fragment.values | {"ranks": float(ranks), "threads": threads})

    def _execute(self, command: str, **arguments: Any) -> PartialRecord:
        """Execute a command as in any trial, and add what concerns all ranks."""
        if command == "turn":
            self._laps.clear()
        fragment = super()._execute(command, **arguments)
        if command == "turn":
            return self._add_ranks(fragment)
        return self._check_trained(fragment) if command == "finish_training" else fragment

    def _add_ranks(self, fragment: PartialRecord) -> PartialRecord:
        """Timed steps with the tokens of all ranks, and the times of each."""
        tokens = self._gather([fragment.samples[key][0] for key in ("turn_tokens", "turn_padded_tokens")])
        real, padded = map(sum, zip(*tokens, strict=True))
        samples = fragment.samples | {"turn_tokens": (real,), "turn_padded_tokens": (padded,)}
        samples |= {f"rank{rank}_step_time_s": times for rank, times in enumerate(zip(*self._laps, strict=True))}
        return msgspec.structs.replace(fragment, samples=samples)

    def _check_trained(self, fragment: PartialRecord) -> PartialRecord:
        """Check that the ranks have trained the same adapter up to the last step."""
        if fragment.status != "ok":
            return fragment
        trainee = self.trainee
        reshard(trainee.model)
        gathered = self._gather_data((fingerprints(trainee.model), counted_updates([trainee.optimizer])))
        shown = [
            RankEvidence(rank=rank, adapter=adapter, updates=self.steps_taken, counted=counted)
            for rank, (adapter, counted) in enumerate(gathered)
        ]
        check = judge_safely(_TRAINED, True, lambda: compare_adapters(shown, steps=self.steps_taken))
        return judge_checks(fragment, [check], self.request)

    def _agree(self, decision: bool) -> bool:
        """Return the decision of the first rank: clocks differ, and all ranks must run the same steps."""
        return bool(self._gather([float(decision)])[0][0])

    def take_step(self, meanwhile: Callable[[], object] | None = None) -> tuple[float, Lap]:
        """Run a step on all ranks; returns their loss and the time of the slowest rank."""
        self._barrier()
        loss, lap = super().take_step(meanwhile)
        gathered = self._gather([lap.time_s, lap.cpu_time_s, loss])
        self._laps.append([time_s for time_s, _, _ in gathered])
        slowest = max(gathered)
        return sum(part for _, _, part in gathered), Lap(slowest[0], slowest[1])

    def _base_loss(self, forward: Any, model: Any, stream: TokenStream) -> float:
        """The loss of the base on the first batch, in train mode and without repacking."""
        position = stream.position()
        stream.restore((0, *position[1:]))
        batch = stream.take()
        stream.restore(position)
        request = self.request
        with torch.no_grad(), without_repacking(model), peft_methods.without_adapter(model):
            return float(compute_loss(forward, batch, device=request.device, autocast=request.variant.autocast))

    def _distribute(self, model: Any, stream: TokenStream) -> Any:
        request = self.request
        self._base_loss_whole = self._base_loss(model, model, stream)
        packed = stream.packed_batch()  # a rank's own rows of a step may have one record each
        if packed is not None:  # a sharded model cannot run a forward pass on a single rank
            self._isolation = [kernels_check.probe_isolation(model, model_inputs(packed))]
        return distribute(model, self._strategy, device=request.device, repair=request.workload.repair)

    def _check(self, step: Callable[[], None], required: Mapping[str, Any]) -> tuple[list[Check], dict[str, float]]:
        """The checks of a step merged over the ranks, and the checks that compare ranks; equal on all ranks."""
        model = self.trainee.model
        others = {path: value for path, value in required.items() if path != ISOLATED}
        reshard(model)
        with cast(RankStep, self.step).without_clipping():
            checks = [*kernels_check.verify(model, step, dict.fromkeys(PATHS, True) | others), *self._isolation]
        reshard(model)
        facts = self._observe()
        reshard(model)
        gathered = self._gather_data((checks, facts))
        facts_of_all = [facts for _, facts in gathered]
        merged = merge_checks([checks for checks, _ in gathered])
        return [*merged, *judge_ranks(facts_of_all, self._strategy)], _activity(facts_of_all)

    def _observe(self) -> RankFacts:
        """Observe the facts about this rank; the caller restores the stream."""
        trainee, stream, step = self.trainee, self.stream, self.step
        position = stream.position()
        frozen = not self.request.variant.trains_base  # otherwise biases of the base train, and its loss changes
        return observe_rank(
            trainee.model,
            step.gradients,
            step.update,
            lambda: stream.restore(position),
            self._barrier,
            (lambda: self._base_loss(trainee.forward, trainee.model, stream)) if frozen else None,
            before=self._base_loss_whole,
            whole=stream.upcoming(self.request.variant.gradient_accumulation),
            rank=self._rank,
        )


def _activity(facts: Sequence[RankFacts]) -> dict[str, float]:
    """Shares of the profiled steps: communication and waiting, the part that overlaps with computation, and the
    imbalance of the ranks' own times."""
    activities = [rank.activity for rank in facts if rank.activity is not None and rank.activity.step_s]
    if len(activities) < len(facts):
        return {}
    own = [activity.own_s for activity in activities]
    exchanged, exposed = (
        sum(activity.exchange_s for activity in activities),
        sum(activity.exposed_s for activity in activities),
    )
    whole = sum(activity.step_s for activity in activities)
    values = {f"rank{rank.rank}_own_step_time_s": time_s for rank, time_s in zip(facts, own, strict=True)}
    values |= {"exposed_communication_share": exposed / whole, "communication_share": exchanged / whole}
    values |= {"communication_overlap": 1 - exposed / exchanged} if exchanged else {}
    values |= {"rank_imbalance": max(own) * len(own) / sum(own)} if sum(own) else {}
    return values


# --- strategies -------------------------------------------------------------------------------------------------------


def distribute(model: Any, strategy: Strategy, *, device: str, repair: Repair) -> Any:
    """Wrap `model` for training on several ranks by torch's DistributedDataParallel or FSDP2; returns the callable of
    its forward pass. With FSDP2 each block of the model is sharded separately and then the rest, as in its
    documentation and in accelerate.

    Args:
        model: the unsharded PEFT model with its adapter, on this rank's device.
        strategy: "ddp" or "fsdp2".
        device: device of this rank.
        repair: "quant_state" sets the quantisation state of a 4-bit layer on its gathered weight, since bitsandbytes
            registers a new weight inside each forward pass.
    """
    if strategy == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=[0] if device.startswith("cuda") else None)
    from torch.distributed.fsdp import fully_shard

    for layer in linear4bit_layers(model):
        layer.quant_state = layer.weight.quant_state  # sharding replaces the weight
    if repair == "quant_state":
        keep_quantisation_states()
    decoder_layers = set(getattr(model.get_base_model(), "_no_split_modules", None) or ())
    for block in [module for module in model.modules() if type(module).__name__ in decoder_layers]:
        fully_shard(block)
    return fully_shard(model)


def keep_quantisation_states() -> None:
    """Repair bitsandbytes for FSDP2 in this process.

    `fix_4bit_weight_quant_state_from_module` registers a new parameter made from the one that FSDP2 has gathered for a
    forward pass, and changes to the new one are lost at the next gathering. A state set on the gathered parameter
    itself persists.
    """
    import bitsandbytes.nn.modules as modules

    def set_state(layer: Any) -> None:
        if getattr(layer.weight, "quant_state", None) is None:
            layer.weight.quant_state = layer.quant_state

    modules.fix_4bit_weight_quant_state_from_module = set_state


@contextlib.contextmanager
def exchanging_gradients(forward: Any, *, now: bool) -> Iterator[None]:
    """Run a backward pass that exchanges gradients at its end, or only accumulates them if another pass follows."""
    if isinstance(forward, torch.nn.parallel.DistributedDataParallel):
        with contextlib.nullcontext() if now else forward.no_sync():
            yield
        return
    forward.set_requires_gradient_sync(now)
    yield


def reshard(model: Any) -> None:
    """Reshard parameters that a forward pass without a backward pass has left gathered."""
    for module in model.modules():
        if hasattr(module, "set_requires_gradient_sync"):  # a method of modules sharded by FSDP2
            module.reshard()
