"""A trial with several ranks, with the interface of any other trial.

Its process does not train: it forks the ranks, passes each command to all of them, and merges their answers. So it can
identify a rank that died or hangs, and end the others, which would wait forever. It can fork a further process that
trains on a single rank with the same batches and takes turns with the ranks: it is the baseline of the scaling
efficiency and of the losses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

import msgspec

from kernels_check.check import Check
from lorameter import wire
from lorameter.errors import shorten
from lorameter.machine.nvml import GENERATIONS, VARIABLE, visible_devices
from lorameter.machine.processes import exit_words, explain_kill, fork_process
from lorameter.measurements.steps import losses_of_steps
from lorameter.records.os_errors import failed_record
from lorameter.records.record import Failure, Notice, PartialRecord, Status
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant, Variant
from lorameter.trial.building.build import SharedBase, judge_checks

SHARE_OF_RANKS, SHARE_OF_SINGLE = 0.5, 0.4
"""Shares of a command's time limit for all ranks and for the single rank; the rest is for reporting which of them did
not answer."""
GRACE_S = 5.0
"""Seconds for the other ranks after one has failed: a rank that waits for it fails at once, or never."""
_WAITING = re.compile(r"gloo|nccl|process ?group|timed? ?out|connection (closed|reset)|broken pipe", re.IGNORECASE)
"""Matches the error of a rank that waited in vain for another one."""
SUMMED_VALUES = ("device_energy_train_j", "energy_tokens")
"""Values that are summed over all ranks."""
SINGLE_RANK_COMMANDS = ("build", "warm_up", "turn")
"""Commands of the single-rank process."""


class TrialOfRanks:
    """Implements the interface of `Trial` for `serve`, with the merged answers of its ranks."""

    shared: SharedBase | None = None
    """None: no other trial shares its base."""

    def __init__(self, request: TrialRequest) -> None:
        self._request = request
        self._losses: dict[str, list[float]] = {"ranks": [], "one": []}
        self._turns = 0
        ranks = request.workload.ranks
        self._ranks = [
            RankProcess(f"rank {rank} of {ranks}", functools.partial(_make_rank, request, rank))
            for rank in range(ranks)
        ]
        self._single: RankProcess | None = None
        if request.workload.scaling and "steps" in request.measures:
            self._single = RankProcess("one rank alone", functools.partial(_make_single, request))

    def run(self, command: str, **arguments: Any) -> PartialRecord:
        """Execute a command on all ranks; a failure of one ends them all."""
        single_first = command == "turn" and self._turns % 2 == 1  # so that each finds the caches of the other
        self._turns += command == "turn"
        alone = self._ask_single(command, arguments) if single_first else PartialRecord()
        fragment = self._ask(self._ranks, command, arguments, SHARE_OF_RANKS)
        if fragment.status != "ok":
            self.end()
            return fragment
        alone = alone if single_first else self._ask_single(command, arguments)
        self._losses["ranks"] += losses_of_steps(fragment)
        fragment = msgspec.structs.replace(
            fragment, samples=fragment.samples | alone.samples, notices=(*fragment.notices, *alone.notices)
        )
        if command == "finish_training" and self._single is not None:
            variant, ranks = self._request.variant, self._request.workload.ranks
            check = compare_losses(self._losses["ranks"], self._losses["one"], variant, ranks)
            return judge_checks(fragment, [check], self._request)
        return fragment

    def _ask(
        self, members: Sequence[RankProcess], command: str, arguments: dict[str, Any], share: float
    ) -> PartialRecord:
        """The merged answer of these processes, within a share of a command's time limit."""
        timeout_s = share * self._request.protocol.step_timeout_s
        answers = _collect(members, command, arguments, timeout_s)
        return _failure(members, answers, command, timeout_s) or _merge([answers[member] for member in members])

    def _ask_single(self, command: str, arguments: dict[str, Any]) -> PartialRecord:
        """The addition of the single rank; if it fails it is dropped, and the trial continues without it."""
        if self._single is None or command not in SINGLE_RANK_COMMANDS:
            return PartialRecord()
        fragment = self._ask([self._single], command, arguments, SHARE_OF_SINGLE)
        if fragment.failure is not None:
            self._single.end()
            self._single = None
            return PartialRecord().with_notice(
                Notice(
                    code="one-rank-failed",
                    message=f"{self._request.variant.name}: training on one rank failed, so there is no scaling "
                    f"efficiency and no loss to compare with: {shorten(fragment.failure.message)}",
                    remedy="Write scaling = false in [workload] where the model does not fit one device.",
                )
            )
        self._losses["one"] += losses_of_steps(fragment)
        times = fragment.samples.get("step_time_s", ())
        return PartialRecord(samples={"one_rank_step_time_s": times} if times else {})

    def end(self) -> None:
        """End all processes."""
        for member in [*self._ranks, *([self._single] if self._single else [])]:
            member.end()


def _make_rank(request: TrialRequest, rank: int) -> Any:
    from lorameter.trial.ranks.rank import RankTrial

    _restrict_to_gpu(request.device, rank)
    return RankTrial(request, rank)


def _make_single(request: TrialRequest) -> Any:
    from lorameter.trial.trial import Trial

    _restrict_to_gpu(request.device, 0)
    workload = dataclasses.replace(request.workload, ranks=1, strategy="", repair="")
    alone = dataclasses.replace(request, workload=workload, measures=("steps",))
    return Trial(alone, SharedBase(), generations=GENERATIONS + 1)


def _restrict_to_gpu(device: str, rank: int) -> None:
    """Restrict this process to the GPU of its rank; CUDA is not yet initialised."""
    if device.startswith("cuda"):
        visible = visible_devices(os.environ)
        os.environ[VARIABLE] = str(rank if visible is None else visible[rank])


def _collect(
    members: Sequence[RankProcess], command: str, arguments: dict[str, Any], timeout_s: float
) -> dict[RankProcess, PartialRecord]:
    """The answers of the processes in the order of arrival, without those that died or did not answer in time. After a
    failure, the others have `GRACE_S` left."""
    for member in members:
        with contextlib.suppress(wire.ClosedError):  # `receive` detects that the process has ended
            wire.send(member.connection, wire.Command(command, arguments=arguments))
    answers: dict[RankProcess, PartialRecord] = {}
    waiting: dict[Any, RankProcess] = {member.connection: member for member in members}
    deadline = time.monotonic() + timeout_s
    while waiting and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(waiting), left):
            member = waiting.pop(connection)
            answer = member.receive()
            if answer is not None:
                answers[member] = answer
            if answer is None or answer.status != "ok":
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return answers


def _failure(
    members: Sequence[RankProcess], answers: Mapping[RankProcess, PartialRecord], command: str, timeout_s: float
) -> PartialRecord | None:
    """The outcome of a trial in which a rank failed, died or hangs; None if all succeeded. A rank that waited for
    another one is not the cause, unless all have answered."""

    def outcome(status: Status, kind: str, message: str) -> PartialRecord:
        return PartialRecord().failed(status, Failure(phase=command, kind=kind, message=message))

    failed = [(member, answer, answer.failure) for member, answer in answers.items() if answer.failure is not None]
    independent = [one for one in failed if not (_WAITING.search(one[2].message) or one[2].kind.startswith("Dist"))]
    silent = [member for member in members if member not in answers]
    causes = sorted(independent if silent else independent or failed, key=lambda one: one[1].status != "oom")
    if causes:
        member, answer, failure = causes[0]
        same = len(causes) == len(members) and len({one[2].message for one in causes}) == 1
        message = failure.message if same else f"{member.name}: {failure.message}"
        return msgspec.structs.replace(
            PartialRecord(checks=answer.checks, values=answer.values), status=answer.status,
            failure=msgspec.structs.replace(failure, message=message),
        )  # fmt: skip
    if died := [member for member in members if member.code is not None]:
        code = died[0].code
        message = (
            f"{died[0].name} ended with {exit_words(code)} during {command}{explain_kill(code)}; the others were ended "
            "with it"
        )
        return outcome("crashed", "RankDied", message)
    if silent:
        names = ", ".join(member.name for member in silent)
        message = f"{names} gave no answer within {timeout_s:g} s during {command}"
        if failed:
            message = f"{names} hangs in {command}: {', '.join(one[0].name for one in failed)} waited for it in vain"
        return outcome("timeout", "Silent", f"{message}; all were killed")
    return None


def _merge(answers: Sequence[PartialRecord]) -> PartialRecord:
    """Merge the answers of all ranks: the first rank's answer, with the largest memory (and that of each rank by its
    number) and merged values; a single answer is returned unchanged."""
    if len(answers) == 1:
        return answers[0]
    memory = dict[str, int]()
    for kind in dict.fromkeys(kind for answer in answers for kind in answer.memory):
        sizes = [answer.memory.get(kind, 0) for answer in answers]
        memory |= {kind: max(sizes)} | {f"rank{rank}_{kind}": size for rank, size in enumerate(sizes)}
    notices = tuple(dict.fromkeys(notice for answer in answers for notice in answer.notices))
    values = merge_values([answer.values for answer in answers])
    return msgspec.structs.replace(answers[0], memory=memory, values=values, notices=notices)


def merge_values(every: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Merge the values of all ranks: energy and its tokens are summed, other GPU readings are those of the worst rank,
    and the rest are those of the first rank.

    Energy is omitted if a rank has none, since it would not cover all tokens.
    """
    merged: dict[str, float] = {}
    for key in dict.fromkeys(key for values in every for key in values):
        readings = [values[key] for values in every if key in values]
        if key in SUMMED_VALUES:
            if len(readings) == len(every):
                merged[key] = sum(readings)
        elif key.startswith("device_") and key != "device_samples_train":
            merged[key] = min(readings) if "_min_" in key or "_margin_" in key else max(readings)
        else:
            merged[key] = readings[0]
    return merged


# --- processes --------------------------------------------------------------------------------------------------------


class RankProcess:
    """One forked process that answers commands like a trial; `name` identifies it in messages.

    It is forked like a trial: from a process that has imported everything, has run nothing and has one thread. It ends
    with `os._exit`, since its communication threads sometimes abort a regular exit of the interpreter.
    """

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        """Fork; in the child, `make` creates the trial at its first command."""
        self.name = name
        self.code: int | None = None
        """Its exit status, after it has ended and been reaped."""
        self.connection, theirs = Pipe()
        self.pid = fork_process(lambda: _serve(theirs, make))
        theirs.close()
        wire.receive(self.connection, wire.Hello)

    def receive(self) -> PartialRecord | None:
        """Its answer; None if it has ended, and it is then reaped."""
        try:
            return wire.receive_answer(self.connection, PartialRecord)
        except wire.ClosedError:
            self._reap()
            return None

    def end(self) -> None:
        """Kill it if it is still running, and reap it."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._reap()

    def _reap(self) -> None:
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.connection.close()


def _serve(connection: Connection, make: Callable[[], Any]) -> None:
    trial = functools.cache(make)

    def answer(command: wire.Command) -> PartialRecord:
        try:
            return trial().run(command.name, **command.arguments)  # type: ignore[no-any-return]
        except Exception as error:
            return failed_record(error, command.name)

    wire.serve(connection, answer)


# --- losses -----------------------------------------------------------------------------------------------------------


MIN_STEPS = 3
"""Minimum steps that are compared: known faults begin in the second step."""
EXACT, ROUNDED = 1e-4, 3e-3
"""The largest relative difference from the loss of a single rank, for models that compute in float32, and in 16
bits."""


def compare_losses(several: Sequence[float], one: Sequence[float], variant: Variant, ranks: int) -> Check:
    """The check that the losses of several ranks equal those of a single rank on the same batches.

    They cannot be bit-equal. A mean over ranks adds in another order, and Adam's first updates have the size of the
    learning rate for any gradient, so an element whose gradient is only rounding error may change in the opposite
    direction. Healthy runs differed over 6 to 9 steps by 2e-7 in float32 and 1.2e-4 in bfloat16; NF4 weights gathered
    wrongly by FSDP2 differed by 1.7e-2 in the second step (docs/machines.md).
    """
    pairs = list(zip(several, one, strict=False))
    check = functools.partial(Check, path="ranks.losses")
    if isinstance(variant, LoraVariant) and variant.lora_dropout:
        reason = "ranks draw their own dropout, so losses are not those of one rank"
        return check(required=None, observed=None, status="not_applicable", reason=reason)
    if len(pairs) < MIN_STEPS:
        reason = f"{len(pairs)} steps are too few to compare: take {MIN_STEPS} or more"
        return check(required=True, observed=None, status="unknown", reason=reason)
    compute = {variant.autocast or variant.dtype, variant.base_dtype}
    tolerance = EXACT if compute == {"float32"} and variant.adapter_dtype in (None, "float32") else ROUNDED
    for step, (loss, expected) in enumerate(pairs, start=1):
        if not abs(loss - expected) <= tolerance * abs(expected):
            reason = (
                f"step {step} has a loss of {loss:.5f} by {ranks} ranks and of {expected:.5f} by one with the same "
                f"batches (within {tolerance:.2%} is equal): they train differently"
            )
            return check(required=True, observed=False, status="fallback", reason=reason)
    largest = max(abs(loss - expected) / abs(expected) for loss, expected in pairs)
    reason = f"losses of {len(pairs)} steps within {largest:.2g} of those of one rank ({tolerance:g})"
    return check(required=True, observed=True, status="active", reason=reason)
