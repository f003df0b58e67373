"""One replicate of the overhead measurement: the harness's timed step and a bare loop, taking turns in one process.

All use the same model, adapter, optimizer and stream; the order is shuffled each turn. The harness's turn is the
trial's own, with the meters around it and without, and its step alone, from where the bare loop is called. Prints JSON:
the step as recorded in each of these ways, the whole `turn` call as the parent waits for it, the bare loop, and that
loop with one thing more that a step may have: the schedule, a sum of losses, a loss that is divided by the batches of a
step, the end of the graph behind the loss, the switch to the trial's adapter and random numbers before it.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from harness.machine.provenance import probe_machine
from harness.studies.protocol import Protocol
from harness.studies.request import TrialRequest
from harness.studies.study_file import load_study
from harness.trial.building.shared import SharedBase
from harness.trial.data.tokens import prepare
from harness.trial.trial import Trial


def main(seed: int, turns: int) -> None:
    """Build the default study's QLoRA variant, warm up, take turns."""
    study, machine = load_study("lora-or-qlora"), probe_machine()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(
            TrialRequest(
                trial="overhead", variant=study.variant("qlora-nf4-r16"), role="variant", replicate=0, seed=seed,
                workload=study.workload, protocol=Protocol(), interleaving="replicates", measures=("steps",),
                device=machine.device, threads=1, tokens_path=prepare(study.workload, Path(folder)).path,
                scratch=folder, log_path="",
            ),
            SharedBase(),
        )  # fmt: skip
        trial.run("build")
        trial.run("verify")  # so that whatever it leaves behind would show
        trial.run("warm_up")
        trainee, stream = trial._built.trainee, trial._built.stream
    model, optimizer, seat = trainee.model, trainee.optimizer, trial._built.seat
    trained = [p for p in model.parameters() if p.requires_grad]
    times: dict[str, list[float]] = defaultdict(list)

    def bare(
        name: str, *, scheduled: bool = False, summed: bool = False, divided: bool = False, freed: bool = False
    ) -> None:
        begin = time.perf_counter()
        total = torch.zeros((), device=machine.device) if summed else None
        loss = model(**stream.take(), use_cache=False).loss
        if divided:
            loss = loss / 1
        loss.backward()
        if total is not None:
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if scheduled:
            trainee.schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if freed:
            del loss
        if machine.device == "cuda":
            torch.cuda.synchronize()
        times[name].append(time.perf_counter() - begin)

    def seated() -> None:
        with seat.taken():
            bare("seated")

    def metered() -> None:
        begin = time.perf_counter()
        fragment = trial.run("turn", steps=1)
        times["turn"].append(time.perf_counter() - begin)
        times["metered"] += fragment.samples["step_time_s"]

    def unmetered() -> None:
        with seat.taken():
            times["unmetered"] += trial.turn(1).samples["step_time_s"]

    def alone() -> None:
        times["alone"].append(trial._take_step()[1].time_s)

    ways: tuple[Callable[[], None], ...] = (
        lambda: bare("bare"),
        lambda: bare("scheduled", scheduled=True),
        lambda: bare("summed", summed=True),
        lambda: bare("divided", divided=True),
        lambda: bare("freed", freed=True),
        seated, alone, unmetered, metered,
    )  # fmt: skip
    shuffler = random.Random(seed)
    for _ in range(turns):
        for take in shuffler.sample(ways, len(ways)):
            take()
    print(json.dumps(times))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
