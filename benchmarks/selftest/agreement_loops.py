"""One training, by three loops over the same model, optimizer, schedule and batches.

`trial` is lorameter's own, `loop` the one that somebody would write, `trainer` that of transformers. With `--told FILE`
the trial's own record of its steps is written there.

python agreement_loops.py {trial,loop,trainer} [--model MODEL] [--steps N] [--told FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import torch

from harness.studies.protocol import Protocol
from harness.studies.request import TrialRequest
from harness.studies.study_file import load_study
from harness.trial.building.shared import SharedBase
from harness.trial.data.tokens import prepare
from harness.trial.trial import Trial


def build(model: str, folder: str) -> Trial:
    """A trial of the study of one training step, at its first step."""
    study = load_study("training-step")
    workload = dataclasses.replace(study.workload, model=model)
    request = TrialRequest(
        trial="agreement", variant=study.variants[0], role="variant", replicate=0, seed=1, workload=workload,
        protocol=Protocol(), interleaving="replicates", measures=("steps",), device="cpu", threads=1,
        tokens_path=prepare(workload, Path(folder)).path, scratch=folder, log_path="",
    )  # fmt: skip
    trial = Trial(request, SharedBase())
    built = trial.run("build")
    if built.failure is not None:
        raise SystemExit(built.failure.message)
    return trial


def train(trial: Trial, way: str, steps: int) -> list[float]:
    """Train so many steps this way; returns the steps as the trial has recorded them, where it is the trial."""
    if way == "trial":
        trial.run("warm_up")
        return [time for _ in range(steps) for time in trial.run("turn", steps=1).samples["step_time_s"]]
    trainee, stream, variant = trial._built.trainee, trial._built.stream, trial._request.variant
    trained = [one for one in trainee.model.parameters() if one.requires_grad]
    if way == "loop":
        trainee.model.train()
        for _ in range(steps):
            trainee.model(**stream.take(), use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, variant.max_grad_norm)
            trainee.optimizer.step()
            trainee.schedule.step()
            trainee.optimizer.zero_grad(set_to_none=True)
        return []
    from transformers import Trainer, TrainingArguments

    batches = [{name: values[0] for name, values in stream.take().items()} for _ in range(64)]
    arguments = TrainingArguments(
        output_dir="out", max_steps=steps, per_device_train_batch_size=1, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", max_grad_norm=variant.max_grad_norm, logging_steps=10,
    )  # fmt: skip
    optimizers = (trainee.optimizer, trainee.schedule)
    Trainer(trainee.model, arguments, train_dataset=batches, optimizers=optimizers).train()
    return []


def main() -> None:
    """Build, train, and tell."""
    options = argparse.ArgumentParser()
    options.add_argument("way", choices=("trial", "loop", "trainer"))
    options.add_argument("--model", default="tiny-llama")
    options.add_argument("--steps", type=int, default=100_000)
    options.add_argument("--told", type=Path)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trial = build(chosen.model, folder)
        times = train(trial, chosen.way, chosen.steps)
    if chosen.told is not None:
        chosen.told.write_text(json.dumps(times))


if __name__ == "__main__":
    main()
