"""What a meter costs a step: a training alone and the same one wrapped, taking turns step by step.

Three processes run one script: alone, alone again, and with the hook and its writer. Each waits for its turn between
two steps, and says how long it was from the turn's begin to the next wait, on the wall and on its CPUs, so that all
that the meter does in a step and between two is in it. The order is shuffled in each round; the difference of a round
is paired, and its median stands with a 95 % interval by ranks (binomial). Alone against alone says what no difference
looks like. It wants a machine without other work: the meter asks the kernel for its CPU time once a step, and where
work waits for a CPU a system call is where a process loses it.

    python benchmarks/selftest/meter_live.py [--rounds N] [--model DIRECTORY]
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from scipy import stats

from harness.attach.child import environment
from harness.attach.variables import COMMAND, RUN
from harness.machine.provenance import origin_of

ROOT = Path(__file__).parents[2]
LIMIT_S, LIMIT_SHARE = 100e-6, 0.005
WARM_UP = 20
"""Rounds that are not counted: warm-up, the watched steps, and what is read once."""
SCRIPT = """
import sys, time
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import Trainer, TrainerCallback, TrainingArguments

steps, model = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.manual_seed(0)
if model == "small":
    sizes = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
    model, length = LlamaForCausalLM(LlamaConfig(**sizes)), 64
else:
    model, length = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), 128
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
rows = [{"input_ids": (row := torch.randint(3, 500, (length,))), "labels": row} for _ in range(steps)]

class Turn(TrainerCallback):
    begun = None
    def on_step_begin(self, *args, **kwargs):
        if self.begun is not None:
            print("took", time.perf_counter() - self.begun, time.process_time() - self.cpu, flush=True)
        else:
            print("ready", flush=True)
        sys.stdin.readline()
        self.begun, self.cpu = time.perf_counter(), time.process_time()

arguments = TrainingArguments(output_dir=sys.argv[3], use_cpu=True, max_steps=steps, report_to=[], save_strategy="no",
                              disable_tqdm=True, per_device_train_batch_size=1, logging_strategy="no")
Trainer(model, arguments, train_dataset=rows, callbacks=[Turn()]).train()
"""


class Arm:
    """One process of the script."""

    def __init__(self, name: str, folder: Path, steps: int, model: str, *, wrapped: bool) -> None:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if wrapped:
            told = {RUN: str(folder / "runs" / "run"), COMMAND: "python train.py"}
            variables = environment(variables, variables=told)
        command = [sys.executable, str(folder / "train.py"), str(steps), model, str(folder / name)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables
        )
        self.times: list[float] = []
        self.cpu_times: list[float] = []

    def wait(self) -> str:
        """Its next word."""
        for line in self.process.stdout or ():
            if line.startswith(("ready", "took")):
                return line
        raise SystemExit(f"a process has ended with {self.process.wait()} before its turns had")

    def turn(self) -> None:
        """One step."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        _, wall, cpu = self.wait().split()
        self.times.append(float(wall))
        self.cpu_times.append(float(cpu))


def median_with_interval(values: list[float]) -> tuple[float, float, float]:
    """The median and its 95 % interval by order statistics, which asks for no distribution."""
    found = stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    return float(stats.scoreatpercentile(values, 50)), float(found.low), float(found.high)


def main() -> int:
    """Take turns, and print what was found."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=300)
    options.add_argument("--model", default="small", help="a directory with a model; default: a step of about 10 ms")
    chosen = options.parse_args()
    steps = chosen.rounds + WARM_UP + 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "train.py").write_text(SCRIPT)
        (folder / "runs").mkdir()
        names = ("alone", "alone again", "wrapped")
        arms = {name: Arm(name, folder, steps, chosen.model, wrapped=name == "wrapped") for name in names}
        for arm in arms.values():
            arm.wait()
        shuffled = random.Random(0)
        for _ in range(chosen.rounds + WARM_UP):
            for name in shuffled.sample(names, len(names)):
                arms[name].turn()
        for arm in arms.values():
            arm.process.kill()
            arm.process.wait()
        written = (folder / "runs" / "run" / "manifest.json").is_file()
    print(origin_of(ROOT))
    print(f"{chosen.model}: {chosen.rounds} rounds, run written: {written}")
    for title, kind in (("wall", "times"), ("CPU", "cpu_times")):
        times = {name: getattr(arm, kind)[WARM_UP:] for name, arm in arms.items()}
        step, *_ = median_with_interval(times["alone"])
        print(f"{title} time of a step alone {step * 1e3:.3f} ms")
        for name in names[1:]:
            pairs = [other - alone for other, alone in zip(times[name], times["alone"], strict=True)]
            middle, low, high = median_with_interval(pairs)
            print(
                f"  {name:12} {middle * 1e6:8.1f} µs [{low * 1e6:.1f}, {high * 1e6:.1f}] a step, "
                f"{middle / step:.3%} [{low / step:.3%}, {high / step:.3%}]"
            )
    within = high <= max(LIMIT_S, LIMIT_SHARE * step)  # of CPU time, which other work on the machine disturbs less
    said = "held" if within else "NOT HELD"
    print(f"limit of the upper end, CPU time: {LIMIT_S * 1e6:.0f} µs or {LIMIT_SHARE:.1%} of a step: {said}")
    return 0 if within and written else 1


if __name__ == "__main__":
    sys.exit(main())
