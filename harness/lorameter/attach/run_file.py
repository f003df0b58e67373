"""The run on disk that a script's training becomes: a manifest, one trial, and its record.

It is claimed by making its directory, which one process can do; whoever comes second is not followed. The record is
written when the training begins and when it has ended, and each step as it comes, so that a process that is killed
leaves what it had measured until then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorameter.attach.command import study_of
from lorameter.attach.error_guard import NotFollowedError
from lorameter.machine import provenance
from lorameter.records import codec, steps, store
from lorameter.records.record import UNDER_WAY, Failure, Notice, TrialRecord
from lorameter.records.steps import Step
from lorameter.records.store import Manifest, RunWriter
from lorameter.records.worker_info import WorkerInfo
from lorameter.studies.protocol import Protocol

PROTOCOL = Protocol(phases=("train",), replicates=1, turns=1, steps_per_turn=1, allow_disturbed=True)
"""A training is measured as it comes; how many steps it has is known at its end."""


class RunFile:
    """One run that is being written. Holds its lock until it is finished."""

    def __init__(
        self,
        path: Path,
        *,
        command: str,
        device: str,
        requirements: Mapping[str, Any],
        values: dict[str, float],
    ) -> None:
        """Claim the directory, and write the manifest and the record with these values.

        Raises:
            NotFollowedError: another process has claimed it.
            InvalidRunError: the disk refuses.
        """
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise NotFollowedError("another process of this command is followed") from None
        self.path = path
        self._held = contextlib.ExitStack()
        self._held.enter_context(store.writing(path))
        self.threads = torch.get_num_threads()
        self.study = study_of(command, threads=self.threads, protocol=PROTOCOL, requirements=dict(requirements))
        (self.variant,) = self.study.variants
        self._begun_s, self._begun_unix_s = time.monotonic(), time.time()
        self._manifest = self._first_manifest(device)
        self._writer = RunWriter(path.parent, self._manifest)
        self._last: TrialRecord | None = None
        self._steps = self._held.enter_context((path / steps.FILE).open("ab", buffering=0))
        failure = Failure(phase="train", kind=UNDER_WAY, message="under way when this was written")
        self._writer.append(self.record(status="interrupted", failure=failure, values=values))

    def _first_manifest(self, device: str) -> Manifest:
        machine = provenance.probe_machine()
        if device == "cpu":
            machine = dataclasses.replace(
                machine, device="cpu", device_name=machine.cpu_model, device_memory_bytes=None
            )
        hello = WorkerInfo(
            harness=provenance.harness_identity(), pid=os.getpid(), import_time_s=0.0, device=device.split(":")[0],
            torch=torch.__version__,
        )  # fmt: skip
        facts = provenance.collect(self.study, provenance.read_facts(machine), self.threads, hello)
        return Manifest(
            run=self.path.name,
            study=codec.to_json(self.study),
            phases=("train",),
            interleaving="replicates",
            order=(self.trial,),
            seed=0,
            created_unix_s=self._begun_unix_s,
            provenance=facts,
            fingerprint=provenance.fingerprint(facts),
        )

    @property
    def trial(self) -> str:
        """The name of the one trial."""
        return f"r0-{self.variant.name}"

    @property
    def device_name(self) -> str:
        """As the provenance names it."""
        return str(self._manifest.provenance["device_name"])

    def record(self, **measured: Any) -> TrialRecord:
        """The record of the trial with what was measured; `status` and `failure` among it."""
        return TrialRecord(
            trial=self.trial,
            name=self.variant.name,
            variant=self.variant.id,
            role="variant",
            replicate=0,
            position=0,
            interleaving="replicates",
            seed=0,
            started_unix_s=self._begun_unix_s,
            wall_time_s=time.monotonic() - self._begun_s,
            log=f"logs/{self.trial}.log",
            **measured,
        )

    def add(self, step: Step) -> None:
        """Write what a step adds to the record."""
        self._steps.write(steps.line_of(step))

    def finish(self, record: TrialRecord, *, timed: int, notes: tuple[str, ...], notices: tuple[Notice, ...]) -> None:
        """Write the last record, and with it what is known now: how many steps were timed, and what tokens are."""
        log = self.path / record.log
        with contextlib.suppress(OSError):
            said = record.failure.traceback if record.failure is not None else ""
            log.write_text(said or "What the script printed went where it was started.\n", encoding="utf-8")
        protocol = dataclasses.replace(PROTOCOL, turns=max(1, timed))
        study = dataclasses.replace(self.study, protocol=protocol, notes=notes)
        self._manifest = dataclasses.replace(self._manifest, study=codec.to_json(study), notices=notices)
        self._write_last(record)
        self._held.close()

    def add_notice(self, notice: Notice) -> None:
        """One more notice of a training that has ended, and whose record is written."""
        if self._last is not None:
            self._write_last(self._last.replaced(notices=(*self._last.notices, notice)))

    def _write_last(self, record: TrialRecord) -> None:
        self._last = record
        writer = RunWriter(self.path.parent, self._manifest)
        writer.append(record)
        writer.finish("interrupted" if not record.settled else "complete")
