"""Do two ranks train what one rank trains, and what do they gain? Each strategy, with LoRA and QLoRA, on real trials.

    python benchmarks/selftest/ranks_live.py [--model M] [--replicates N]

For each strategy one run of a study of two variants by two ranks, each trial beside one rank alone on the same
batches. The table shows how far apart the losses were at most (`ranks.losses`), every other check of the ranks, scaling
efficiency with its interval over replicates, and the shares of communication. Ends with 1 where a check does not hold.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from harness.machine.provenance import origin_of
from harness.records import store
from harness.records.metrics import samples_of
from harness.records.record import TrialRecord
from harness.records.units import format_interval
from harness.stats.estimate import estimate_trials

STRATEGIES = {"ddp": "", "fsdp2": "", "fsdp2, repaired": "quant_state"}
STUDY = """
title = "Two ranks"
[workload]
model = "{model}"
sequence_length = 64
batch_size = 4
train_sequences = 64
held_out_sequences = 4
ranks = 2
strategy = "{strategy}"
repair = "{repair}"
[protocol]
replicates = {replicates}
warmup_steps_min = 3
warmup_steps_max = 4
turns = 6
steps_per_turn = 1
[controls]
lora_dropout = 0.0
[[variant]]
name = "lora"
[[variant]]
name = "qlora"
quantization = "nf4"
"""


def measure(model: str, strategy: str, repair: str, replicates: int, folder: Path) -> store.Run:
    """One run; what disturbs it is in its intervals."""
    study = folder / "ranks.toml"
    study.write_text(STUDY.format(model=model, strategy=strategy, repair=repair, replicates=replicates))
    command = [
        sys.executable, "-m", "harness.cli", "run", str(study), "--runs-dir", str(folder), "--json",
        "--allow-disturbed",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout.strip():
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return store.read_run(json.loads(done.stdout)["run"], folder)


def checks_of(records: list[TrialRecord]) -> tuple[str, str, bool]:
    """What the losses were apart, the other checks of the ranks, and whether all of them hold."""
    checks = [check for record in records for check in record.checks if check["path"].startswith("ranks.")]
    losses = {check["reason"] for check in checks if check["path"] == "ranks.losses"}
    others = {check["path"].removeprefix("ranks.") for check in checks} - {"losses"}
    bad = [check for check in checks if check["status"] != "active"]
    faults = sorted({f"{check['path']}: {check['reason']}" for check in bad})
    said = "; ".join(faults) if faults else f"{len(others)} of {len(others)}"
    return "\n".join(sorted(losses)), said, bool(losses) and not bad and all(one.status == "ok" for one in records)


def main() -> int:
    """Print the table; 1 where two ranks do not train what one trains."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--replicates", type=int, default=3)
    options = parser.parse_args()
    table, holds = Table(title=f"Two ranks, {options.model}"), True
    for column in ("strategy", "variant", "losses", "other checks", "scaling efficiency", "communication"):
        table.add_column(column, overflow="fold")
    with tempfile.TemporaryDirectory() as folder:
        for name, repair in STRATEGIES.items():
            run = measure(options.model, name.partition(",")[0], repair, options.replicates, Path(folder))
            for variant in ("lora", "qlora"):
                if repair and variant == "lora":
                    continue
                records = [one for one in run.records if one.name == variant and "one_rank_step_time_s" in one.samples]
                losses, others, good = checks_of(records)
                efficiency = estimate_trials([samples_of(one, "scaling_efficiency") for one in records])
                shares = [one.values["communication_share"] for one in records]
                table.add_row(
                    name, variant, losses, others,
                    format_interval(efficiency.value, efficiency.low, efficiency.high, "1"),
                    f"{min(shares):.2f} to {max(shares):.2f}",
                )  # fmt: skip
                holds = holds and good
    console = Console(width=160)
    console.print(origin_of(Path(__file__).parent), table)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
