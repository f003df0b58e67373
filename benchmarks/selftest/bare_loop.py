"""One replicate of `harness_overhead.py`: the harness's timed step and bare loops take turns in one process.

    python bare_loop.py SEED TURNS

All loops use the same model, adapter, optimizer and stream of batches; their order is shuffled in each turn. The
harness's loops are the trial's own turn, with and without telemetry, and its step outside a turn. The program prints
the times of each loop's steps as JSON, under the names of `harness_overhead.STEPS`.
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

from lorameter.machine.products import add_products, make_target
from lorameter.machine.provenance import probe_machine
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.study_file import load_study
from lorameter.trial.building.build import SharedBase
from lorameter.trial.data.tokens import prepare
from lorameter.trial.trial import Trial

VARIATIONS = ("", "scheduled", "freed")
"""Variations of the bare loop, which runs forward, backward, clipping and update: unchanged, with a step of the
schedule, and with the loss and its graph freed within the step."""


def main(seed: int, turns: int) -> None:
    """Build the default study's QLoRA variant, warm up, and take turns."""
    machine = add_products(probe_machine())
    study = load_study("lora-or-qlora", target=make_target(machine))
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
        for command in ("build", "verify", "warm_up"):  # anything that the check left behind would slow down the steps
            trial.run(command)
        trainee, stream = trial.trainee, trial.stream
    model, optimizer = trainee.model, trainee.optimizer
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    times: dict[str, list[float]] = defaultdict(list)

    def time_bare(variation: str, name: str) -> None:
        """Time a step of this variation of the bare loop, and store the time under the name."""
        begin = time.perf_counter()
        loss = model(**stream.take(), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        if variation == "scheduled":
            trainee.schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if variation == "freed":
            del loss
        if machine.device == "cuda":
            torch.cuda.synchronize()
        times[name].append(time.perf_counter() - begin)

    def time_step(name: str) -> None:
        """Time a step of a loop: a variation of the bare loop, or a loop of `harness_overhead.STEPS`."""
        if name == "switched":
            with trial._active():  # the switch itself is not timed
                time_bare("", name)
        elif name == "unmetered":
            with trial._active():
                times[name] += trial._execute("turn", steps=1).samples["step_time_s"]
        elif name == "alone":
            times[name].append(trial.take_step()[1].time_s)
        elif name == "turn":
            begin = time.perf_counter()
            fragment = trial.run("turn", steps=1)
            times[name].append(time.perf_counter() - begin)
            times["metered"] += fragment.samples["step_time_s"]
        else:
            time_bare(name, name or "bare")

    names = (*VARIATIONS, "switched", "alone", "unmetered", "turn")
    shuffler = random.Random(seed)
    for _ in range(turns):
        for name in shuffler.sample(names, len(names)):
            time_step(name)
    print(json.dumps(times))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
