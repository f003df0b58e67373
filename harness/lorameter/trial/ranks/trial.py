"""A trial of several ranks, with the interface of any other trial.

Its process trains nothing: it forks the ranks, passes each command on to all of them, and makes one answer of theirs.
So it can tell which of them died or hangs while the others wait, and end these, who would wait for ever. Beside the
ranks it can fork one that trains alone on the same batches, and takes turns with all of them: what a scaling efficiency
is measured against within the same seconds, and losses are compared with.
"""

from __future__ import annotations

import dataclasses
import os
import re
import selectors
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lorameter import wire
from lorameter.errors import shorten
from lorameter.machine.nvml import VARIABLE, visible_devices
from lorameter.machine.processes import exit_words
from lorameter.records.metrics import LOSSES
from lorameter.records.record import Failure, Notice, PartialRecord, judge_required
from lorameter.studies.request import TrialRequest
from lorameter.trial.building.shared import SharedBase
from lorameter.trial.ranks.agreement import compare_losses
from lorameter.trial.ranks.rank_process import RankProcess

OF_RANKS, OF_ONE = 0.5, 0.4
"""How much of a command's time the ranks have together, and one alone after or before them: the rest is for saying
which of them gave no answer."""
GRACE_S = 5.0
"""Time of the others after one has failed: a rank that waits for it learns so at once, or never."""
_WAITING = re.compile(r"gloo|nccl|process ?group|timed? ?out|connection (closed|reset)|broken pipe", re.IGNORECASE)
"""What the error of a rank says that waited for another in vain."""
IMBALANCED = 1.4
"""The slowest rank's own time over the mean of all from which the others are said to wait for it."""
SUMMED = ("device_energy_train_j", "energy_tokens")
"""Values that are those of all ranks together."""
ONE_RANK = ("build", "warm_up", "turn")
"""What one rank alone does as well."""


class TrialOfRanks:
    """Implements what `serve` asks of a trial, by the ranks' answers."""

    shared: SharedBase | None = None
    """No base that others could be on."""

    def __init__(self, request: TrialRequest) -> None:
        self._request = request
        self._timeout_s = OF_RANKS * request.protocol.step_timeout_s
        self._one_timeout_s = OF_ONE * request.protocol.step_timeout_s
        self._losses: dict[str, list[float]] = {"ranks": [], "one": []}
        self._turns = 0
        self._members: list[RankProcess] = []
        for rank in range(request.workload.ranks):
            self._fork(f"rank {rank} of {request.workload.ranks}", _rank_maker(request, rank))
        self._one: RankProcess | None = None
        if request.workload.scaling and "steps" in request.measures:
            self._one = self._fork("one rank alone", _one_maker(request))

    def _fork(self, name: str, make: Callable[[], Any]) -> RankProcess:
        member = RankProcess(name, make, list(self._members))
        self._members.append(member)
        return member

    def run(self, command: str, **arguments: Any) -> PartialRecord:
        """Have all ranks carry out a command; a failure of one ends them all."""
        one_first = command == "turn" and self._turns % 2 == 1  # neither always runs on what the other has left warm
        self._turns += command == "turn"
        beside = self._ask_one(command, arguments) if one_first else PartialRecord()
        fragment = self._ask_ranks(command, arguments)
        if fragment.status != "ok":
            self._end_all()
            return fragment
        if not one_first:
            beside = self._ask_one(command, arguments)
        fragment = msgspec.structs.replace(
            fragment, samples=fragment.samples | beside.samples, notices=fragment.notices + beside.notices
        )
        self._losses["ranks"] += _losses_of(fragment)
        if command == "verify" and (notice := _imbalance(fragment.values)):
            fragment = fragment.with_notice(notice)
        return self._compared(fragment) if command == "finish_training" else fragment

    def _ask_ranks(self, command: str, arguments: Mapping[str, Any]) -> PartialRecord:
        ranks = [member for member in self._members if member is not self._one]
        answers = _answers(ranks, command, arguments, self._timeout_s)
        failed = _failure(ranks, answers, command, self._timeout_s)
        return failed if failed is not None else _merged([answers[member] for member in ranks])

    def _ask_one(self, command: str, arguments: Mapping[str, Any]) -> PartialRecord:
        """What one rank alone has to add; where it fails it is left out, and the trial continues without it."""
        if self._one is None or command not in ONE_RANK:
            return PartialRecord()
        answers = _answers([self._one], command, arguments, self._one_timeout_s)
        failed = _failure([self._one], answers, command, self._one_timeout_s)
        if failed is not None and failed.failure is not None:
            self._one.end()
            self._members.remove(self._one)
            self._one = None
            return PartialRecord().with_notice(_rank_failure_notice(self._request.variant.name, failed.failure))
        fragment = answers[self._one]
        self._losses["one"] += _losses_of(fragment)
        times = fragment.samples.get("step_time_s", ())
        return PartialRecord(samples={"one_rank_step_time_s": times} if times else {})

    def _compared(self, fragment: PartialRecord) -> PartialRecord:
        """The fragment with the check of what was trained, where one rank alone has trained the same."""
        if self._one is None:
            return fragment
        request = self._request
        check = compare_losses(self._losses["ranks"], self._losses["one"], request.variant, request.workload.ranks)
        added = msgspec.structs.replace(fragment, checks=(*fragment.checks, check))
        if check["required"] is None:
            return added
        judged = judge_required(
            PartialRecord(checks=(check,)), {check["path"]: True}, name=request.variant.name,
            allow_fallback=request.allow_fallback,
        )  # fmt: skip
        return msgspec.structs.replace(
            added, status=judged.status, failure=judged.failure, notices=added.notices + judged.notices
        )

    def _end_all(self) -> None:
        for member in self._members:
            member.end()


def _rank_maker(request: TrialRequest, rank: int) -> Callable[[], Any]:
    def make() -> Any:
        from lorameter.trial.ranks.process_group import ProcessGroup
        from lorameter.trial.ranks.rank import RankTrial

        _take_card(request.device, rank)
        party = ProcessGroup(rank, request.workload.ranks)
        party.join(Path(request.scratch), request.device, request.protocol.step_timeout_s)
        return RankTrial(request, party)

    return make


def _one_maker(request: TrialRequest) -> Callable[[], Any]:
    def make() -> Any:
        from lorameter.trial.ranks.rank import OneRank

        _take_card(request.device, 0)
        workload = dataclasses.replace(request.workload, ranks=1, strategy="", repair="")
        return OneRank(dataclasses.replace(request, workload=workload, measures=("steps",)), SharedBase())

    return make


def _take_card(device: str, rank: int) -> None:
    """Let this process see one GPU alone, that of its rank; nothing has initialised CUDA yet."""
    if device.startswith("cuda"):
        visible = visible_devices(os.environ)
        os.environ[VARIABLE] = str(rank if visible is None else visible[rank])


def _answers(
    members: Sequence[RankProcess], command: str, arguments: Mapping[str, Any], timeout_s: float
) -> dict[RankProcess, PartialRecord]:
    """What each has to say, in the order in which they said it; those that died or gave no answer in time are not in
    it. Once one has failed the others have `GRACE_S` left."""
    answers: dict[RankProcess, PartialRecord] = {}
    for member in members:
        member.send(command, dict(arguments))
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as waiting:
        for member in members:
            waiting.register(member, selectors.EVENT_READ)
        while waiting.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                member = key.fileobj  # type: ignore[assignment]
                fallen = False
                try:
                    answer = member.receive()
                except wire.ClosedError:
                    waiting.unregister(member)
                    member.reap()
                    fallen = True
                else:
                    if answer is not None:
                        waiting.unregister(member)
                        answers[member] = answer
                        fallen = answer.status != "ok"
                if fallen:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
    return answers


def _failure(
    members: Sequence[RankProcess], answers: Mapping[RankProcess, PartialRecord], command: str, timeout_s: float
) -> PartialRecord | None:
    """The outcome of a trial in which a rank failed, died or hangs; None if all are well. A rank that waited for one of
    those in vain is not the cause."""
    bad = [(member, answer, answer.failure) for member, answer in answers.items() if answer.failure is not None]
    own = sorted((one for one in bad if not _waited(one[2])), key=lambda one: one[1].status != "oom")
    died = [member for member in members if member.code is not None]
    silent = ", ".join(member.name for member in members if member.code is None and member not in answers)
    if own:
        member, answer, failure = own[0]
        same = len(own) == len(members) and len({one[2].message for one in own}) == 1
        message = failure.message if same else f"{member.name}: {failure.message}"
        failed = PartialRecord().failed(answer.status, msgspec.structs.replace(failure, message=message))
        return msgspec.structs.replace(failed, checks=answer.checks, values=answer.values)
    if died:
        message = (
            f"{died[0].name} ended with {exit_words(died[0].code)} during {command}; the others were ended with it"
        )
        if died[0].code == -signal.SIGKILL:
            message += ". It was killed from outside, or by the kernel for want of memory (see dmesg)"
        return PartialRecord().failed("crashed", Failure(phase=command, kind="RankDied", message=message))
    if silent:
        message = f"{silent} gave no answer within {timeout_s:g} s during {command}"
        if bad:
            message = f"{silent} hangs in {command}: {', '.join(one[0].name for one in bad)} waited for it in vain"
        failure = Failure(phase=command, kind="Silent", message=f"{message}; all were killed")
        return PartialRecord().failed("timeout", failure)
    if bad:  # all of them waited for each other
        member, answer, failure = bad[0]
        message = f"{member.name}: {shorten(failure.message)}"
        return PartialRecord().failed(answer.status, msgspec.structs.replace(failure, message=message))
    return None


def _waited(failure: Failure) -> bool:
    return bool(_WAITING.search(failure.message) or failure.kind.startswith("Dist"))


def _merged(answers: Sequence[PartialRecord]) -> PartialRecord:
    """One answer of all ranks': that of the first, with the memory of the one that takes most and of each by its
    number, and the values of all."""
    first, memory = answers[0], dict[str, int]()
    for kind in dict.fromkeys(kind for answer in answers for kind in answer.memory):
        sizes = [answer.memory.get(kind, 0) for answer in answers]
        memory |= {kind: max(sizes)} | {f"rank{rank}_{kind}": size for rank, size in enumerate(sizes)}
    notices = tuple(dict.fromkeys(notice for answer in answers for notice in answer.notices))
    return msgspec.structs.replace(
        first, memory=memory, values=merge_values([answer.values for answer in answers]), notices=notices
    )


def merge_values(every: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Values of all ranks as those of one trial: energy and its tokens are summed, of what else was found on GPUs the
    worst rank counts, and the rest is that of the first.

    Energy is left out where a rank has none: it would be that of some, over the tokens of all.
    """
    merged: dict[str, float] = {}
    for key in dict.fromkeys(key for values in every for key in values):
        found = [values[key] for values in every if key in values]
        if key in SUMMED:
            if len(found) == len(every):
                merged[key] = sum(found)
        elif key.startswith("device_") and key != "device_samples_train":
            merged[key] = min(found) if "_min_" in key or "_margin_" in key else max(found)
        else:
            merged[key] = found[0]
    return merged


def _losses_of(fragment: PartialRecord) -> list[float]:
    return [loss for name in LOSSES for loss in fragment.samples.get(name, ())]


def _imbalance(values: Mapping[str, float]) -> Notice | None:
    """That one rank has the others wait, by what each takes of its own in a profiled step."""
    own = {int(found[1]): time_s for key, time_s in values.items() if (found := _OWN.fullmatch(key))}
    if values.get("rank_imbalance", 1.0) < IMBALANCED:
        return None
    slowest = max(own, key=lambda rank: own[rank])
    rest = [time_s for rank, time_s in own.items() if rank != slowest]
    return Notice(
        code="ranks-imbalanced",
        message=f"rank {slowest} takes {own[slowest]:.3g} s of its own in a step and the others "
        f"{sum(rest) / len(rest):.3g} s: they wait for it.",
        remedy="Check other processes on its GPU, the GPU's clocks, and how many tokens its part of a batch holds.",
    )


_OWN = re.compile(r"rank([0-9]+)_own_step_time_s")


def _rank_failure_notice(variant: str, failure: Failure) -> Notice:
    return Notice(
        code="one-rank-failed",
        message=f"{variant}: training on one rank failed, so there is no scaling efficiency and no loss to compare "
        f"with: {shorten(failure.message)}",
        remedy="Write scaling = false in [workload] where the model does not fit one device.",
    )
