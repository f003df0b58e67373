"""The meters around a trial's commands: what the machine and the GPU did while something was timed.

Each command that times something is enclosed by readings, which are outside its stopwatch; `look` is one more, of the
GPU's clocks, for while a step is still under way on it. Energy is measured in isolated trials only: where others take
turns, the GPU's counter holds theirs as well. An isolated trial that times no steps takes some for it, after its peaks
have been read, for as long as the counter needs to mean something; several ranks end these steps together.
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
"""How long an isolated trial takes steps for its energy: above the shortest stretch, even if the last step is early."""


class TrialTelemetry:
    """The watches of one trial.

    Args:
        request: of the trial.
        step: takes a training step.
        real_tokens: counts those that this process has trained so far.
        agree: what all ranks decide, by what this one would.
        generations: from this process up to the parent of the run.
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
        # One rank that trains alone takes turns with all of them, on the first one's device.
        alone = "peaks" in request.measures and not (
            workload.ranks > 1 and workload.scaling and "steps" in request.measures
        )
        self._spends = alone and "steps" not in request.measures and request.device.startswith("cuda")
        self._energy = alone and request.device.startswith("cuda")
        self._watches = {
            phase: Telemetry(phase, request.device, energy=alone and phase == "train", generations=generations)
            for phase in {one.telemetry_phase for one in COMMANDS.values() if one.telemetry_phase}
        }
        self._steps = 0
        self._tokens = 0.0

    def around(self, command: Command, call: Callable[[], PartialRecord]) -> PartialRecord:
        """What `call` added to the trial, with what was found around it."""
        fragment = (
            call()
            if command.telemetry_phase is None
            else self._watched(command, self._watches[command.telemetry_phase], call)
        )
        if command.ends is None:
            return fragment
        if command.ends == "train" and self._spends and fragment.status == "ok":
            fragment = self._spent(fragment)
        notice = self._watches[command.ends].notice()
        return fragment if notice is None else fragment.with_notice(notice)

    def look(self) -> None:
        """A timed step is under way on the GPU."""
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

    def _spent(self, fragment: PartialRecord) -> PartialRecord:
        """Training has ended, and its energy is still due: take steps for it."""
        watch, tokens, steps = self._watches["train"], self._real_tokens(), 0
        watch.begin()
        begin = time.monotonic()
        while self._agree(time.monotonic() < begin + ENERGY_STRETCH_S):
            self._step()
            steps += 1
        counts = {"energy_steps": float(steps), "energy_tokens": float(self._real_tokens() - tokens)}
        return msgspec.structs.replace(fragment, values=fragment.values | watch.end() | counts)
