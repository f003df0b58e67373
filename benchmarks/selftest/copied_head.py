"""Is a finding's cost what its remedy gains? A head that is copied whole, found without being told, and then mended.

    python benchmarks/selftest/copied_head.py [--hidden 64] [--words 262144] [--pairs 16]

A model with random weights of many words is trained a step by PEFT and answers requests. These are taken apart as by
`lorameter profile --phase generate`, and the rules are asked. Then requests with and without the remedy take turns in
the same process, so that whatever disturbs falls on both. Exit status 1 where the finding is not there, or its cost is
further than a tenth from the median gain.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from harness.machine import provenance
from harness.models import catalogue, shapes
from harness.models.costs.peaks import Peak
from harness.profile.accounting import span_of
from harness.profile.requests.accounting import request_accounts
from harness.profile.requests.evidence import evidence_of_requests
from harness.profile.requests.facts import RequestProfile
from harness.profile.requests.rules import diagnose_requests
from harness.records import codec
from harness.records.activity import PEAKS, REQUEST_ACTIVITY, REQUEST_SIGHT, Activity
from harness.records.memory_account import MemoryAccount
from harness.records.record import TrialRecord
from harness.records.request_sight import RequestSight
from harness.studies.protocol import Protocol
from harness.studies.request import TrialRequest
from harness.studies.variant import Variant
from harness.studies.workload import Workload
from harness.trial.building.shared import SharedBase
from harness.trial.data.tokens import prepare
from harness.trial.inference.generate import generate
from harness.trial.profiling.trial import ProfiledTrial

WITHIN = 0.10
"""By how much of the gain a cost may miss it."""


def main() -> int:
    """Profile, diagnose, mend, and print both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--words", type=int, default=262144)
    parser.add_argument("--pairs", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return judge(Path(folder), options.hidden, options.words, options.pairs)


def judge(folder: Path, hidden: int, words: int, pairs: int) -> int:
    """One model: what is found, what is gained."""
    trial, workload = serving(folder, hidden, words)
    profile = requests_of(trial, workload, folder)
    served, merged = request_accounts(profile)
    found = {one.code: one for one in diagnose_requests(evidence_of_requests(profile, served, merged))}
    print(f"{profile.device_name}; torch {provenance.library_version('torch')}; {words} words of {hidden} numbers")
    print(f"found: {', '.join(found) or 'nothing'}")
    if "weight-copied" not in found:
        return 1
    finding = found["weight-copied"]
    mended = dataclasses.replace(profile.variant, **finding.changes)
    gains, befores = [], []
    for pair in range(pairs):
        times = {}
        for variant in (profile.variant, mended) if pair % 2 else (mended, profile.variant):
            model, prompt = trial._built.trainee.model, trial._built.stream.prompt(pair)
            times[variant.copy_head_input] = generate(model, prompt, 2, variant=variant).first_token_time_s
        gains.append(times[False] - times[True])
        befores.append(times[False])
    gain = span_of(gains)
    cost_s = finding.cost_s or 0.0
    share, gained = (finding.cost_share or 0.0), statistics.median(g / b for g, b in zip(gains, befores, strict=True))
    print(f"{finding.message}")
    print(f"cost {cost_s:.4f} s, {share:.1%} of the time to first token")
    print(f"gain {gain.value:.4f} s [{gain.low}, {gain.high}], {gained:.1%} of it, over {pairs} pairs")
    print(f"the cost is {cost_s / gain.value - 1:+.1%} from the gain in seconds, {share / gained - 1:+.1%} in shares")
    return int(abs(share / gained - 1) > WITHIN)


def serving(folder: Path, hidden: int, words: int) -> tuple[ProfiledTrial, Workload]:
    """A trial of such a model that answers requests."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": words, "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    workload = Workload(
        model=f"random:{folder}", sequence_length=32, batch_size=1, train_sequences=4, held_out_records=4,
        held_out_sequences=1, prompt_tokens=32, new_tokens=4,
    )  # fmt: skip
    request = TrialRequest(
        trial="t", variant=Variant(name="v", r=4), role="variant", replicate=0, seed=1, workload=workload,
        protocol=Protocol(), interleaving="replicates", measures=("steps", "peaks", "requests"), device="cpu",
        threads=1, tokens_path=prepare(workload, folder).path, scratch=str(folder), log_path="",
    )  # fmt: skip
    trial = ProfiledTrial(request, SharedBase())
    for command in ("build", "begin_generate"):
        trial.run(command)
    return trial, workload


def requests_of(trial: ProfiledTrial, workload: Workload, folder: Path) -> RequestProfile:
    """Its requests taken apart, with the adapter beside the base."""

    def read(kind: Any, name: str) -> Any:
        return codec.from_json(kind, json.loads((folder / name).read_text(encoding="utf-8")), name)

    samples = dict(trial.run("apart", merged=False).samples)
    trial.run("sight")
    trial.run("request_activity", merged=False)
    trial.run("peak", rates=["memory"])
    machine = provenance.probe_machine()
    record = TrialRecord(
        trial="t", status="ok", name="v", variant="v", role="variant", replicate=0, position=0,
        interleaving="replicates", seed=1, started_unix_s=0.0, wall_time_s=0.0, samples=samples,
    )  # fmt: skip
    return RequestProfile(
        study="copied head", variant=Variant(name="v", r=4), workload=workload, device="cpu",
        device_name=machine.device_name, threads=1, cpus=machine.cpus, wide_registers=machine.avx512_bf16,
        memory_bytes=machine.memory_bytes, record=record, sight=read(RequestSight, REQUEST_SIGHT),
        activity=read(Activity, REQUEST_ACTIVITY), merged_activity=None,
        memory=MemoryAccount(phase="generate", kinds={}, peak_bytes=0),
        peaks=read(dict[str, Peak], PEAKS), shape=shapes.shape(catalogue.resolve(workload.model)),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
