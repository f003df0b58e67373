"""Is a finding's cost what its remedy gains? A head that is copied whole, found without being told, and then mended.

    python benchmarks/selftest/copied_head.py [--hidden 64] [--words 262144] [--budget 60]

A model with random weights of many words is trained a step by PEFT and answers requests. These are taken apart as by
`lorameter profile --phase generate`, with requests that have the remedy in the same turns, so that whatever disturbs
falls on all of them; then the rules are asked. The cost is a share of the prefill, so each turn's own is that share of
its own prefill, and whether it lies within a tenth of the turn's gain is judged, in seconds, by intervals of medians
over all turns. What the profiler's few requests leave open of that share is not in the intervals.

Exit status 1 unless the finding is there and its cost within a tenth of the gain: also where the intervals are too wide
to tell.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.machine import provenance
from harness.models import catalogue, shapes
from harness.models.costs.peaks import Peak
from harness.profile.accounting import TimeSpan, counted_samples, span_of
from harness.profile.requests.accounting import request_accounts
from harness.profile.requests.evidence import evidence_of_requests
from harness.profile.requests.facts import SERVED, RequestProfile
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
from harness.trial.inference.generate import Request
from harness.trial.inference.server import Server
from harness.trial.profiling.borders import pair_times
from harness.trial.profiling.requests import BorderedRequest, told_of_request
from harness.trial.profiling.trial import ProfiledTrial

WITHIN = 0.10
"""By how much of the gain a cost may miss it."""
REMEDY = {"copy_head_input": True}
MENDED = "mended_first_token_time_s"
"""Samples of the requests that have it, one a turn."""


def main() -> int:
    """Profile, diagnose, mend, and print both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--words", type=int, default=262144)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for the turns; the least come in any case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return profile_and_judge(Path(folder), options.hidden, options.words, options.budget)


def profile_and_judge(folder: Path, hidden: int, words: int, budget_s: float) -> int:
    """One model: what is found, what is gained."""
    trial, workload = serving(folder, hidden, words)
    profile = requests_of(trial, workload, folder, turns(trial, workload, budget_s))
    served, merged = request_accounts(profile)
    found = {one.code: one for one in diagnose_requests(evidence_of_requests(profile, served, merged))}
    print(f"{profile.device_name}; torch {provenance.library_version('torch')}; {words} words of {hidden} numbers")
    print(f"found: {', '.join(found) or 'nothing'}")
    finding = found.get("weight-copied")
    if finding is None or finding.cost_s is None or finding.changes != REMEDY:
        return 1
    print(finding.message)
    plain, mended, prefill = (
        counted_samples(profile, name, SERVED) for name in ("first_token_time_s", MENDED, "phase_prefill_s")
    )
    print(f"cost {finding.cost_s:.4f} s of {served.first_token.value:.4f} s to first token")
    middle = statistics.median(prefill)
    costs = [finding.cost_s * own / middle for own in prefill]
    return judge(costs, [slow - fast for slow, fast in zip(plain, mended, strict=True)])


def judge(costs_s: Sequence[float], gains_s: Sequence[float]) -> int:
    """Print whether the cost is near enough to the gain, from those of each turn; the exit status."""
    pairs = list(zip(costs_s, gains_s, strict=True))
    miss = span_of([cost - gain for cost, gain in pairs])
    above = span_of([cost - (1 + WITHIN) * gain for cost, gain in pairs])
    below = span_of([cost - (1 - WITHIN) * gain for cost, gain in pairs])
    print(f"gain {_seconds(span_of(gains_s))} over {len(pairs)} turns; the cost is {_seconds(miss)} from it")
    print(f"past {WITHIN:.0%} more than the gain {_seconds(above)}, past {WITHIN:.0%} less {_seconds(below)}")
    if above.low is None or above.high is None or below.low is None or below.high is None:
        print("not decided: too few turns for an interval")
        return 1
    if above.high <= 0 <= below.low:
        print(f"the cost is within {WITHIN:.0%} of the gain")
        return 0
    is_missed = above.low > 0 or below.high < 0
    print(f"the cost is over {WITHIN:.0%} from the gain" if is_missed else "not decided: the intervals are too wide")
    return 1


def _seconds(span: TimeSpan) -> str:
    ends = "no interval" if span.low is None or span.high is None else f"{span.low:.4f} to {span.high:.4f}"
    return f"{span.value:.4f} s [{ends}]"


def turns(trial: ProfiledTrial, workload: Workload, budget_s: float) -> dict[str, tuple[float, ...]]:
    """Samples as of `ProfiledTrial.apart`, and of a request with the remedy between the plain one and the bordered one
    of each pair, whichever of these is first."""
    parts, ask = trial._built, trial._serving.ask
    mended = Server(parts.trainee.model, parts.stream, workload, Variant(name="mended", r=4, **REMEDY))
    mended.warm_up(1)
    calls = itertools.count()

    def told(request: Request, is_plain: bool) -> Mapping[str, float]:
        found = told_of_request(request, is_plain)
        return found if next(calls) % 2 else {**found, MENDED: mended.ask().first_token_time_s}

    bordered = BorderedRequest(parts.trainee.model, ask, "cpu")
    return pair_times(ask, bordered, "cpu", what="request", told=told, budget_s=budget_s)


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


def requests_of(
    trial: ProfiledTrial, workload: Workload, folder: Path, samples: dict[str, tuple[float, ...]]
) -> RequestProfile:
    """The profile of its requests, with the adapter beside the base, whose times are these."""

    def read(kind: Any, name: str) -> Any:
        return codec.from_json(kind, json.loads((folder / name).read_text(encoding="utf-8")), name)

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
