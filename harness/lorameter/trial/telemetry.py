"""Reads the state of the machine and the GPU around the timed commands of a trial.

Readings are taken before and after each timed command, outside its stopwatch; `look` reads the GPU's clocks while a
step still runs on it. Energy is measured in isolated trials only: if trials take turns, the GPU's counter includes the
energy of the others. An isolated trial that times no steps runs some for its energy after its peaks have been read, for
as long as the resolution of the counter requires; all ranks end these steps together.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from lorameter.machine.gpus import GENERATIONS
from lorameter.machine.telemetry import LEAST_S, Telemetry
from lorameter.records.record import PartialRecord
from lorameter.studies.request import COMMANDS, ROUNDS, Command, TrialRequest

ENERGY_STRETCH_S = 1.5 * LEAST_S
"""Seconds for which an isolated trial runs steps for its energy: above the minimum of `Telemetry`, even if the last
step ends early."""


class TrialTelemetry:
    """The telemetry of one trial, by phase.

    Args:
        request: request of the trial.
        step: runs a training step.
        real_tokens: returns the number of tokens that this process has trained.
        agree: returns the joint decision of all ranks, given that of this one.
        generations: process generations from this one up to the parent of the run.
    """

    def __init__(
        self,
        request: TrialRequest,
        step: Callable[[], object],
        real_tokens: Callable[[], int],
        *,
        agree: Callable[[bool], bool] = bool,
        generations: int = GENERATIONS,
    ) -> None:
        self._step = step
        self._real_tokens = real_tokens
        self._agree = agree
        workload = request.workload
        # A process that trains as the single rank takes turns with all ranks, on the device of the first rank.
        alone = "peaks" in request.measures and not (
            workload.ranks > 1 and workload.scaling and "steps" in request.measures
        )
        self._needs_steps = alone and "steps" not in request.measures and request.device.startswith("cuda")
        self._energy = alone and request.device.startswith("cuda")
        self._watches = {
            phase: Telemetry(phase, request.device, energy=alone and phase == "train", generations=generations)
            for phase in {one.telemetry_phase for one in COMMANDS.values() if one.telemetry_phase}
        }
        self._steps = 0
        self._tokens = 0.0

    def around(self, command: Command, call: Callable[[], PartialRecord]) -> PartialRecord:
        """The fragment of `call`, with the readings before and after it."""
        fragment = (
            call()
            if command.telemetry_phase is None
            else self._watched(command, self._watches[command.telemetry_phase], call)
        )
        if command.ends is None:
            return fragment
        if command.ends == "train" and self._needs_steps and fragment.status == "ok":
            fragment = self._measure_energy(fragment)
        notice = self._watches[command.ends].notice()
        return fragment if notice is None else fragment.with_notice(notice)

    def look(self) -> None:
        """Read the GPU's clocks while a timed step runs on it."""
        self._watches["train"].look()

    def _watched(self, command: Command, watch: Telemetry, call: Callable[[], PartialRecord]) -> PartialRecord:
        tokens = self._real_tokens()
        watch.begin()
        fragment = call()
        values = watch.end()
        if command is ROUNDS["steps"] and self._energy:
            self._steps += len(fragment.samples["step_time_s"])
            self._tokens += self._real_tokens() - tokens
            values |= {"energy_steps": float(self._steps), "energy_tokens": self._tokens}
        return msgspec.structs.replace(fragment, values=fragment.values | values)

    def _measure_energy(self, fragment: PartialRecord) -> PartialRecord:
        """Run steps for the energy of a training that has ended."""
        watch, tokens, steps = self._watches["train"], self._real_tokens(), 0
        watch.begin()
        begin = time.monotonic()
        while self._agree(time.monotonic() < begin + ENERGY_STRETCH_S):
            self._step()
            steps += 1
        counts = {"energy_steps": float(steps), "energy_tokens": float(self._real_tokens() - tokens)}
        return msgspec.structs.replace(fragment, values=fragment.values | watch.end() | counts)
