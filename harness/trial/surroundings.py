"""The meters around a trial's commands: what the machine and the card did while something was timed.

Each command that times something is enclosed by readings, which are outside its stopwatch. Energy is a solo trial's:
beside others that take turns the card's counter would be theirs as well. A solo trial that times no steps takes some
for it, after its peaks have been read, for as long as the counter needs to mean something.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from harness.machine.watch import LEAST_S, Watch
from harness.records.record import Fragment
from harness.studies.request import TrialRequest

PHASE_OF = {"turn": "train", "profile": "train", "request": "generate", "natural": "generate"}
"""The commands that time something, and the one that takes steps apart."""
ENERGY_STRETCH_S = 1.5 * LEAST_S
"""How long a solo trial takes steps for its energy: above the shortest stretch even if the last step comes early."""


class Surroundings:
    """The watches of one trial; `step` takes a training step, `real_tokens` counts those trained so far."""

    def __init__(self, request: TrialRequest, step: Callable[[], object], real_tokens: Callable[[], int]) -> None:
        self._step = step
        self._real_tokens = real_tokens
        alone = "peaks" in request.measures
        self._spends = alone and "steps" not in request.measures and request.device.startswith("cuda")
        self._energy = alone and request.device.startswith("cuda")
        self._watches = {
            phase: Watch(phase, request.device, energy=alone and phase == "train") for phase in set(PHASE_OF.values())
        }
        self._steps = 0
        self._tokens = 0.0

    def around(self, command: str, call: Callable[[], Fragment]) -> Fragment:
        """What `call` added to the trial, with what was found around it."""
        if command in PHASE_OF:
            return self._watched(command, call)
        fragment = call()
        if command == "finish_training":
            return self._finished(fragment)
        return self._noted("generate", fragment) if command == "end_generate" else fragment

    def _watched(self, command: str, call: Callable[[], Fragment]) -> Fragment:
        watch = self._watches[PHASE_OF[command]]
        watch.begin()
        fragment = call()
        values = watch.end()
        if command == "turn" and self._energy:
            self._steps += len(fragment.samples["step_time_s"])
            self._tokens += sum(fragment.samples["turn_real_tokens"])
            values |= {"energy_steps": float(self._steps), "energy_tokens": self._tokens}
        fragment = dataclasses.replace(fragment, values=fragment.values | values)
        return self._noted("train", fragment) if command == "profile" else fragment

    def _noted(self, phase: str, fragment: Fragment) -> Fragment:
        """The fragment, with what of the card could not be measured in a phase."""
        notice = self._watches[phase].notice()
        return fragment if notice is None else fragment.with_notice(notice)

    def _finished(self, fragment: Fragment) -> Fragment:
        """Training has ended: take the energy that is still due, and say what of the card could not be measured."""
        watch = self._watches["train"]
        if self._spends and fragment.status == "ok":
            tokens, steps = self._real_tokens(), 0
            watch.begin()
            begin = time.monotonic()
            while time.monotonic() < begin + ENERGY_STRETCH_S:
                self._step()
                steps += 1
            counts = {"energy_steps": float(steps), "energy_tokens": float(self._real_tokens() - tokens)}
            fragment = dataclasses.replace(fragment, values=fragment.values | watch.end() | counts)
        return self._noted("train", fragment)
