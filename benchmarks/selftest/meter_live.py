"""What a meter costs a step: a training alone and the same one wrapped, taking turns step by step.

Three processes run one script: alone, alone again, and with the hook and its writer. They take turns of some steps, and
each says how long it was from the begin of a step to that of the next, on the wall and on its CPUs, so that all that
the meter does in a step and between two is in it. The first step of a turn finds the caches as the others have left
them, which no training does that runs by itself: it is not counted. Of the others the mean counts, since what a meter
does for many steps it does in one of them; a turn of short steps is longer than it waits for that (0.1 s). The order is
shuffled in each round, and the difference of a round is paired.

Two processes of one script differ by themselves, by where their memory lies, and no number of rounds tells that from
what the meter costs: so all three are started anew for each replicate, whose value is the median of its rounds, and the
mean of the replicates stands with Student's 95 % interval. They compute on one CPU, the next one in each replicate:
CPUs of one machine are not alike, and a process stays on the one it is on. Alone against alone says what no difference
looks like.

What is judged is the upper end of the interval of the wrapped process, both on the wall, which is what a step takes,
and on its CPUs, where a difference is seen that the noise of the wall would hide: at most 0.5 % of a step, or 100 µs of
a shorter one. It wants a machine without other work: the meter asks the kernel for its CPU time once a step, and where
work waits for a CPU a system call is where a process loses it.

    python benchmarks/selftest/meter_live.py [--replicates N] [--rounds N] [--turn STEPS] [--model DIRECTORY]
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from harness.attach.child import environment
from harness.attach.variables import COMMAND, RUN
from harness.machine.provenance import origin_of
from harness.machine.seating import cpus_of, seat
from harness.stats import mean_interval

ROOT = Path(__file__).parents[2]
LIMIT_S, LIMIT_SHARE = 100e-6, 0.005
ALONE, WRAPPED = "alone", "wrapped"
NAMES = (ALONE, "alone again", WRAPPED)
KINDS = {"times": "wall", "cpu_times": "CPU"}
WARM_UP = 4
"""Rounds that are not counted: warm-up, the watched steps, and what is read once."""
SCRIPT = """
import sys, time
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import Trainer, TrainerCallback, TrainingArguments

steps, model, turn = int(sys.argv[1]), sys.argv[2], int(sys.argv[4])
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
    seen = None
    def on_step_begin(self, *args, **kwargs):
        if self.seen is None:
            print("ready", flush=True)
        else:
            self.seen.append((time.perf_counter(), time.process_time()))
            if len(self.seen) <= turn:
                return
            print("took", *(f"{wall} {cpu}" for wall, cpu in self.seen), flush=True)
        sys.stdin.readline()
        self.seen = [(time.perf_counter(), time.process_time())]

arguments = TrainingArguments(output_dir=sys.argv[3], use_cpu=True, max_steps=steps, report_to=[], save_strategy="no",
                              disable_tqdm=True, per_device_train_batch_size=1, logging_strategy="no")
Trainer(model, arguments, train_dataset=rows, callbacks=[Turn()]).train()
"""


class Arm:
    """One process of the script."""

    def __init__(self, name: str, folder: Path, steps: int, model: str, *, turn: int, wrapped: bool) -> None:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if wrapped:
            told = {RUN: str(folder / "runs" / "run"), COMMAND: "python train.py"}
            variables = environment(variables, variables=told)
        command = [sys.executable, str(folder / "train.py"), str(steps), model, str(folder / name), str(turn)]
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
        """Its next steps."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        told = list(map(float, self.wait().split()[1:]))
        for times, seen in ((self.times, told[::2]), (self.cpu_times, told[1::2])):
            between = [later - earlier for earlier, later in itertools.pairwise(seen)]
            times.append(statistics.fmean(between[1:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicate:
    """Medians over the rounds of three processes, in seconds a step, by the kind of time and the process."""

    steps: dict[str, float]
    """Of a step alone."""
    extra: dict[tuple[str, str], float]
    """Of the paired differences from a step alone."""
    written: bool
    """Whether the wrapped process has left a run."""


def take_turns(rounds: int, turn: int, model: str, seed: int) -> Replicate:
    """Start the three and let them alternate, so many steps a turn."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "train.py").write_text(SCRIPT)
        (folder / "runs").mkdir()
        length = (rounds + WARM_UP) * turn + 2
        arms = {name: Arm(name, folder, length, model, turn=turn, wrapped=name == WRAPPED) for name in NAMES}
        cpus = cpus_of(os.getpid())
        for arm in arms.values():
            arm.wait()
            seat(arm.process.pid, {cpus[seed % len(cpus)]})
        shuffled = random.Random(seed)
        for _ in range(rounds + WARM_UP):
            for name in shuffled.sample(NAMES, len(NAMES)):
                arms[name].turn()
        for arm in arms.values():
            arm.process.kill()
            arm.process.wait()
        written = (folder / "runs" / "run" / "manifest.json").is_file()
    steps: dict[str, float] = {}
    extra: dict[tuple[str, str], float] = {}
    for kind in KINDS:
        times = {name: getattr(arm, kind)[WARM_UP:] for name, arm in arms.items()}
        steps[kind] = statistics.median(times[ALONE])
        for name in NAMES[1:]:
            pairs = zip(times[name], times[ALONE], strict=True)
            extra[kind, name] = statistics.median(other - alone for other, alone in pairs)
    return Replicate(steps=steps, extra=extra, written=written)


def main() -> int:
    """Take turns, print what was found, and say whether the limit was held."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--replicates", type=int, default=80)
    options.add_argument("--rounds", type=int, default=12)
    options.add_argument("--turn", type=int, default=25, help="steps of a turn")
    options.add_argument("--model", default="small", help="a directory with a model; default: a step of about 10 ms")
    chosen = options.parse_args()
    print(origin_of(ROOT), flush=True)
    found = [take_turns(chosen.rounds, chosen.turn, chosen.model, seed) for seed in range(chosen.replicates)]
    written = all(one.written for one in found)
    model = Path(chosen.model).name
    size = f"{len(found)} replicates of {chosen.rounds} rounds of {chosen.turn} steps"
    print(f"{model}: {size}, every run written: {written}")
    broken = []
    for kind, title in KINDS.items():
        step = statistics.fmean(one.steps[kind] for one in found)
        print(f"{title} time of a step alone {step * 1e3:.3f} ms")
        for name in NAMES[1:]:
            mean, low, high = mean_interval([one.extra[kind, name] for one in found])
            if low is None or high is None:
                raise SystemExit("--replicates: one has no interval; make two at least")
            print(
                f"  {name:12} {mean * 1e6:8.1f} µs [{low * 1e6:.1f}, {high * 1e6:.1f}] a step, "
                f"{mean / step:.3%} [{low / step:.3%}, {high / step:.3%}]"
            )
            if name == WRAPPED and high > limit_of(step):
                broken.append(f"{title} time: at most {high * 1e6:.1f} µs a step")
    limit = f"limit of the upper end: {LIMIT_S * 1e6:.0f} µs or {LIMIT_SHARE:.1%} of a step"
    print(f"{limit}: {'NOT HELD: ' + '; '.join(broken) if broken else 'held'}")
    return 0 if written and not broken else 1


def limit_of(step_s: float) -> float:
    """The most that a meter may cost such a step, in seconds."""
    return max(LIMIT_S, LIMIT_SHARE * step_s)


if __name__ == "__main__":
    sys.exit(main())
