"""One replicate of the meters' cost: the same timed step with the meters around it and without, taking turns.

The turn is the trial's own, by the same code; without the meters it is asked directly. Model, adapter, optimizer and
stream are one, and the order is shuffled each turn. Prints JSON: the step as recorded, either way, and how long the
whole call took.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from harness.protocol import Protocol
from harness.provenance import probe_machine
from harness.record import Fragment, TrialRequest
from harness.study_file import load_study
from harness.training.shared import SharedBase
from harness.training.tokens import prepare
from harness.training.trial import Trial


def main(seed: int, turns: int) -> None:
    """Build the default study's QLoRA variant, warm up, take turns."""
    study, machine = load_study("lora-or-qlora"), probe_machine()
    if machine.device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(
            TrialRequest(
                trial="meters", variant=study.variant("qlora-nf4-r16"), role="variant", replicate=0, seed=seed,
                workload=study.workload, protocol=Protocol(), interleaving="replicates", measures=("steps", "peaks"),
                device=machine.device, threads=1, tokens_path=prepare(study.workload, Path(folder)).path,
                scratch=folder, log_path="",
            ),
            SharedBase(),
        )  # fmt: skip
        trial.run("build")
        trial.run("warm_up")

    def plain() -> Fragment:
        with trial._built.seat.taken():
            return trial.turn(1)

    ways: dict[str, Callable[[], Fragment]] = {"metered": lambda: trial.run("turn", steps=1), "plain": plain}
    times: dict[str, list[float]] = {f"{way}{what}": [] for way in ways for what in ("", "_call")}
    shuffler = random.Random(seed)
    for _ in range(turns):
        for way in shuffler.sample(list(ways), len(ways)):
            begin = time.perf_counter()
            fragment = ways[way]()
            times[f"{way}_call"].append(time.perf_counter() - begin)
            times[way] += fragment.samples["step_time_s"]
    print(json.dumps(times))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
