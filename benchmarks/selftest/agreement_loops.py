"""One training, by three loops over the same model, optimizer, schedule and batches.

`trial` is lorameter's own, `loop` the one that somebody would write, `trainer` that of transformers. With `--told FILE`
the trial's own record of its steps is written there, and what was trained.

python agreement_loops.py {trial,loop,trainer} [--model MODEL] [--steps N] [--told FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from harness.records import codec
from harness.studies.protocol import Protocol
from harness.studies.request import TrialRequest
from harness.studies.study_file import load_study
from harness.trial.building.build import Trainee, build
from harness.trial.building.shared import SharedBase
from harness.trial.data.stream import TokenStream
from harness.trial.data.tokens import prepare
from harness.trial.trial import Trial


def request_for(model: str, folder: str) -> TrialRequest:
    """A trial of the study of one training step, without dropout: a Trainer seeds the process anew, so that its masks
    and with them its losses would be others."""
    study = load_study("training-step")
    variant = dataclasses.replace(study.variants[0], lora_dropout=0.0)
    workload = dataclasses.replace(study.workload, model=model)
    return TrialRequest(
        trial="agreement", variant=variant, role="variant", replicate=0, seed=1, workload=workload,
        protocol=Protocol(), interleaving="replicates", measures=("steps",), device="cpu", threads=1,
        tokens_path=prepare(workload, Path(folder)).path, scratch=folder, log_path="",
    )  # fmt: skip


def train_by_trial(request: TrialRequest, steps: int) -> list[float]:
    """Train so many steps; returns them as the trial has recorded them, in seconds."""
    trial = Trial(request, SharedBase())
    for command in ("build", "warm_up"):
        if (failure := trial.run(command).failure) is not None:
            raise SystemExit(failure.message)
    return [time for _ in range(steps) for time in trial.run("turn", steps=1).samples["step_time_s"]]


def train_by_loop(request: TrialRequest, steps: int) -> None:
    """As a loop is written."""
    trainee, stream = build_both(request, steps)
    trainee.model.train()
    for _ in range(steps):
        trainee.model(**stream.take(), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters, request.variant.max_grad_norm)
        trainee.optimizer.step()
        trainee.schedule.step()
        trainee.optimizer.zero_grad(set_to_none=True)


def train_by_trainer(request: TrialRequest, steps: int) -> None:
    """With what transformers' Trainer does beside: its callbacks, its log, the norm of the gradients."""
    from transformers import Trainer, TrainingArguments

    trainee, stream = build_both(request, steps)
    arguments = TrainingArguments(
        output_dir="out", max_steps=steps, per_device_train_batch_size=request.workload.batch_size, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="no", max_grad_norm=request.variant.max_grad_norm,
        logging_steps=10,
    )  # fmt: skip
    optimizers = (trainee.optimizer, trainee.schedule)
    Trainer(trainee.model, arguments, train_dataset=Rows(stream), optimizers=optimizers).train()


class Rows(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """The rows of a stream in its order: of what has a length a Trainer would draw them in an order of its own."""

    def __init__(self, stream: TokenStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            batch = self._stream.take()
            names, columns = list(batch), list(batch.values())
            yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def build_both(request: TrialRequest, steps: int) -> tuple[Trainee, TokenStream]:
    """What is trained, and on what."""
    stream = TokenStream(Path(request.tokens_path), request.workload, request.variant, request.device)
    return build(request, steps=steps, shared=SharedBase()), stream


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
        request = request_for(chosen.model, folder)
        if chosen.way == "trial":
            times = train_by_trial(request, chosen.steps)
            if chosen.told is not None:
                told = {"variant": codec.to_json(request.variant), "threads": torch.get_num_threads(), "times": times}
                chosen.told.write_text(json.dumps(told))
        elif chosen.way == "loop":
            train_by_loop(request, chosen.steps)
        else:
            train_by_trainer(request, chosen.steps)


if __name__ == "__main__":
    main()
