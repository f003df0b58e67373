"""What does a check cost, against what it cost at another revision?

    python benchmarks/selftest/verify_cost.py [--against REVISION] [--turns 6]

``verify`` by each instrument, of a LoRA run of the size of SmolLM2-135M with weights drawn from its configuration, in
bfloat16 and in NF4. Revisions take turns, each time in a process of its own: first the other, then this one, then the
other way round. A turn's ratio is that of two processes that followed each other; its estimate is the geometric mean
with a bootstrap interval. What counts is the processor's time, in one thread, so that other work on the machine does
not. The first call in a process pays for imports and is left out.

Exit status 1 if an interval lies above the bound whole.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

BEFORE = "4296e53"
BOUND = 1.5
CALLS = 3
"""In a process, besides the first; the least of them counts, which a busy machine disturbs least."""
RUNS = ("bfloat16", "nf4")
INSTRUMENTS = ("profile", "spy")
ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    "pad_token_id": 0,
}  # fmt: skip
REQUIRED = {
    "attention.backend": "fused", "base.frozen": True, "lora.attached": True, "lora.learning": True, "mode": "train",
}  # fmt: skip


def measure(run: str, layers: int) -> dict[str, float]:
    """Seconds of processor time of a step and of ``verify`` by each instrument, in this process."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import kernels_check  # first: what is wrong with a revision shows before the large libraries are read
    from kernels_check.controls.small_run import fourbit

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"num_hidden_layers": layers})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if run == "nf4":
        for name, module in [*model.named_modules()]:
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                parent, _, last = name.rpartition(".")
                small = fourbit(module, quant_type="nf4", compute=torch.bfloat16)
                setattr(model.get_submodule(parent), last, small.to("cpu"))
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-4)
    ids = torch.randint(1, SIZES["vocab_size"], (1, 32))

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    step()
    took = {"step": _least(step)}
    for instrument in INSTRUMENTS:
        call = lambda instrument=instrument: kernels_check.verify(model, step, REQUIRED, instrument=instrument)  # noqa: E731
        call()
        took[instrument] = _least(call)
    return took


def _least(call: Any) -> float:
    times = []
    for _ in range(CALLS):
        begun = time.process_time()
        call()
        times.append(time.process_time() - begun)
    return min(times)


def in_process(code: Path, run: str, layers: int) -> dict[str, float]:
    """The same in a fresh process that imports ``kernels_check`` from a folder."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), "--measure", run, "--layers", str(layers)],
        env=os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the process of {code} ended with {done.returncode}: {done.stderr[-2000:]}")
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def checkout(revision: str, folder: Path) -> Path:
    """The code of a revision, without touching the working tree.

    Raises:
        RuntimeError: git does not know it.
    """
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", revision, "kernels_check"], capture_output=True, check=False
    )
    if archive.returncode:
        raise RuntimeError(f"git archive {revision}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def estimate(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean and its 95 % interval by bootstrap; of one turn the interval is unbounded."""
    import numpy as np
    from scipy.stats import bootstrap

    logs = np.log(ratios)
    if len(logs) < 2:
        return float(np.exp(logs.mean())), 0.0, float("inf")
    if np.ptp(logs) == 0:
        return (float(np.exp(logs[0])),) * 3
    found = bootstrap((logs,), np.mean, n_resamples=9999, method="percentile", rng=0).confidence_interval
    return float(np.exp(logs.mean())), float(np.exp(found.low)), float(np.exp(found.high))


def main(arguments: list[str] | None = None) -> int:
    """Measure by turns; 1 where the bound is exceeded for certain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default=BEFORE, metavar="REVISION", help=f"of git ({BEFORE})")
    parser.add_argument("--turns", type=int, default=6, help="of two processes each, per run")
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"], help="of the model")
    parser.add_argument("--measure", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        import kernels_check  # noqa: F401  before the large libraries, so that what is wrong with a revision shows first

        print(json.dumps(measure(options.measure, options.layers)))
        return 0
    from harness.machine.provenance import origin_of  # which a process that measures does without

    exceeded = False
    with tempfile.TemporaryDirectory() as folder:
        print(origin_of(ROOT))
        codes = (checkout(options.against, Path(folder)), ROOT)
        print(
            f"verify now over verify at {options.against}, {options.turns} turns of two processes each; bound {BOUND}"
        )
        for run in RUNS:
            turns: list[tuple[dict[str, float], dict[str, float]]] = []
            for turn in range(options.turns):
                order = codes if turn % 2 == 0 else codes[::-1]
                took = {code: in_process(code, run, options.layers) for code in order}
                turns.append((took[codes[0]], took[codes[1]]))
            for what in ("step", *INSTRUMENTS):
                middle, low, high = estimate([now[what] / before[what] for before, now in turns])
                seconds = sorted(now[what] for _, now in turns)[len(turns) // 2]
                print(f"  {run}, {what}: {middle:.3f} [{low:.3f}, {high:.3f}] ({seconds:.2f} s)", flush=True)
                exceeded |= what != "step" and low > BOUND
    print("exceeded" if exceeded else "holds: no interval lies above the bound")
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
