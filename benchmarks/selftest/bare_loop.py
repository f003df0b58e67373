"""One replicate of `harness_overhead.py`: the harness's timed step and bare loops take turns in one process.

    python bare_loop.py SEED TURNS

All loops use the same model, adapter, optimizer and stream of batches; the order is shuffled in each turn. The harness
takes the trial's own turn, with and without telemetry, and its step alone. Prints JSON: the step times of each, the
wall time of the whole turn, the bare loop, and bare loops with one addition of a step.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

from lorameter.machine.provenance import probe_machine
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.study_file import load_study
from lorameter.trial.building.build import SharedBase
from lorameter.trial.data.tokens import prepare
from lorameter.trial.trial import Trial

EXTRAS = ("", "scheduled", "freed")
"""Additions of a bare loop to forward, backward, clipping and update."""


def main(seed: int, turns: int) -> None:
    """Build the default study's QLoRA variant, warm up, and take turns."""
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
        for command in ("build", "verify", "warm_up"):  # leftovers of the check would be visible
            trial.run(command)
        trainee, stream = trial._trainee, trial._stream
    model, optimizer = trainee.model, trainee.optimizer
    trained = [p for p in model.parameters() if p.requires_grad]
    times: dict[str, list[float]] = defaultdict(list)

    def bare(extra: str, name: str) -> None:
        begin = time.perf_counter()
        loss = model(**stream.take(), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if extra == "scheduled":
            trainee.schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if extra == "freed":
            del loss
        if machine.device == "cuda":
            torch.cuda.synchronize()
        times[name].append(time.perf_counter() - begin)

    def take(way: str) -> None:
        if way == "switched":
            with trial._active():
                bare("", way)
        elif way == "unmetered":
            with trial._active():
                times[way] += trial.turn(1).samples["step_time_s"]
        elif way == "alone":
            times[way].append(trial._take_step()[1].time_s)
        elif way == "turn":
            begin = time.perf_counter()
            fragment = trial.run("turn", steps=1)
            times[way].append(time.perf_counter() - begin)
            times["metered"] += fragment.samples["step_time_s"]
        else:
            bare(way, way or "bare")

    ways = (*EXTRAS, "switched", "alone", "unmetered", "turn")
    shuffler = random.Random(seed)
    for _ in range(turns):
        for way in shuffler.sample(ways, len(ways)):
            take(way)
    print(json.dumps(times))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
