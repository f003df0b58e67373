"""The trial as one rank carries it out: the same commands, each step between barriers, and one answer for all.

After each step, outside of its time, the ranks tell each other how long theirs took and what their part of the loss is.
So all of them take the same decisions (when a warm-up has ended), and a step's time is that of the slowest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, cast

import msgspec
import torch

import kernels_check
from kernels_check.check import Check, judge_safely
from kernels_check.judges.ranks import PATHS, compare_adapters
from kernels_check.observe.modules import without_repacking
from kernels_check.observe.ranks import RankEvidence, counted_updates, fingerprints
from kernels_check.ranks import RankFacts, RankTime, Strategy, judge_ranks, merge_checks, observe_rank
from lorameter.records.record import PartialRecord
from lorameter.studies.request import TrialRequest
from lorameter.trial.building import peft_methods
from lorameter.trial.building.build import TrainableModel, build
from lorameter.trial.building.shared import SharedBase
from lorameter.trial.clock import Lap
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.ranks.process_group import ProcessGroup
from lorameter.trial.ranks.strategies import distribute, exchanging, shard_again
from lorameter.trial.step import TrainStep, loss_of
from lorameter.trial.training import as_data, judge_checks
from lorameter.trial.trial import Trial

_ISOLATED = "packing.isolated"
_TRAINED = "ranks.trained"


class RankStep(TrainStep):
    """A step on this rank's part of each batch; its loss is this rank's part, and the parts add up to the loss."""

    def __init__(self, trainee: TrainableModel, stream: TokenStream, request: TrialRequest) -> None:
        super().__init__(trainee, stream, request.variant, request.device)
        self._ranks = request.workload.ranks

    def __call__(self) -> torch.Tensor:
        """Forward and backward over this rank's part of the accumulated batches, then the update of all."""
        total = self.gradients()
        self.update()
        return total

    @contextlib.contextmanager
    def without_clipping(self) -> Iterator[None]:
        """Steps that give the optimizer the gradients as they were exchanged."""
        clip, self._clip = self._clip, 0.0
        try:
            yield
        finally:
            self._clip = clip

    def gradients(self) -> torch.Tensor:
        """The same without the update."""
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

    GENERATIONS: ClassVar[int] = Trial.GENERATIONS + 1

    def __init__(self, request: TrialRequest, party: ProcessGroup) -> None:
        super().__init__(request, SharedBase())
        self._party = party
        self._isolation: Check | None = None
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
        counted = [key for key in ("turn_tokens", "turn_padded_tokens") if key in fragment.samples]
        every = self._party.gather([fragment.samples[key][0] for key in counted])
        samples = dict(fragment.samples)
        samples |= {key: (sum(one[index] for one in every),) for index, key in enumerate(counted)}
        samples |= {
            f"rank{rank}_step_time_s": tuple(lap[rank] for lap in self._laps) for rank in range(self._party.ranks)
        }
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

    def _open_stream(self) -> TokenStream:
        request, party = self._request, self._party
        path, workload, variant = Path(request.tokens_path), request.workload, request.variant
        self._opened = TokenStream(path, workload, variant, request.device, rank=party.rank, ranks=party.ranks)
        return self._opened

    def _base_loss(self, forward: Any, model: Any) -> float:
        """Of the first batch by the base alone, in the mode of training, and with nothing rearranged for it."""
        position = self._opened.position()
        self._opened.restore((0, *position[1:]))
        batch = self._opened.take()
        self._opened.restore(position)
        autocast = self._request.variant.autocast
        cast_to = getattr(torch, autocast) if autocast else None
        with torch.no_grad(), without_repacking(model), peft_methods.without_adapter(model):
            return float(loss_of(forward, batch, device=self._request.device, autocast=cast_to))

    def _build_trainee(self) -> TrainableModel:
        request = self._request
        workload = request.workload

        def together(model: Any) -> Any:
            self._base_loss_whole = self._base_loss(model, model)
            packed = self._opened.packed_batch()  # a rank's own rows of a step may hold one record each
            if packed is not None:
                inputs = {key: value for key, value in packed.items() if key != "labels"} | {"use_cache": False}
                self._isolation = kernels_check.probe_isolation(model, inputs)  # sharded, no rank could make a forward
            return distribute(model, self._strategy, device=request.device, repair=workload.repair)

        return build(request, steps=self._total_steps, shared=self.shared, distribute=together, rank=self._party.rank)

    def _make_step(self, trainee: TrainableModel, stream: TokenStream) -> TrainStep:
        return RankStep(trainee, stream, self._request)

    def _check(
        self, step: Callable[[], None], required: Mapping[str, Any], batch: Mapping[str, Any] | None
    ) -> tuple[Sequence[Check], Mapping[str, float]]:
        """What every rank finds of a step, and what they are to each other, the same on all of them."""
        shard_again(self._built.trainee.model)
        wanted = dict.fromkeys(PATHS, True) | {path: value for path, value in required.items() if path != _ISOLATED}
        with cast(RankStep, self._built.step).without_clipping():
            checks, _ = super()._check(step, wanted, None)
        checks = [*checks, *filter(None, [self._isolation])]
        shard_again(self._built.trainee.model)
        facts = self._observe()
        shard_again(self._built.trainee.model)
        gathered = self._party.gather_data(([asdict(check) for check in checks], asdict(facts)))
        every = [_facts(one) for _, one in gathered]
        merged = merge_checks([[Check(**check) for check in one] for one, _ in gathered])
        return [*merged, *judge_ranks(every, self._strategy)], _activity(every)

    def _observe(self) -> RankFacts:
        parts = self._built
        trainee, stream, step = parts.trainee, parts.stream, cast(RankStep, parts.step)
        position = stream.position()
        frozen = not self._request.variant.trains_base  # else biases of the base train, and its loss moves with them
        return observe_rank(
            trainee.model,
            step.gradients,
            step.update,
            lambda: stream.restore(position),
            self._party.barrier,
            (lambda: self._base_loss(trainee.forward, trainee.model)) if frozen else None,
            before=self._base_loss_whole,
            whole=stream.upcoming(self._request.variant.gradient_accumulation),
            rank=self._party.rank,
            ranks=self._party.ranks,
        )  # the caller of the check restores the stream

    @property
    def _strategy(self) -> Strategy:
        return cast(Strategy, self._request.workload.strategy)


class OneRank(Trial):
    """A trial that trains alone what the ranks train together, in a process that is forked as theirs are."""

    GENERATIONS = RankTrial.GENERATIONS


def _facts(data: Mapping[str, Any]) -> RankFacts:
    """The facts of another rank, from its data."""
    activity = None if data["activity"] is None else RankTime(**data["activity"])
    return RankFacts(**{**data, "activity": activity})


def _activity(facts: Sequence[RankFacts]) -> dict[str, float]:
    """How the ranks spent their profiled steps: the share in which they exchanged or waited, how much of that was
    hidden behind what they computed, and how unlike the times are that they take of their own."""
    shares = [one.activity for one in facts if one.activity is not None]
    if len(shares) < len(facts) or not all(one.step_s for one in shares):
        return {}
    own = [one.own_s for one in shares]
    exchanged = sum(one.exchange_s for one in shares)
    values = {f"rank{one.rank}_own_step_time_s": time_s for one, time_s in zip(facts, own, strict=True)}
    values |= {"exposed_communication_share": sum(one.exposed_s for one in shares) / sum(one.step_s for one in shares)}
    values |= {"communication_share": exchanged / sum(one.step_s for one in shares)}
    if exchanged:
        values |= {"communication_overlap": 1 - sum(one.exposed_s for one in shares) / exchanged}
    if sum(own):
        values |= {"rank_imbalance": max(own) * len(own) / sum(own)}
    return values
