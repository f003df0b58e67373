"""The script that `meter_live.py` has take turns: a Trainer on a small model, or on one in a directory.

    python meter_script.py MODEL STEPS OUTPUT

Before a turn it is told on its standard input whether the meter is on, and how many steps it has: "on 20", "off 20".
After it it prints how many steps a meter has followed so far, of how many it has told its follower, how long that took,
and when each step of the turn began by clocks that stand still meanwhile: all times on the wall and on its CPUs.

Of a process that is wrapped, off means that the meter is taken off: what is left then is a training that knows nothing
of it.
"""

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
"""A step of about 10 ms."""


class Switch:
    """Takes the meter off a training, and puts it there again. It is the last callback that the Trainer was given."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.callbacks = trainer.callback_handler.callbacks
        last, self.hooks = self.callbacks[-1], dict(hooks)
        self.meter: Any = last if hasattr(last, "_time_methods") else None
        """None in a process that is not wrapped."""
        self.on = self.meter is not None
        self.told, self.telling, self.telling_cpu = 0, 0.0, 0.0
        """Of how many steps the follower was told, and the seconds that it took."""

    def turn(self, on: bool) -> None:
        """What the next turn is to be."""
        if on and not self.on:
            self.callbacks.append(self.meter)
            hooks.update(self.hooks)
            self.meter._trainer = self.trainer
            self.meter._time_methods()
            self.meter._steps.restart()
        elif self.on and not on:
            self.callbacks.remove(self.meter)
            hooks.clear()
            self.meter._release_trainer()
        self.on = on

    @property
    def followed(self) -> int:
        """Steps that the meter has seen the end of."""
        return 0 if self.meter is None else self.meter._steps._number

    def time_telling(self) -> None:
        """What the meter does for many steps it does in one of them: it is timed by itself."""
        if self.meter is not None and "_tell" not in vars(self.meter._steps):
            self.meter._steps._tell = functools.partial(self._tell, self.meter._steps._tell)

    def _tell(self, tell: Callable[[], None]) -> None:
        number = len(self.meter._steps._noted)
        wall, cpu = time.perf_counter(), time.process_time()
        tell()
        self.telling += time.perf_counter() - wall
        self.telling_cpu += time.process_time() - cpu
        self.told += number

    def now(self) -> tuple[float, float]:
        """Both clocks."""
        return time.perf_counter() - self.telling, time.process_time() - self.telling_cpu


class Turns(TrainerCallback):  # type: ignore[misc]
    """Waits before a turn, and tells how long its steps were."""

    def __init__(self) -> None:
        self.steps = 0
        self.seen: list[tuple[float, float]] = []
        """Of the turn under way: when each step began."""
        self.switch: Switch

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """A step begins, its batch is there."""
        switch = self.switch
        if self.seen:
            self.seen.append(switch.now())
            if len(self.seen) <= self.steps:
                return
            counts = switch.followed, switch.told, switch.telling, switch.telling_cpu
            print("took", *counts, *(f"{wall} {cpu}" for wall, cpu in self.seen), flush=True)
        else:
            switch.time_telling()
            print("ready", flush=True)
        word, steps = sys.stdin.readline().split()
        self.steps = int(steps)
        switch.turn(word == "on")
        self.seen = [switch.now()]


def main(name: str, steps: int, output: str) -> None:
    """Train for so many steps."""
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
        output_dir=output,
        use_cpu=True,
        max_steps=steps,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=1,
        logging_strategy="no",
    )
    turns = Turns()
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[turns])
    turns.switch = Switch(trainer)
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
