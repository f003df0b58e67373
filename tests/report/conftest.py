"""Fixtures with one document of every report, from constructed results, for tests of the renderers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from lorameter.machine.doctor import DoctorCheck
from lorameter.machine.provenance import Machine
from lorameter.models import catalogue, shapes
from lorameter.models.costs.memory import MemoryEstimate
from lorameter.models.costs.peaks import Peak, find_gpu
from lorameter.models.shapes import ModelShape
from lorameter.parity import Parity, judge_parity
from lorameter.profile import accounting
from lorameter.profile.accounting import request_accounts
from lorameter.profile.evidence import gather_evidence, gather_request_evidence
from lorameter.profile.facts import Profile, RequestProfile
from lorameter.profile.remedy import RemedyResult
from lorameter.profile.rules import Finding, diagnose, diagnose_requests
from lorameter.records import codec, store
from lorameter.records.activity import Activity, ModelSize, OperatorUse, PhaseActivity, RequestFacts, WeightCopy
from lorameter.records.record import Failure, LogitDistance, MemoryAccount, Notice, ServedAnswers, TrialRecord
from lorameter.report.blocks import Document
from lorameter.report.comparison import (
    describe_attribution,
    describe_bisection,
    describe_claims,
    describe_comparison,
    describe_gate,
)
from lorameter.report.estimate import (
    describe_calibration,
    describe_checks,
    describe_estimate,
    describe_fit,
    describe_plan,
    describe_sizes,
)
from lorameter.report.history import describe_history, describe_runs
from lorameter.report.parity import Sample, describe_differing_answers, describe_parity, describe_samples
from lorameter.report.phrases import describe_notices, warn_before_run
from lorameter.report.profile import describe_profile, describe_remedy, describe_requests
from lorameter.report.run import describe_run
from lorameter.report.run_view import ReportFilter, make_run_view
from lorameter.results.history import History, read_history
from lorameter.run.bisect import Bisection, Candidate, bisect
from lorameter.run.forecast import Forecast
from lorameter.run.memory_fit import Fitter, MemoryDevice, advise, on_gpu, on_machine
from lorameter.run.plan import make_plan
from lorameter.stats import Comparison, compare_trials
from lorameter.studies.request import serving_modes
from lorameter.studies.variant import LoraVariant, Variant
from lorameter.studies.workload import Workload
from lorameter.verdicts.ab import attribute_difference, build_report
from lorameter.verdicts.calibrate import Calibration, Price, Rates
from lorameter.verdicts.claims import judge_claims
from lorameter.verdicts.compare import compare
from lorameter.verdicts.gate import judge, load_policy, read_comparand
from tests.constructed import PROFILES, RUNS

NOTICES = (Notice(code="cpu-contention", message="others ran.", remedy="Stop them."),)
MACHINE = Machine(
    device="cpu", device_name="Test [CPU]", device_memory_bytes=None, driver=None, cuda=None, cpu_model="Test CPU",
    cpus=2, memory_bytes=8 * 2**30, avx512_bf16=True, kernel="6.0", python="3.11.0",
)  # fmt: skip
COMPARISON = compare_trials([[1.0], [1.1], [1.2]], [[2.0], [2.21], [2.4]], pairing="replicate")


def constructed_run(name: str) -> store.Run:
    """Return one of the constructed runs."""
    return store.read_run(str(RUNS / name), RUNS)


def constructed_profile(name: str) -> Profile:
    """Return one of the constructed profiles."""
    return codec.from_json(Profile, json.loads((PROFILES / f"{name}.json").read_text()), name)


def profile_document(name: str) -> Document:
    """Return a profile with all values computed from it."""
    profile = constructed_profile(name)
    step = accounting.step_account(profile)
    tokens, found = accounting.token_shares(profile), accounting.compute_ceilings(profile, step.step)
    return describe_profile(profile, step, tokens, found, diagnose(gather_evidence(profile, step, tokens)))


REQUEST_TIMES = {"prepare": 0.001, "prefill": 0.2, "decode": 0.07, "choose": 0.004}
"""Seconds of each phase of a request of 8 tokens; a decoded token takes 10 ms."""
MERGED_TIMES = REQUEST_TIMES | {"prefill": 0.19, "decode": 0.035}
HEAD_COPY = WeightCopy(
    weight="lm_head.weight", shape=(1, 64, 4096), operator="aten::contiguous", calls=1.0, time_s=0.3
)  # fmt: skip
"""A copy of the weight of the head; its time is under the profiler, which doubles it."""


def request_samples(times: dict[str, float], prefix: str = "") -> dict[str, tuple[float, ...]]:
    """Return the samples of eight pairs of requests without noise; the phases explain all but 1 ms of a request."""
    whole = sum(times.values()) + 0.001
    found = {f"phase_{name}_s": (seconds,) * 8 for name, seconds in times.items()} | {
        "plain_request_time_s": (whole,) * 8, "plain_request_cpu_time_s": (0.99 * whole,) * 8,
        "bordered_request_time_s": (whole,) * 8, "bordered_request_cpu_time_s": (0.99 * whole,) * 8,
        "between_requests_s": (2e-5,) * 7, "first_token_time_s": (times["prefill"] + 0.002,) * 8,
        "time_per_output_token_s": (times["decode"] / 7 + 0.0005,) * 8,
    }  # fmt: skip
    return {f"{prefix}{name}": values for name, values in found.items()}


def request_activity(times: dict[str, float], adapted: bool) -> Activity:
    """Return the activity of a request under the profiler, which doubles all times; a forward pass has no idle time."""
    phases = []
    for name, seconds in times.items():
        uses = [OperatorUse(name="aten::mm", category="matmul", calls=70.0 + 70.0 * adapted, time_s=2 * seconds)]
        if name == "prefill":
            uses = [OperatorUse(name="aten::copy_", category="copy", calls=1.0, time_s=2 * seconds)]
        phases.append(
            PhaseActivity(
                phase=name, window_s=2 * seconds, busy_s=2 * seconds, operators=tuple(uses),
                copies=(HEAD_COPY,) if name == "prefill" else (), parts_s={"head": 0.31} if name == "prefill" else {},
            )
        )  # fmt: skip
    return Activity(device="cpu", step_times_s=(0.55, 0.55, 0.55), phases=tuple(phases))


def constructed_requests() -> RequestProfile:
    """Return a profile of requests with all facts."""
    variant = LoraVariant(name="wide", r=4, adapter_dtype="bfloat16")
    peak = {"device": "this CPU with 1 thread", "source": "constructed"}
    record = TrialRecord(
        trial="r0-wide", status="ok", name="wide", variant="v", role="variant", replicate=0, position=0,
        interleaving="replicates", seed=0, started_unix_s=0.0, wall_time_s=1.0,
        samples={
            **request_samples(REQUEST_TIMES), **request_samples(MERGED_TIMES, "merged_"),
        },
        values={
            "cold_import_time_s": 4.0, "cold_prepare_time_s": 0.1, "cold_base_time_s": 1.5, "cold_adapter_time_s": 0.2,
            "cold_first_token_time_s": 0.32, "cold_completion_time_s": 0.4, "cold_start_time_s": 6.2,
        },
        memory={"host_peak_first_token_bytes": 2**28},
        checks=({"path": "peft.dtype", "observed": "bfloat16", "required": None},),
    )  # fmt: skip
    size = ModelSize(
        linear_elements=100_000, linear_bytes=200_000, head_elements=262_144, head_bytes=524_288,
        adapter_elements=10_000, adapter_bytes=20_000, norm_bytes=640,
    )  # fmt: skip
    return RequestProfile(
        study="s", variant=variant, workload=Workload(prompt_tokens=32, new_tokens=8), device="cpu",
        device_name="a [fast] CPU", threads=1, cpus=2, wide_registers=True, memory_bytes=2**33, record=record,
        facts=RequestFacts(
            prompt_rows=32, logit_rows=1, cache="DynamicCache",
            cache_bytes=39 * 1024, cache_moved=1.0, head="lm_head.weight", size=size,
        ),
        activity=request_activity(REQUEST_TIMES, True), merged_activity=request_activity(MERGED_TIMES, False),
        memory=MemoryAccount(phase="generate", kinds={"process": 2**28, "kv_cache": 39 * 1024}, peak_bytes=2**29),
        peaks={
            "product": Peak(rate="bfloat16", per_s=1e12, **peak), "memory": Peak(rate="memory", per_s=1e10, **peak)
        },
        shape=ModelShape(
            hidden_size=64, intermediate_size=128, layers=2, heads=2, kv_heads=2, head_dim=32, vocab_size=4096,
            context=64, tied=True, architecture="llama",
        ),
    )  # fmt: skip


@pytest.fixture
def requests_profile() -> RequestProfile:
    """A constructed profile of requests: times that add up, a copied head, and an adapter whose cost merging
    removes."""
    return constructed_requests()


def requests_document() -> Document:
    """Return the profile of requests with all values computed from it."""
    profile = constructed_requests()
    served, merged = request_accounts(profile)
    findings = diagnose_requests(gather_request_evidence(profile, served, merged))
    return describe_requests(profile, served, merged, findings)


def calibration() -> Calibration:
    """Return the calibration of a machine that detects 5 % but not 1 %."""
    prices = (
        Price(effect=0.01, tolerance=0.005, replicates=None, replicates_low=None, replicates_high=None, minutes=None),
        Price(effect=0.05, tolerance=0.01, replicates=6, replicates_low=5, replicates_high=9, minutes=2.5),
    )
    return Calibration(
        run="run", device="a [fast] CPU", interleaving="lockstep", replicates=24, seconds_per_replicate=9.87,
        identical=COMPARISON, injected=COMPARISON, sd=0.021, sd_low=0.017, sd_high=0.03,
        rates=(Rates(replicates=5, used=5.0, false_alarms=0.002, equivalent=0.5, found=0.973),), prices=prices,
    )  # fmt: skip


def checks() -> tuple[DoctorCheck, ...]:
    """Return one check of each grade."""
    return (
        DoctorCheck(about="runs", name="device", grade="good", found="a CPU [2 cores]"),
        DoctorCheck(about="measures", name="energy", grade="note", found="no counter", remedy="Ask for RAPL."),
        DoctorCheck(about="spoils", name="swap", grade="bad", found="3 GiB of it used", remedy="Free memory."),
        DoctorCheck(about="spoils", name="clock", grade="unfit", found="held down", remedy="Cool it."),
    )


def samples() -> tuple[Sample, ...]:
    """Return a complete and a truncated answer with text that looks like markup."""
    fields = {"prompt": "Input: [/b] 4\n", "reference": "four", "trained": "[red]4[/red]\n\nsurely", "tokens": 5}
    return (
        Sample(**fields, base_answer=None, ended=True),
        Sample(**fields | {"trained": " "}, base_answer="5", ended=False),
    )


def sizes() -> tuple[Any, ...]:
    """Return the sizes of two variants of one base."""
    from lorameter.trial.building.build import Sizes  # imports torch, which no other report needs

    counts = {"base_parameters": 3_115_264, "adapter_bytes": 2**22, "gradient_bytes": 2**22}
    counts |= {"optimizer_state_bytes": 2**23, "saved_bytes": 2**21}
    return (
        Sizes(variant="r[16]", trainable_parameters=299_008, **counts),
        Sizes(variant="r64", trainable_parameters=1_196_032, **counts),
    )


def fits() -> dict[str, Callable[[], Document]]:
    """Return documents of a variant that does not fit on a GPU, one that does, and one on this machine."""
    shape = shapes.shape(catalogue.resolve("random:llama2-7b"))
    wide, narrow = Workload(batch_size=6, sequence_length=1024), Workload(batch_size=1, sequence_length=128)
    refusing = LoraVariant(name="v", init_lora_weights="pissa")
    cases = {
        "no fit": (on_gpu(MACHINE, find_gpu("RTX 5090")), refusing, wide),
        "fit": (on_gpu(MACHINE, find_gpu("H200")), LoraVariant(name="v"), wide),
        "no fit on 1 GiB": (on_gpu(MACHINE, find_gpu("1GiB")), LoraVariant(name="v"), wide),
        "fit on this machine": (
            on_machine(dataclasses.replace(MACHINE, avx512_bf16=False), 8 * 2**30),
            LoraVariant(name="v", quantization="nf4"),
            narrow,
        ),
    }

    def make(device: MemoryDevice, variant: Variant, workload: Workload) -> Callable[[], Document]:
        fitter = Fitter(device=device, shape=shape, process_bytes=None)
        return lambda: describe_fit(advise(fitter, variant, workload, with_largest=True), workload, "h100")

    return {name: make(*case) for name, case in cases.items()}


def estimates() -> tuple[MemoryEstimate, ...]:
    """Return the estimates of two phases, one with memory outside the allocator."""
    kinds = {"process": 2**28, "gradients": 2**22}
    return (
        MemoryEstimate(phase="train", kinds=kinds, outside_allocator={"context": 2**27}),
        MemoryEstimate(phase="generate", kinds={"process": 2**28}),
    )


def remedy_result() -> RemedyResult:
    """Return a remedy that made the step slower, in an invalid comparison."""
    finding = Finding(
        code="dropout", message="m", cost_s=0.02, cost_share=0.25, remedy="r", changes={"lora_dropout": 0.0}
    )
    return RemedyResult(
        finding=finding, run="run", interleaving="lockstep", metric="step_time_s", comparison=COMPARISON,
        control=COMPARISON, failures=("r0-v: oom [/b]",), notices=NOTICES, valid=False,
    )  # fmt: skip


def bisection(slow_from: int | None) -> Bisection:
    """Return a bisection of eight revisions, all equally fast or slower from `slow_from` on; the fourth cannot be
    measured."""

    def ask(spec: str, replicates: int) -> Comparison:
        place = int(spec.removeprefix("c"))
        if place == 4:
            return Comparison(verdict="invalid", reason="it does not import [/b]")
        ratio = 1.1 if slow_from is not None and place >= slow_from else 1.0
        trials = [[ratio * (1 + 0.001 * number)] for number in range(replicates)]
        return compare_trials([[1.0]] * replicates, trials, pairing="replicate")

    candidates = [Candidate(spec=f"c{place}", label=f"{place:010x} Subject [{place}]") for place in range(9)]
    return bisect(candidates, ask, replicates=8)


def listed_runs() -> list[dict[str, Any]]:
    """Return rows of `lorameter list runs`: a complete run, an incomplete baseline, and a damaged run."""
    sound = {"run": "20261125-105758-lora-or-qlora-e5aa", "study": "lora-or-qlora", "title": "LoRA", "status": "ok"}
    sound |= {"trials": {"ok": 6}, "verdict": "regressed", "size_bytes": 2**21, "baseline": False}
    return [
        sound,
        sound | {"run": "b", "trials": {"ok": 2, "oom": 1}, "verdict": "invalid", "baseline": True},
        sound | {"run": "c[/b]", "status": "damaged", "title": "manifest.json: no JSON", "trials": {}},
    ]


@pytest.fixture(scope="session")
def history() -> History:
    """The history of all constructed runs."""
    return read_history(RUNS)


def parity() -> Parity:
    """Return a parity document with one failed merge and one serving mode with some differing answers."""
    variant, answers = LoraVariant(name="nf4", quantization="nf4"), tuple((7, 8, number) for number in range(9))
    ways = tuple(way for group in serving_modes(variant) for way in group)
    near = LogitDistance(
        positions=3, argmax_differs=1, kl_mean_nats=1.23e-5, kl_max_nats=0.00456, difference_mean=0.012,
        difference_max=0.345, cosine_mean=0.99876, cosine_min=0.9,
    )  # fmt: skip
    served = [
        ServedAnswers(
            way=way.name,
            answers=answers if place < 3 else tuple((7, 9, number) for number in range(9)),
            distances=(near,) * 9 if place else (),
            losses=(2.0, 2.5 + place / 100, 3.0),
        )
        for place, way in enumerate(ways)
    ]
    served[2] = ServedAnswers(
        way=ways[2].name, failure=Failure(phase="parity", kind="OutOfMemoryError", message="too big")
    )
    return Parity(
        study="s", variant=variant, workload=Workload(), device="cpu", device_name="Test [CPU]", adapter="[/b]",
        record=None, ways=ways, served=tuple(served), prompts=((1, 2),) * 9, notices=NOTICES,
    )  # fmt: skip


@pytest.fixture(scope="session")
def every_report(small_study, history) -> dict[str, Document]:
    """One document of every report, by its kind."""
    ab, unsure = constructed_run("ab"), constructed_run("ab-unsure")
    base, candidate = (read_comparand(str(RUNS / name), RUNS) for name in ("sound", "slower"))
    compared = compare(base, candidate, metrics=[], all_metrics=True)
    policy = dataclasses.replace(load_policy(None), required=("held_out_loss",))
    expected = Forecast(
        time_s=90.0, basis="an earlier run", replicates=3, skipped=("cold",), half_width=0.05,
        noise="an assumed scatter of 2.2 % a replicate", sought_width_s=200.0, memory_bytes=2**31, disk_bytes=2**20,
    )  # fmt: skip
    made: dict[str, Callable[[], Document]] = {
        "run": lambda: describe_run(make_run_view(constructed_run("sound"))),
        "swept run": lambda: describe_run(make_run_view(constructed_run("swept"))),
        "cold run": lambda: describe_run(make_run_view(constructed_run("cold"))),
        "run with one replicate": lambda: describe_run(make_run_view(constructed_run("one-replicate"))),
        "noisy run": lambda: describe_run(make_run_view(constructed_run("noisy"))),
        "run by a metric": lambda: describe_run(
            make_run_view(constructed_run("sound"), ReportFilter(metrics=("*loss", "*_bytes")))
        ),
        "failed run": lambda: describe_run(make_run_view(constructed_run("failed"))),
        "killed run": lambda: describe_run(make_run_view(constructed_run("killed"))),
        "comparison": lambda: describe_comparison(compared),
        "gate": lambda: describe_gate(judge(compared, policy)),
        "attribution": lambda: describe_attribution(attribute_difference(ab), ab),
        "A/B": lambda: describe_comparison(build_report(ab)),
        "A/B that cannot tell": lambda: describe_gate(judge(build_report(unsure), load_policy(None))),
        "claims": lambda: describe_claims(judge_claims(constructed_run("swept"))),
        "profile": lambda: profile_document("explained"),
        "empty profile": lambda: profile_document("unseen"),
        "profile of requests": requests_document,
        "parity": lambda: describe_parity(parity(), judge_parity(parity())),
        "answers that differ": lambda: describe_differing_answers(parity(), str),
        "tried remedy": lambda: describe_remedy(remedy_result()),
        "estimate": lambda: describe_estimate(
            LoraVariant(name="v"), Workload(), MACHINE, estimates(), {"train": 2**28 + 2**20}
        ),
        **fits(),
        "sizes": lambda: describe_sizes("tiny-llama", sizes()),
        "sample": lambda: describe_samples(samples(), "v, replicate 0"),
        "calibration": lambda: describe_calibration(calibration(), 128),
        "doctor": lambda: describe_checks(checks(), fit=False),
        "plan": lambda: describe_plan(make_plan(small_study), expected, MACHINE, NOTICES),
        "notices": lambda: describe_notices(NOTICES),
        "notices in full": lambda: warn_before_run(NOTICES),
        "bisection": lambda: describe_bisection(bisection(slow_from=6), "step time of plain"),
        "bisection without a culprit": lambda: describe_bisection(bisection(slow_from=None), "step time of plain"),
        "list of runs": lambda: describe_runs(listed_runs()),
        "history": lambda: describe_history(history),
        "history of every run": lambda: describe_history(history, every_run=True),
    }
    return {name: make() for name, make in made.items()}
