"""Replicates measured in another process, on another machine, by whoever is told to (`lorameter.run.sites.messages`).

A scheduler gives processes on machines and no more; what they do there is the same under any. A post is told what to
say of itself, to hold its device, to prepare a plan, and to measure whole replicates; it sends each record as its trial
ends, and what was printed into its logs. It writes nothing but a temporary folder of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorameter.errors import InvalidRunError, UsageError, redact, shorten
from lorameter.machine.gpus import visible_cards
from lorameter.machine.processes import CPUS
from lorameter.machine.provenance import harness_identity
from lorameter.models.catalogue import cache_dir
from lorameter.records import codec
from lorameter.records.record import TrialRecord
from lorameter.records.tempdirs import scratch_folder
from lorameter.run.budget import Budget, TimeLimitTooShortError
from lorameter.run.check_multi_rank import check_ranks
from lorameter.run.device_lock import hold_devices
from lorameter.run.executors import Executor, open_executor
from lorameter.run.executors.host import Host
from lorameter.run.executors.sides import open_side
from lorameter.run.plan import Plan, Slot
from lorameter.run.plan_spec import SideSpec, read_plan, take_trials
from lorameter.run.prepare import prepare_run
from lorameter.run.runner import run_plan
from lorameter.run.sites.local import executors_of_ranks, share_cpus
from lorameter.run.sites.messages import (
    Describe,
    Done,
    Hold,
    Measure,
    NodeDescription,
    NodeMessage,
    Prepare,
    read_order,
)
from lorameter.run.trial_setup import RunContext

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MOST_LOG_BYTES = 2**22
"""Of one log in one message; of more the end is sent, which says what went wrong."""


class ReplicateWorker:
    """Carries out orders in a process of its own, one after the other; `end` may be called by another thread."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._described: Describe | None = None
        self._host = Host()
        self._plan: Plan | None = None
        self._site: RunContext | None = None
        self._executors: dict[str, Executor] = {}
        self._budget = Budget()
        self._load_s = self._import_s = 0.0
        self._folder: Path | None = None
        self._sent: dict[str, int] = {}
        """Bytes of each log that were sent."""

    def carry_out(self, text: str, send: Callable[[str], None]) -> None:
        """Carry out an order; whatever comes of it is sent, an error as well."""

        def say(message: NodeMessage) -> None:
            send(codec.dumps(message))

        try:
            order = read_order(text)
            if isinstance(order, Describe):
                answer = codec.to_json(self._describe(order))
            elif isinstance(order, Hold):
                answer = self._hold(order, say)
            elif isinstance(order, Prepare):
                answer = self._prepare(order, say)
            else:
                answer = self._measure(order, say)
            self._send_logs(say)
            last = NodeMessage(says="done", answer=answer)
        except BaseException as error:  # whatever it is, whoever asks must be told
            known = isinstance(error, (UsageError, InvalidRunError))
            with contextlib.suppress(OSError):
                self._send_logs(say)
            if not known:
                say(NodeMessage(says="log", trial=self._name("failed"), text=redact(traceback.format_exc())))
            said = str(error) if known else f"{type(error).__name__}: {shorten(str(error))}"
            # What one site is too slow for is no fault of who asked: others may be quicker.
            usage = isinstance(error, UsageError) and not isinstance(error, TimeLimitTooShortError)
            last = NodeMessage(says="failed", text=said.rstrip("."), usage=usage)
        say(last)

    def end(self) -> None:
        """Kill what is under way; who waits for it finds it gone."""
        for executor in list(self._executors.values()):
            with contextlib.suppress(Exception):  # the other thread may be about to close the same
                executor.close()

    def close(self) -> None:
        """End everything, and remove the folder."""
        self.end()
        self._stack.close()

    def _describe(self, order: Describe) -> NodeDescription:
        self._described = order
        with contextlib.suppress(OSError):  # what cannot be found from elsewhere is named when it is read
            os.chdir(order.folder)
        if order.shares > 1:
            cpus = share_cpus(os.sched_getaffinity(0), order.shares, f"site {order.site}")[order.share]
            self._host = Host(environment={CPUS: ",".join(map(str, cpus))})
        executor = self._open()
        seen = visible_cards(self._host.variables(os.environ)).value or ()
        boot = BOOT_ID.read_text().strip() if BOOT_ID.is_file() else ""
        return NodeDescription(
            facts=executor.facts(),
            harness=harness_identity(),
            device_id=executor.device_id(),
            machine=f"{socket.gethostname()} {boot}".strip(),
            free_bytes=executor.free_bytes(),
            boards=tuple(card.board.value or "" for card in seen),
        )

    def _hold(self, order: Hold, say: Callable[[NodeMessage], None]) -> dict[str, Any]:
        executors = executors_of_ranks(self._host, order.ranks)
        held = hold_devices(executors, order.if_busy, tell=lambda line: say(NodeMessage(says="told", text=line)))
        return {"waited": self._stack.enter_context(held)}

    def _prepare(self, order: Prepare, say: Callable[[NodeMessage], None]) -> dict[str, Any]:
        if self._described is None:
            raise InvalidRunError("it was not asked what it is.")
        self._plan = plan = read_plan(order.plan)
        machine = self._open().machine()
        for variant, workload in {slot.variant.name: (slot.variant, slot.workload) for slot in plan.slots}.values():
            check_ranks(f"variant {variant.name!r}", variant, workload, machine)
        self._folder = self._stack.enter_context(scratch_folder())
        hosts = self._put_up(order.plan.sides, say)
        for slot in {slot.arm: slot for slot in plan.slots}.values():
            executor = self._executors[slot.arm] = self._open(slot.arm, hosts.get(slot.side))
            self._stack.callback(executor.close)
            executor.start(self._folder, slot.workload.threads)
        watcher = _Sending(say, lambda: self._send_logs(say))
        ready, self._site = prepare_run(
            plan,
            self._executors,
            watcher,
            tell_data=lambda data: say(NodeMessage(says="data", text=data)),
        )
        self._load_s, self._import_s = ready.load_s, ready.hello.import_time_s
        sides = {side: self._executors[side].facts() for side in hosts}
        answer: dict[str, Any] = codec.to_json(dataclasses.replace(ready, sides=sides))
        return answer

    def _put_up(self, sides: Iterable[SideSpec], say: Callable[[NodeMessage], None]) -> dict[str, Host]:
        """The sides of an A/B, each in its host, until this process ends; what it takes is told in a log."""
        hosts: dict[str, Host] = {}
        for one in sides:
            log = self._name(f"side-{one.side}")
            side = open_side(
                one.spec,
                repository=Path.cwd(),
                cache=cache_dir(),
                report=lambda line, log=log: say(NodeMessage(says="log", trial=log, text=f"{line}\n")),  # type: ignore[misc]
                kind=one.kind,
            )
            host = self._stack.enter_context(side).host
            hosts[one.side] = dataclasses.replace(host, environment={**host.environment, **self._host.environment})
        return hosts

    def _measure(self, order: Measure, say: Callable[[NodeMessage], None]) -> dict[str, Any]:
        if self._plan is None or self._site is None:
            raise InvalidRunError("nothing is prepared here.")
        if order.afresh:
            self._budget = Budget(
                order.left_s, replicates=order.replicates, import_s=self._import_s, load_s=self._load_s
            )
        part = take_trials(self._plan, set(order.trials))
        measured = run_plan(
            part,
            self._executors,
            self._site,
            save=lambda record: say(NodeMessage(says="record", trial=record.trial, record=record)),
            watcher=_Sending(say, lambda: self._send_logs(say)),
            budget=self._budget,
        )
        done = Done(trials=tuple(record.trial for record in measured.records), lacks=tuple(sorted(measured.skipped)))
        answer: dict[str, Any] = codec.to_json(done)
        return answer

    def _open(self, arm: str = "", host: Host | None = None) -> Executor:
        return open_executor(host=host or self._host, label=self._name(arm))

    def _name(self, what: str) -> str:
        site = "" if self._described is None else self._described.site
        return "-".join(filter(None, (what, site)))

    def _send_logs(self, say: Callable[[NodeMessage], None]) -> None:
        """What was printed since the last time."""
        if self._folder is None:
            return
        for path in sorted((self._folder / "logs").glob("*.log")):
            with path.open("rb") as file:
                begin, size = self._sent.get(path.name, 0), file.seek(0, os.SEEK_END)
                if size <= begin:
                    continue
                skipped = max(0, size - begin - MOST_LOG_BYTES)
                file.seek(begin + skipped)
                text = file.read(size - begin - skipped).decode(errors="replace")
            self._sent[path.name] = size
            said = f"[{skipped} bytes are left out]\n" if skipped else ""
            say(NodeMessage(says="log", trial=path.stem, text=said + text))


@dataclass(frozen=True, slots=True)
class _Sending:
    """A watcher that sends what it is told; logs go when a trial has ended, and never while its turns are timed."""

    say: Callable[[NodeMessage], None]
    send_logs: Callable[[], None]

    def trial_phase(self, slot: Slot, phase: str) -> None:
        """As the watcher's."""
        self.say(NodeMessage(says="phase", trial=slot.trial, text=phase))

    def trial_ended(self, record: TrialRecord) -> None:
        """As the watcher's."""
        self.send_logs()
        self.say(NodeMessage(says="ended", trial=record.trial))
