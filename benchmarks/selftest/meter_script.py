"""Trains a small model, or one in a directory, with a Trainer whose meter is switched on and off between turns.

    python meter_script.py MODEL STEPS OUTPUT

It prints "ready" and reads a turn from standard input: whether the meter is on, and the number of steps ("on 20", "off
20"). After the turn it prints "took", the number of steps that the meter has observed and reported, the wall and CPU
time of the reports, and the wall and CPU time at the start of each step, on clocks that stop during a report.
"""

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

SMALL = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
}  # fmt: skip


class MeterSwitch:
    """Removes the meter from a training and restores it; an unwrapped process has no meter."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.callbacks = trainer, trainer.callback_handler.callbacks
        last = self.callbacks[-1]
        self.hooks = [(one, dict(one)) for one in (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)]
        self.meter: Any = last if type(last).__name__ == "Meter" else None
        self.on = self.meter is not None
        self.reported, self.wall, self.cpu = 0, 0.0, 0.0

    def set(self, on: bool) -> None:
        """Switch the meter on or off."""
        if self.meter is None or on == self.on:
            return
        self.on = on
        if on:
            self.callbacks.append(self.meter)
            for hooks, original in self.hooks:
                hooks.update(original)
            self.meter._steps.add_hooks()
            self.meter._steps.restart()
        else:
            self.callbacks.remove(self.meter)
            self.meter._steps.remove_hooks()
            for hooks, _ in self.hooks:
                hooks.clear()

    def time_reports(self) -> None:
        """Time the reports of the meter, each of which covers many steps."""
        if self.meter is not None:
            steps = self.meter._steps
            steps._report = functools.partial(self._report, steps._report)

    def _report(self, report: Callable[[], None]) -> None:
        self.reported += len(self.meter._steps._unreported)
        wall, cpu = time.perf_counter(), time.process_time()
        report()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu

    def now(self) -> tuple[float, float]:
        """Return both clocks."""
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


class TurnCallback(TrainerCallback):  # type: ignore[misc]
    """Waits for a turn and prints the times of its steps."""

    switch: MeterSwitch
    steps = 0
    starts: list[tuple[float, float]] = []  # noqa: RUF012

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Record the start of a step; its batch has been loaded."""
        switch = self.switch
        if self.starts:
            self.starts.append(switch.now())
            if len(self.starts) <= self.steps:
                return
            observed = 0 if switch.meter is None else switch.meter._steps._number
            clocks = (clock for start in self.starts for clock in start)
            print("took", observed, switch.reported, switch.wall, switch.cpu, *clocks, flush=True)
        else:
            switch.time_reports()
            print("ready", flush=True)
        word, steps = sys.stdin.readline().split()
        self.steps = int(steps)
        switch.set(word == "on")
        self.starts = [switch.now()]


def main(name: str, steps: int, output: str) -> None:
    """Train for the given number of steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any
    if name == "small":
        model, length = LlamaForCausalLM(LlamaConfig(**SMALL)), 64
    else:
        model, length = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16), 8
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows: Any = [{"input_ids": (row := torch.randint(3, 500, (length,))), "labels": row} for _ in range(steps)]
    arguments = TrainingArguments(
        output_dir=output, use_cpu=True, max_steps=steps, report_to=[], save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=1, logging_strategy="no",
    )  # fmt: skip
    turns = TurnCallback()
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[turns])
    turns.switch = MeterSwitch(trainer)
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
