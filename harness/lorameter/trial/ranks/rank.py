"""The trial as one rank carries it out: the same commands, each step between barriers, and one answer for all.

After each step, outside of its time, the ranks tell each other how long theirs took and what their part of the loss is.
So all of them take the same decisions (when a warm-up has ended), and a step's time is that of the slowest.
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
from lorameter.machine.gpus import GENERATIONS
from lorameter.records.record import PartialRecord
from lorameter.studies.request import TrialRequest
from lorameter.studies.workload import Repair
from lorameter.trial.building import peft_methods
from lorameter.trial.building.build import SharedBase, TrainableModel, build
from lorameter.trial.building.quantising import linear4bit_layers
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.process import Lap
from lorameter.trial.step import TrainStep, loss_of, model_inputs
from lorameter.trial.trial import ISOLATED, Trial, as_data, judge_checks

_TRAINED = "ranks.trained"
PATIENCE = 0.4
"""How long an exchange may take, as a share of a command's time and less than the ranks have of it: then those who wait
say so, and who hangs is known."""


class ProcessGroup:
    """The process group of a trial's ranks, and what one rank exchanges with the others outside of every timed step."""

    def __init__(self, rank: int, ranks: int, folder: Path, device: str, timeout_s: float) -> None:
        """Meet the others, in a file of this folder; NCCL on a GPU, gloo on a CPU.

        Ranks of one trial are on one machine, so gloo is kept off the network unless the user names an interface.
        """
        self.rank, self.ranks = rank, ranks
        self._device = device
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        distributed.init_process_group(
            "nccl" if self._cuda else "gloo",
            init_method=(folder / "ranks").as_uri(),
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=max(1.0, PATIENCE * timeout_s)),
            device_id=torch.device("cuda", 0) if self._cuda else None,
        )

    @property
    def _cuda(self) -> bool:
        return self._device.startswith("cuda")

    def barrier(self) -> None:
        """Wait until all ranks are here, and on a GPU until its queue is empty."""
        distributed.barrier()
        if self._cuda:
            torch.cuda.synchronize()

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of every rank, in their order; each gives as many."""
        own = torch.tensor(list(values), dtype=torch.float64, device=self._device)
        found = [torch.empty_like(own) for _ in range(self.ranks)]
        distributed.all_gather(found, own)
        return [one.tolist() for one in found]

    def gather_data(self, data: Any) -> list[Any]:
        """The data of every rank, in their order."""
        found: list[Any] = [None] * self.ranks
        distributed.all_gather_object(found, data)
        return found


class RankStep(TrainStep):
    """A step on this rank's part of each batch; its loss is this rank's part, and the parts add up to the loss."""

    def __init__(self, trainee: TrainableModel, stream: TokenStream, request: TrialRequest) -> None:
        super().__init__(trainee, stream, request.variant, request.device)
        self._ranks = request.workload.ranks

    @contextlib.contextmanager
    def without_clipping(self) -> Iterator[None]:
        """Steps that give the optimizer the gradients as they were exchanged."""
        clip, self._clip = self._clip, 0.0
        try:
            yield
        finally:
            self._clip = clip

    def gradients(self) -> torch.Tensor:
        """Forward and backward over this rank's part of the accumulated batches."""
        total = torch.zeros((), device=self._device)
        for left in reversed(range(self._accumulate)):
            batch, share = self._stream.take_share()
            with exchanging(self._trainee.forward, now=not left):
                part = self.loss(batch) * (share / self._accumulate)
                (part * self._ranks).backward()  # gradients are averaged over ranks, and the parts of a mean add up
            total += part.detach()
        return total


class RankTrial(Trial):
    """State of one rank of a trial between commands."""

    def __init__(self, request: TrialRequest, party: ProcessGroup) -> None:
        super().__init__(request, SharedBase(), generations=GENERATIONS + 1)
        self._party = party
        self._isolation: list[Check] = []
        self._base_loss_whole = float("nan")
        self._laps: list[list[float]] = []
        """Of each step since the last turn began: the time of every rank in it, in seconds."""

    def build(self) -> PartialRecord:
        """Load, attach, meet the others' models, take the first step."""
        fragment, ranks = super().build(), self._party.ranks
        threads = float(ranks * self._request.threads)  # so that waiting for each other is not taken for other work
        return msgspec.structs.replace(fragment, values=fragment.values | {"ranks": float(ranks), "threads": threads})

    def turn(self, steps: int) -> PartialRecord:
        """`steps` timed steps; tokens are those of all ranks."""
        self._laps.clear()
        fragment = super().turn(steps)
        tokens = self._party.gather([fragment.samples[key][0] for key in ("turn_tokens", "turn_padded_tokens")])
        real, padded = map(sum, zip(*tokens, strict=True))
        samples = fragment.samples | {"turn_tokens": (real,), "turn_padded_tokens": (padded,)}
        samples |= {f"rank{rank}_step_time_s": times for rank, times in enumerate(zip(*self._laps, strict=True))}
        return msgspec.structs.replace(fragment, samples=samples)

    def finish_training(self, steps: int | None = None) -> PartialRecord:
        """The same, and whether the ranks have trained one adapter up to the last step."""
        fragment = super().finish_training(steps)
        if fragment.status != "ok":
            return fragment
        trainee = self._built.trainee
        shard_again(trainee.model)
        every = self._party.gather_data((fingerprints(trainee.model), counted_updates([trainee.optimizer])))
        shown = [
            RankEvidence(rank=rank, adapter=adapter, updates=self._steps_taken, counted=counted)
            for rank, (adapter, counted) in enumerate(every)
        ]
        check = judge_safely(_TRAINED, True, lambda: compare_adapters(shown, steps=self._steps_taken))
        added = msgspec.structs.replace(fragment, checks=(*fragment.checks, *as_data([check])))
        return judge_checks(added, [check], self._request)

    def _agree(self, decision: bool) -> bool:
        """What the first rank decides: the ranks' clocks differ, and all of them take the same steps."""
        return bool(self._party.gather([float(decision)])[0][0])

    def _take_step(self, meanwhile: Callable[[], object] | None = None) -> tuple[float, Lap]:
        self._party.barrier()
        loss, lap = super()._take_step(meanwhile)
        every = self._party.gather([lap.time_s, lap.cpu_time_s, loss])
        self._laps.append([time_s for time_s, _, _ in every])
        slowest = max(every)
        return sum(part for _, _, part in every), Lap(slowest[0], slowest[1])

    def _base_loss(self, forward: Any, model: Any, stream: TokenStream) -> float:
        """Of the first batch by the base alone, in the mode of training, and with nothing rearranged for it."""
        position = stream.position()
        stream.restore((0, *position[1:]))
        batch = stream.take()
        stream.restore(position)
        request = self._request
        with torch.no_grad(), without_repacking(model), peft_methods.without_adapter(model):
            return float(loss_of(forward, batch, device=request.device, autocast=request.variant.autocast))

    def _open_stream(self) -> TokenStream:
        request, party = self._request, self._party
        path, workload, variant = Path(request.tokens_path), request.workload, request.variant
        return TokenStream(path, workload, variant, request.device, rank=party.rank, ranks=party.ranks)

    def _build_trainee(self, stream: TokenStream) -> TrainableModel:
        request = self._request

        def together(model: Any) -> Any:
            self._base_loss_whole = self._base_loss(model, model, stream)
            packed = stream.packed_batch()  # a rank's own rows of a step may hold one record each
            if packed is not None:  # once it is sharded, no rank could make a forward alone
                self._isolation = [kernels_check.probe_isolation(model, model_inputs(packed))]
            return distribute(model, self._strategy, device=request.device, repair=request.workload.repair)

        return build(request, steps=self._total_steps, shared=self.shared, distribute=together, rank=self._party.rank)

    def _make_step(self, trainee: TrainableModel, stream: TokenStream) -> TrainStep:
        return RankStep(trainee, stream, self._request)

    def _check(self, step: Callable[[], None], required: Mapping[str, Any]) -> tuple[list[Check], dict[str, float]]:
        """What every rank finds of a step, and what they are to each other, the same on all of them."""
        model = self._built.trainee.model
        wanted = dict.fromkeys(PATHS, True) | {path: value for path, value in required.items() if path != ISOLATED}
        shard_again(model)
        with cast(RankStep, self._built.step).without_clipping():
            checks = [*kernels_check.verify(model, step, wanted), *self._isolation]
        shard_again(model)
        facts = self._observe()
        shard_again(model)
        gathered = self._party.gather_data((checks, facts))
        every = [one for _, one in gathered]
        merged = merge_checks([found for found, _ in gathered])
        return [*merged, *judge_ranks(every, self._strategy)], _activity(every)

    def _observe(self) -> RankFacts:
        """The caller restores the stream."""
        trainee, stream, step = self._built.trainee, self._built.stream, self._built.step
        position = stream.position()
        frozen = not self._request.variant.trains_base  # else biases of the base train, and its loss moves with them
        return observe_rank(
            trainee.model,
            step.gradients,
            step.update,
            lambda: stream.restore(position),
            self._party.barrier,
            (lambda: self._base_loss(trainee.forward, trainee.model, stream)) if frozen else None,
            before=self._base_loss_whole,
            whole=stream.upcoming(self._request.variant.gradient_accumulation),
            rank=self._party.rank,
            ranks=self._party.ranks,
        )

    @property
    def _strategy(self) -> Strategy:
        return cast(Strategy, self._request.workload.strategy)


def _activity(facts: Sequence[RankFacts]) -> dict[str, float]:
    """How the ranks spent their profiled steps: the share in which they exchanged or waited, how much of that was
    hidden behind what they computed, and how unlike the times are that they take of their own."""
    shares = [one.activity for one in facts if one.activity is not None and one.activity.step_s]
    if len(shares) < len(facts):
        return {}
    own = [one.own_s for one in shares]
    exchanged, exposed = sum(one.exchange_s for one in shares), sum(one.exposed_s for one in shares)
    whole = sum(one.step_s for one in shares)
    values = {f"rank{one.rank}_own_step_time_s": time_s for one, time_s in zip(facts, own, strict=True)}
    values |= {"exposed_communication_share": exposed / whole, "communication_share": exchanged / whole}
    values |= {"communication_overlap": 1 - exposed / exchanged} if exchanged else {}
    values |= {"rank_imbalance": max(own) * len(own) / sum(own)} if sum(own) else {}
    return values


# --- strategies -------------------------------------------------------------------------------------------------------


def distribute(model: Any, strategy: Strategy, *, device: str, repair: Repair) -> Any:
    """Have `model` train together with those of the other ranks, by torch's own DistributedDataParallel or FSDP2, as a
    script would ask for them; returns what is called in its place. With FSDP2 each block of the model is sharded by
    itself and then the rest, which is what its documentation and accelerate do.

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
