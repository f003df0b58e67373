"""Trials of two ranks in separate processes, most of them with an injected fault: one JSON line each.

The process imports as the zygote does and trains nothing, so that each scenario can be forked from it and fork its
ranks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

from lorameter.records import codec
from lorameter.records.record import TrialRecord
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload

WORKLOAD = Workload(
    sequence_length=32, batch_size=4, train_sequences=32, held_out_records=4, held_out_sequences=2, prompt_tokens=8,
    new_tokens=3,
)  # fmt: skip
PROTOCOL = Protocol(
    warmup_steps_min=2, warmup_steps_max=3, turns=2, steps_per_turn=2, phases=("train",), step_timeout_s=240,
    allow_disturbed=True,
)  # fmt: skip
VARIANT = LoraVariant(name="plain", r=4, dtype="float32", compute_dtype="float32", target_modules=("q_proj", "v_proj"))
CHECKED = ("build", "verify")
WHOLE = (*CHECKED, "warm_up", "turn", "turn", "finish_training")
NF4 = {"quantization": "nf4"}
DROPOUT = {"lora_dropout": 0.1}


def on_rank(number, change):
    """Apply `change` to the trial of this rank after its construction."""
    from lorameter.trial.ranks import rank

    original = rank.RankTrial.__init__

    def init(self, request, rank_number):
        original(self, request, rank_number)
        if rank_number == number:
            change(self)

    rank.RankTrial.__init__ = init


def in_eval_mode():
    """Keep the model in eval mode, as `from_pretrained` returns it."""
    from lorameter.trial.ranks import rank

    original = rank.distribute
    rank.distribute = lambda model, strategy, **options: original(model.eval(), strategy, **options)


def from_the_first_turn(change_step):
    """Return a fault that changes rank 1 from its first turn on."""

    def sabotage():
        from lorameter.trial.trial import Trial

        def change(trial):
            turn = Trial.turn

            def faulty_turn(self, steps):
                change_step(self)
                return turn(self, steps)

            Trial.turn = faulty_turn

        on_rank(1, change)

    return sabotage


def leave_out_one_update(trial):
    """Skip the next optimizer step of this rank."""
    optimizer = trial.trainee.optimizer
    update = optimizer.step

    def skip(*given, **named):
        optimizer.step = update

    optimizer.step = skip


def out_of_memory():
    raise MemoryError("no more of it")


def one_rank_fails():
    """Fail in the process that trains on one rank, as if the model did not fit."""
    from lorameter.trial.ranks import trial

    trial._make_single = lambda request: out_of_memory()


@dataclasses.dataclass(frozen=True)
class Scenario:
    strategy: str = "ddp"
    variant: dict = dataclasses.field(default_factory=dict)
    workload: dict = dataclasses.field(default_factory=dict)
    commands: tuple = CHECKED
    sabotage: object = None
    timeout_s: float = PROTOCOL.step_timeout_s


TURNS = ("build", "turn")
SCENARIOS = {
    "ddp, lora": Scenario(commands=WHOLE),
    "ddp, qlora, accumulating": Scenario(commands=WHOLE, variant={**NF4, "gradient_accumulation": 2}),
    "fsdp2, lora": Scenario(strategy="fsdp2", commands=WHOLE),
    "fsdp2, qlora": Scenario(strategy="fsdp2", commands=WHOLE, variant=NF4),
    "fsdp2, qlora, repaired": Scenario(
        strategy="fsdp2", commands=WHOLE, variant=NF4, workload={"repair": "quant_state"}
    ),
    "dropout": Scenario(commands=WHOLE, variant=DROPOUT),
    "update left out": Scenario(commands=WHOLE, variant=DROPOUT, sabotage=from_the_first_turn(leave_out_one_update)),
    "in eval mode": Scenario(strategy="fsdp2", variant=NF4, sabotage=in_eval_mode),
    "in eval mode, repaired": Scenario(
        strategy="fsdp2", variant=NF4, workload={"repair": "quant_state"}, sabotage=in_eval_mode
    ),
    "dies": Scenario(commands=TURNS, sabotage=from_the_first_turn(lambda _: os.kill(os.getpid(), signal.SIGKILL))),
    "hangs": Scenario(commands=TURNS, sabotage=from_the_first_turn(lambda _: time.sleep(900)), timeout_s=100),
    "out of memory": Scenario(commands=TURNS, sabotage=from_the_first_turn(lambda _: out_of_memory())),
    "one rank fails": Scenario(commands=TURNS, sabotage=one_rank_fails),
}


def run(name: str, tokens: str, folder: Path) -> dict:
    """Return the record of one scenario, and its processes that are still running."""
    from lorameter.trial.process import prepare_process
    from lorameter.trial.ranks.trial import TrialOfRanks

    scenario = SCENARIOS[name]
    if scenario.sabotage:
        scenario.sabotage()
    workload = dataclasses.replace(WORKLOAD, ranks=2, strategy=scenario.strategy, **scenario.workload)
    request = TrialRequest(
        trial="r0", variant=dataclasses.replace(VARIANT, **scenario.variant), role="variant", replicate=0, seed=1,
        workload=workload, protocol=dataclasses.replace(PROTOCOL, step_timeout_s=scenario.timeout_s),
        interleaving="replicates", measures=("steps", "peaks"), device="cpu", threads=1,
        tokens_path=tokens, scratch=str(folder), log_path="",
    )  # fmt: skip
    prepare_process(request)
    trial = TrialOfRanks(request)
    record = TrialRecord(
        trial="r0", status="ok", name="plain", variant="", role="variant", replicate=0, position=0,
        interleaving="lockstep", seed=1, started_unix_s=0.0, wall_time_s=0.0,
    )  # fmt: skip
    for command in scenario.commands:
        record = record.merged(trial.run(command, **({"steps": 2} if command == "turn" else {})))
        if record.status != "ok":
            break
    left = [child.pid for child in psutil.Process().children()]
    trial.end()
    return {"name": name, "record": codec.to_json(record), "left": left}


def main(names: list[str]) -> None:
    from lorameter.trial.data.tokens import prepare
    from lorameter.trial.zygote import import_libraries

    import_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        child = os.fork()  # tokenising starts threads
        if child == 0:
            (Path(scratch) / "path").write_text(str(prepare(WORKLOAD, Path(scratch)).path))
            os._exit(0)
        os.waitpid(child, 0)
        tokens = (Path(scratch) / "path").read_text()
        for number, name in enumerate(names):
            child = os.fork()
            if child == 0:
                folder = Path(scratch) / str(number)
                folder.mkdir()
                print(json.dumps(run(name, tokens, folder)), flush=True)
                os._exit(0)
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
