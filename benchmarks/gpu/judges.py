"""The judges of the claims: the evidence that confirms a claim, and the evidence that refutes it.

A limit is stated in the claim's sentence or defined here, with its reason.
"""

from __future__ import annotations

from benchmarks.gpu.claim import Decision, leave_undecided, make_decision
from benchmarks.gpu.evidence import Evidence
from benchmarks.gpu.steps import BASE_VARIANTS
from lorameter.records.record import TrialRecord
from lorameter.records.units import format_ratio

PEAK_ERRORS = (-0.11, 0.34)
"""The allowed relative difference of a measured peak from its estimate, as stated in docs/measure-my-model.md."""
MIN_SLOWDOWN = 0.03
"""The smallest slow-down that an A/B of five replicates must detect; missing a smaller one decides nothing."""
MAX_UNKNOWN = 0.01
"""The largest share of a profile's kernel time in kernels that no rule names."""


def judge_step_phases(evidence: Evidence, *, variant: str) -> Decision:
    """Judge that the phases of one variant's profile add up to the step."""
    step = evidence.document(f"profile-{variant}", "step")
    rest, whole = step["remainder"], step["step"]["value"]
    low, high = (100 * rest[end] / whole for end in ("low", "high"))
    text = f"a step of {whole * 1e3:.1f} ms leaves [{low:.2f}, {high:.2f}] % unexplained ({step['pairs']} pairs)"
    return leave_undecided(text) if step["explained"] is None else make_decision(step["explained"], text)


def judge_kernels(evidence: Evidence) -> Decision:
    """Judge that the profiles' GPU time is in named kernels."""
    shares = {}
    for variant in BASE_VARIANTS:
        categories = evidence.document(f"profile-{variant}", "categories_s")
        seconds = {category: sum(phases.values()) for category, phases in categories.items() if category != "idle"}
        if not any(seconds.values()):
            return leave_undecided(f"{variant}: no kernel was recorded")
        shares[variant] = seconds.get("other", 0.0) / sum(seconds.values())
    text = "; ".join(f"{name}: {100 * one:.2f} % of the kernels' time without a name" for name, one in shares.items())
    return make_decision(max(shares.values()) <= MAX_UNKNOWN, text)


def judge_peak_share(evidence: Evidence) -> Decision:
    """Judge that a step's share of the stated peak is below 1."""
    trained = {variant: evidence.document(f"profile-{variant}", "ceilings").get("train") for variant in BASE_VARIANTS}
    if not all(trained.values()):
        return leave_undecided("the device has no stated peak")
    shares = {variant: (one["hfu"]["value"], one["mfu"]["value"]) for variant, one in trained.items()}
    text = "; ".join(f"{name}: HFU {100 * hfu:.1f} %, MFU {100 * mfu:.1f} %" for name, (hfu, mfu) in shares.items())
    return make_decision(all(0 < hfu < 1 for hfu, _ in shares.values()), text)


def judge_study(evidence: Evidence, *, step: str) -> Decision:
    """Judge that no trial of a study failed and that every required path is active, in at least two variants."""
    records = evidence.run(step).records
    names = sorted({one.name for one in records})
    if len(names) < 2:
        return leave_undecided(f"only {', '.join(names) or 'nothing'} ended")
    failed = [one for one in records if _has_failed(one)]
    bad = [f"{one.trial} {one.status}: {one.failure.message if one.failure else ''}" for one in failed]
    paths = [check for one in records for check in one.checks if check["required"] is not None]
    met = ("active", "not_applicable")
    inactive = sorted({f"{check['path']} {check['status']}" for check in paths if check["status"] not in met})
    if bad or inactive:
        return make_decision(False, "; ".join([*bad, *inactive])[:600])
    return make_decision(True, f"{len(records)} trials of {', '.join(names)} ok, {len(paths)} checks met")


def _has_failed(record: TrialRecord) -> bool:
    return record.status not in ("ok", "interrupted", "not_run")


def judge_estimate(evidence: Evidence, *, variant: str) -> Decision:
    """Judge the estimated memory peak of one variant's training against the peak that the study measured."""
    train = evidence.document(f"estimate-{variant}", "train")
    if train["measured_bytes"] is None:
        return leave_undecided("the study has left no peak to compare with")
    error = train["measured_bytes"] / train["total_bytes"] - 1
    text = (
        f"estimated {train['total_bytes'] / 2**30:.2f} GiB, measured {train['measured_bytes'] / 2**30:.2f} GiB: "
        f"{100 * error:+.1f} %"
    )
    return make_decision(PEAK_ERRORS[0] <= error <= PEAK_ERRORS[1], text)


def judge_identical_code(evidence: Evidence) -> Decision:
    """Judge the control of an A/B: the base against itself."""
    control = evidence.document("twins", "control").get("train")
    if not control or control["low"] is None:
        return leave_undecided("no control was judged")
    text = f"{format_ratio(control['ratio'], control['low'], control['high'])} {control['verdict']}"
    return make_decision(control["verdict"] not in ("regressed", "improved"), text)


def judge_slowdown(evidence: Evidence) -> Decision:
    """Judge the A/B whose candidate has more work in each step: the verdict must be regressed."""
    compared = evidence.document("twins", "comparisons")
    step = next((one for one in compared if one["metric"] == "step_time_s"), None)
    if step is None:
        return leave_undecided("nothing was compared")
    text = f"{format_ratio(step['ratio'], step['low'], step['high'])} {step['verdict']}"
    if step["verdict"] == "regressed":
        return make_decision(True, text)
    return (
        leave_undecided(f"the work is too little: {text}")
        if step["ratio"] < 1 + MIN_SLOWDOWN
        else make_decision(False, text)
    )


def judge_warm_requests(evidence: Evidence) -> Decision:
    """Judge that on both bases a request has a time to first token, which is below its total time."""
    means: dict[str, tuple[float, float]] = {}
    for one in evidence.run("study").records:
        whole, first = (one.samples.get(name, ()) for name in ("request_time_s", "first_token_time_s"))
        if whole and first:
            means[one.name] = (sum(first) / len(first), sum(whole) / len(whole))
    if len(means) < len(BASE_VARIANTS):
        return leave_undecided(f"requests of {', '.join(means) or 'no variant'} were timed")
    text = "; ".join(
        f"{name}: {first * 1e3:.0f} ms to the first token of {whole:.2f} s" for name, (first, whole) in means.items()
    )
    return make_decision(all(0 < first <= whole for first, whole in means.values()), text)


def judge_energy(evidence: Evidence) -> Decision:
    """Judge that isolated trials record a positive energy per step, and clock rates."""
    found = [one for one in evidence.run("study").records if "energy_steps" in one.values]
    if not found:
        return leave_undecided("no isolated trial ended")
    without_energy = [one.trial for one in found if not one.values.get("device_energy_train_j")]
    text = "; ".join(
        f"{one.name}: {one.values.get('device_energy_train_j', 0.0) / one.values['energy_steps']:.0f} J a step at "
        f"{one.values.get('device_sm_clock_max_train_hz', 0.0) / 1e9:.2f} GHz"
        for one in found
    )
    has_clocks = all("device_sm_clock_max_train_hz" in one.values for one in found)
    return make_decision(not without_energy and has_clocks, text)


def judge_study_claims(evidence: Evidence) -> Decision:
    """Judge that the sweep supports or refutes the time claims of the study of LoRA parameters."""
    found = evidence.document("claims", "claims")
    judged = [one for one in found if one["verdict"] != "not judged"]
    text = "; ".join(f"{one['id']} {one['verdict']}" for one in judged)
    inconclusive = [one["id"] for one in judged if one["verdict"] == "inconclusive"]
    if not judged or inconclusive:
        return leave_undecided(f"inconclusive: {', '.join(inconclusive)}; {text}" if judged else "no claim was judged")
    return make_decision(True, text)


def judge_wrapped_script(evidence: Evidence) -> Decision:
    """Judge that the run of a wrapped script has timed steps and a GPU memory peak."""
    timed = [one for one in evidence.run("wrap").records if one.samples.get("step_time_s")]
    if not timed:
        return leave_undecided("no step was timed")
    has_peak = any(name.startswith("device_peak") for one in timed for name in one.memory)
    text = f"{len(timed[0].samples['step_time_s'])} steps; GPU memory peak {'recorded' if has_peak else 'missing'}"
    return make_decision(has_peak, text)


def judge_cold_start(evidence: Evidence) -> Decision:
    """Judge that import, load and completion have times whose sum is at most the total."""
    cold = [one.values for one in evidence.run("study").records if "cold_start_time_s" in one.values]
    if not cold:
        return leave_undecided("no cold start ended")
    parts = ("cold_import_time_s", "cold_load_time_s", "cold_completion_time_s")
    holds = all(set(parts) <= set(one) and sum(one[part] for part in parts) <= one["cold_start_time_s"] for one in cold)
    mean = {name: sum(one.get(name, 0.0) for one in cold) / len(cold) for name in (*parts, "cold_start_time_s")}
    return make_decision(
        holds, "; ".join(f"{name} {value:.2f}" for name, value in mean.items()) + f" ({len(cold)} starts)"
    )


def judge_device_start(evidence: Evidence) -> Decision:
    """Judge that isolated trials of the study record the start time of the device."""
    values = [one.values for one in evidence.run("study").records]
    starts = [one["device_start_time_s"] for one in values if "device_start_time_s" in one]
    if not starts:
        return leave_undecided("no isolated trial ended")
    return make_decision(min(starts) > 0, f"{min(starts):.2f} to {max(starts):.2f} s in {len(starts)} isolated trials")


def judge_shared_base(evidence: Evidence) -> Decision:
    """Judge that the sweep ran at shared-base, and that none of its trials failed."""
    run = evidence.run("sweep")
    bad = sorted({f"{one.trial} {one.status}" for one in run.records if _has_failed(one)})
    settings = {one.name for one in run.records if one.interleaving == "shared-base" and one.status == "ok"}
    if not settings and not bad:
        return leave_undecided(f"no trial ended; {run.manifest.status}")
    text = f"{len(settings)} settings took turns on one base"
    return make_decision(not bad, text + (f"; {'; '.join(bad)}" if bad else ""))
