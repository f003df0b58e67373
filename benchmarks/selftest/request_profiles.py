"""Do the rules of requests find what was planted? Real requests, taken apart one by one.

    python benchmarks/selftest/request_profiles.py [--case NAME]

Each case is one field away from a healthy variant (its workload, or a smaller model) and must have the finding that it
was planted for; the healthy one, and the twin of a case, must not have it. That prompts meet a new length, that
choosing a token takes long, that a model answers in train mode, without a cache or with logits of the whole prompt, is
what no field of a variant makes of it: those cases are in the tests (`tests/profile/requests/test_rules.py`).

Prints what the phases leave of a request, and the findings. Exit status 1 where a planted finding is not found, or a
healthy one is.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from many_words import write_model
from portable import NARROW as NARROW_CPU

from harness.machine.provenance import Machine, origin_of, probe_machine
from harness.profile.requests.accounting import request_accounts
from harness.profile.requests.evidence import evidence_of_requests
from harness.profile.requests.measure import profile_requests
from harness.profile.requests.rules import diagnose_requests
from harness.run.executors import open_executor
from harness.studies.protocol import Protocol
from harness.studies.study import Study
from harness.studies.variant import Variant
from harness.studies.workload import Workload

ROOT = Path(__file__).parents[2]

HEALTHY: dict[str, Any] = {
    "r": 16, "dtype": "bfloat16", "adapter_dtype": "bfloat16", "merge_adapter": True, "copy_head_input": True,
    "kv_cache": "static", "optimizer": "adamw_fused",
}  # fmt: skip
BESIDE: dict[str, Any] = {"merge_adapter": False}
NF4: dict[str, Any] = {"quantization": "nf4"}
SERVED = Workload(
    sequence_length=32, batch_size=1, train_sequences=8, held_out_records=4, held_out_sequences=1, prompt_tokens=64,
    new_tokens=16,
)  # fmt: skip
LARGE, NARROW, TINY = (1024, 32768, 4), (256, 2048, 4), (64, 512, 1)
"""Width, words and blocks of a model whose weights take long to read, of one whose products are short beside what is
done with their inputs, and of one with hardly any."""
LONG: dict[str, Any] = {"request_batch": 8, "prompt_tokens": 384}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The healthy variant with changes, and the findings that must and must not be there."""

    name: str
    variant: dict[str, Any] = field(default_factory=dict)
    workload: dict[str, Any] = field(default_factory=dict)
    narrow: bool = False
    """Whether bitsandbytes is told of a CPU without AVX512-BF16. With it, it multiplies packed weights as they are."""
    repacked: bool = False
    """Whether that is what the case is about."""
    model: tuple[int, int, int] = LARGE
    found: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


PLANTED = (
    Case(name="copied head", variant={"copy_head_input": False}, found=("weight-copied",)),
    Case(name="adapter beside the base", variant=BESIDE, found=("adapter-unmerged",), absent=("mixed-types",)),
    Case(
        name="adapter in float32",
        variant={**BESIDE, "adapter_dtype": None},
        workload=LONG,
        model=NARROW,
        found=("mixed-types",),
    ),
    Case(name="4-bit weights", variant=NF4, narrow=True, found=("dequantisation",)),
    Case(name="long prompts", variant={"kv_cache": "dynamic"}, workload=LONG, found=("cache-reallocated",)),
    Case(name="hardly any weights", model=TINY, found=("launch-bound",)),
)
CASES = (
    Case(name="healthy", absent=tuple(sorted({code for case in PLANTED for code in case.found}))),
    *PLANTED,
    Case(name="adapter in bfloat16", variant=BESIDE, workload=LONG, model=NARROW, absent=("mixed-types",)),
    Case(name="4-bit weights as they are", variant=NF4, repacked=True, absent=("dequantisation",)),
    Case(name="long prompts, kept", workload=LONG, absent=("cache-reallocated",)),
)


def main() -> int:
    """Profile every case and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help="only this one")
    only = parser.parse_args().case
    machine = probe_machine()
    print(origin_of(ROOT))
    print(f"{'':26}{'a request':>12}{'remainder':>11}  findings")
    good = [case_holds(case) for case in CASES if only in (None, case.name) and is_possible(case, machine)]
    print(f"{sum(good)} of {len(good)} hold")
    return 0 if all(good) else 1


def is_possible(case: Case, machine: Machine) -> bool:
    """Whether this CPU can have the case; where not, that is said."""
    if machine.avx512_bf16 or not case.repacked:
        return True
    print(f"{case.name:26}left out: this CPU has no AVX512-BF16, without which bitsandbytes unpacks all weights")
    return False


def environment(case: Case) -> dict[str, str]:
    """What processes are told of the CPU."""
    behind = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{NARROW_CPU}{os.pathsep}{behind}" if behind else str(NARROW_CPU)} if case.narrow else {}


def case_holds(case: Case) -> bool:
    """Profile one case and judge it."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, environment(case)):
        hidden, words, blocks = case.model
        model = f"random:{write_model(Path(folder), hidden, words, blocks=blocks)}"
        study = study_of(case, model)
        profile, _ = profile_requests(study, study.variants[0], open_executor(), runs=Path(folder))
    served, merged = request_accounts(profile)
    codes = [one.code for one in diagnose_requests(evidence_of_requests(profile, served, merged))]
    missed = [f"{code} not found" for code in case.found if code not in codes]
    missed += [f"{code} found" for code in case.absent if code in codes]
    whole = served.whole.step.value
    print(
        f"{case.name:26}{1e3 * whole:9.1f} ms{served.whole.remainder.value / whole:+11.1%}  "
        f"{', '.join(codes) or 'none'}{'   MISSED: ' + ', '.join(missed) if missed else ''}",
        flush=True,
    )
    return not missed


def study_of(case: Case, model: str) -> Study:
    """A study of the case's variant alone."""
    variant = Variant(name="case", **(HEALTHY | case.variant))
    workload = dataclasses.replace(SERVED, model=model, **case.workload)
    return Study(
        name="case", title=case.name, workload=workload, protocol=Protocol(), variants=(variant,), reference="case"
    )


if __name__ == "__main__":
    sys.exit(main())
