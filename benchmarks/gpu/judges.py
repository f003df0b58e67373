"""The judges of the claims: the evidence that confirms a claim, and the evidence that refutes it.

A limit is stated in the claim's sentence or defined here, with its reason.
"""

from __future__ import annotations

from benchmarks.gpu.claim import Decision, decided, undecided
from benchmarks.gpu.evidence import Evidence
from benchmarks.gpu.steps import BASES
from lorameter.machine.telemetry import COUNTER_PERIOD_S
from lorameter.records.record import TrialRecord
from lorameter.records.units import format_ratio

ERRORS = (-0.11, 0.34)
"""The allowed relative difference of a measured peak from its estimate, as stated in docs/measure-my-model.md."""
FOUND = 0.03
"""The slow-down that an A/B of five replicates must find; a smaller one is undecided if missed."""
MAX_UNKNOWN = 0.01
"""The largest share of a profile's kernel time in kernels that no rule names."""
NO_REST, HAND_OVER_S = "0.0", "0.003"
REST_EFFECT = 0.01
"""The largest effect of a hand-over on a step."""


def zygote_forks(evidence: Evidence) -> Decision:
    """Judge that the zygote has one thread and no device, and that its child computes on the GPU."""
    found = evidence.fact("zygote")
    child = found["child"]
    text = f"threads {', '.join(found['threads'])}; fork: {found['refuses_to_fork'] or 'allowed'}"
    if "threads" in child:
        text += f"; threads after it {len(child['threads'])}, with the device {len(child['threads_with_device'])}"
    if child.get("device") == "cpu":
        return undecided(f"torch sees no GPU in the child; {text}")
    alone = len(found["threads"]) == len(child.get("threads", ())) == 1
    holds = alone and found["refuses_to_fork"] is None and child.get("sum") == 8.0
    return decided(holds, f"{text}; child: {child.get('error') or child['device']}")


def child_reads_nvml(evidence: Evidence) -> Decision:
    """Judge that each counter has a value or a reason, and that the counters of every data-centre GPU have values."""
    child = evidence.fact("zygote")["child"]
    if "known" not in child:
        return undecided(child.get("nvml") or child.get("error", "the child found no NVML"))
    silent = [name for name, reason in child["missing"].items() if not reason]
    if silent:
        return decided(False, f"missing without a reason: {', '.join(silent)}")
    missing = "; ".join(f"{name}: {reason}" for name, reason in child["missing"].items())
    return decided(True, f"{len(child['known'])} values" + (f"; missing {missing}" if missing else ""))


def hand_over_costs_nothing(evidence: Evidence) -> Decision:
    """Judge the step after a rest as long as a hand-over against steps without one; repeated steps without a rest give
    the noise."""
    after = evidence.fact("clock")["after_rest"]
    slowed, noise = after[HAND_OVER_S] - 1, abs(after[NO_REST] - 1)
    text = ", ".join(f"× {ratio:.3f} after {float(rest) * 1e3:g} ms" for rest, ratio in after.items())
    if slowed <= REST_EFFECT:
        return decided(True, text)
    return decided(False, text) if slowed > REST_EFFECT + 2 * noise else undecided(f"within noise: {text}")


def counter_moves_often_enough(evidence: Evidence) -> Decision:
    """Judge that the period of the energy counter is at most the allowed one."""
    period = evidence.fact("counters")["energy_period_ms"]
    if period is None:
        return undecided("the counter did not move twice while it was looked at")
    return decided(period <= COUNTER_PERIOD_S * 1e3, f"it moves every {period:.1f} ms")


def idle_clocks_are_left_out(evidence: Evidence) -> Decision:
    """Judge that no sample is of an idle GPU while work is queued."""
    found = evidence.fact("counters")
    queued, after = found["queued"], found["after"]
    text = (
        f"idle in {queued['idle']} of {queued['of']} moments with work queued, in {after['idle']} of {after['of']} "
        f"after it; {(queued['sm_clock_hz'] or 0) / 1e9:.2f} and {(after['sm_clock_hz'] or 0) / 1e9:.2f} GHz"
    )
    return decided(queued["idle"] == 0, text)


def flash_refuses_a_mask(evidence: Evidence) -> Decision:
    """Judge that flash, as the only backend, refuses an explicit mask; the evidence names the backend that runs
    otherwise."""
    found = evidence.fact("attention")
    takes = ", ".join(name for name, taken in found["takes_mask"].items() if taken) or "none"
    chosen = ", ".join(f"{case}: {backend}" for case, backend in found["chosen"].items())
    return decided(not found["takes_mask"]["FLASH_ATTENTION"], f"a mask is taken by {takes}; chosen for {chosen}")


def step_is_explained(evidence: Evidence, *, variant: str) -> Decision:
    """Judge that the phases of one variant's profile add up to the step."""
    step = evidence.document(f"profile-{variant}", "step")
    rest, whole = step["remainder"], step["step"]["value"]
    low, high = (100 * rest[end] / whole for end in ("low", "high"))
    text = f"a step of {whole * 1e3:.1f} ms leaves [{low:.2f}, {high:.2f}] % unexplained ({step['pairs']} pairs)"
    return undecided(text) if step["explained"] is None else decided(step["explained"], text)


def kernels_are_known(evidence: Evidence) -> Decision:
    """Judge that the profiles' GPU time is in named kernels."""
    shares = {}
    for variant in BASES:
        categories = evidence.document(f"profile-{variant}", "categories_s")
        seconds = {category: sum(phases.values()) for category, phases in categories.items() if category != "idle"}
        if not any(seconds.values()):
            return undecided(f"{variant}: no kernel was recorded")
        shares[variant] = seconds.get("other", 0.0) / sum(seconds.values())
    text = "; ".join(f"{name}: {100 * one:.2f} % of the kernels' time without a name" for name, one in shares.items())
    return decided(max(shares.values()) <= MAX_UNKNOWN, text)


def peak_is_not_exceeded(evidence: Evidence) -> Decision:
    """Judge that a step's share of the stated peak is below 1."""
    trained = {variant: evidence.document(f"profile-{variant}", "ceilings").get("train") for variant in BASES}
    if not all(trained.values()):
        return undecided("the device has no stated peak")
    shares = {variant: (one["hfu"]["value"], one["mfu"]["value"]) for variant, one in trained.items()}
    text = "; ".join(f"{name}: HFU {100 * hfu:.1f} %, MFU {100 * mfu:.1f} %" for name, (hfu, mfu) in shares.items())
    return decided(all(0 < hfu < 1 for hfu, _ in shares.values()), text)


def study_is_valid(evidence: Evidence, *, step: str) -> Decision:
    """Judge that every trial of a study is ok and every required path active, in at least two variants."""
    records = evidence.run(step).records
    names = sorted({one.name for one in records})
    if len(names) < 2:
        return undecided(f"only {', '.join(names) or 'nothing'} ended")
    bad = [f"{one.trial} {one.status}: {one.failure.message if one.failure else ''}" for one in records if not _ok(one)]
    paths = [check for one in records for check in one.checks if check["required"] is not None]
    met = ("active", "not_applicable")
    idle = sorted({f"{check['path']} {check['status']}" for check in paths if check["status"] not in met})
    if bad or idle:
        return decided(False, "; ".join([*bad, *idle])[:600])
    return decided(True, f"{len(records)} trials of {', '.join(names)} ok, {len(paths)} checks met")


def _ok(record: TrialRecord) -> bool:
    return record.status in ("ok", "interrupted", "not_run")


def estimate_is_near(evidence: Evidence, *, variant: str) -> Decision:
    """Judge the estimated peak of training of one variant against the one that the study measured."""
    train = evidence.document(f"estimate-{variant}", "train")
    if train["measured_bytes"] is None:
        return undecided("the study has left no peak to compare with")
    off = train["measured_bytes"] / train["total_bytes"] - 1
    text = (
        f"estimated {train['total_bytes'] / 2**30:.2f} GiB, measured {train['measured_bytes'] / 2**30:.2f} GiB: "
        f"{100 * off:+.1f} %"
    )
    return decided(ERRORS[0] <= off <= ERRORS[1], text)


def same_is_same(evidence: Evidence) -> Decision:
    """Judge the control of an A/B: the base against itself."""
    control = evidence.document("twins", "control").get("train")
    if not control or control["low"] is None:
        return undecided("no control was judged")
    text = f"{format_ratio(control['ratio'], control['low'], control['high'])} {control['verdict']}"
    return decided(control["verdict"] not in ("regressed", "improved"), text)


def slowdown_is_found(evidence: Evidence) -> Decision:
    """Judge the A/B whose candidate has more work in each step: the verdict must be regressed."""
    compared = evidence.document("twins", "comparisons")
    step = next((one for one in compared if one["metric"] == "step_time_s"), None)
    if step is None:
        return undecided("nothing was compared")
    text = f"{format_ratio(step['ratio'], step['low'], step['high'])} {step['verdict']}"
    if step["verdict"] == "regressed":
        return decided(True, text)
    return undecided(f"the work is too little: {text}") if step["ratio"] < 1 + FOUND else decided(False, text)


def warm_requests_are_timed(evidence: Evidence) -> Decision:
    """Judge that on both bases a request has a time to first token, which is below its total time."""
    means: dict[str, tuple[float, float]] = {}
    for one in evidence.run("study").records:
        whole, first = (one.samples.get(name, ()) for name in ("request_time_s", "first_token_time_s"))
        if whole and first:
            means[one.name] = (sum(first) / len(first), sum(whole) / len(whole))
    if len(means) < len(BASES):
        return undecided(f"requests of {', '.join(means) or 'no variant'} were timed")
    text = "; ".join(
        f"{name}: {first * 1e3:.0f} ms to the first token of {whole:.2f} s" for name, (first, whole) in means.items()
    )
    return decided(all(0 < first <= whole for first, whole in means.values()), text)


def energy_is_recorded(evidence: Evidence) -> Decision:
    """Judge that isolated trials have a positive energy over their steps, and clocks."""
    found = [one for one in evidence.run("study").records if "energy_steps" in one.values]
    if not found:
        return undecided("no isolated trial ended")
    lacking = [one.trial for one in found if not one.values.get("device_energy_train_j")]
    text = "; ".join(
        f"{one.name}: {one.values.get('device_energy_train_j', 0.0) / one.values['energy_steps']:.0f} J a step at "
        f"{one.values.get('device_sm_clock_max_train_hz', 0.0) / 1e9:.2f} GHz"
        for one in found
    )
    return decided(not lacking and all("device_sm_clock_max_train_hz" in one.values for one in found), text)


def claims_are_decided(evidence: Evidence) -> Decision:
    """Judge that the sweep supports or refutes the time claims of the study of LoRA parameters."""
    found = evidence.document("claims", "claims")
    judged = [one for one in found if one["verdict"] != "not judged"]
    text = "; ".join(f"{one['id']} {one['verdict']}" for one in judged)
    open_ones = [one["id"] for one in judged if one["verdict"] == "inconclusive"]
    if not judged or open_ones:
        return undecided(f"inconclusive: {', '.join(open_ones)}; {text}" if judged else "no claim was judged")
    return decided(True, text)


def script_is_measured(evidence: Evidence) -> Decision:
    """Judge that the run of a wrapped script has timed steps and a GPU memory peak."""
    timed = [one for one in evidence.run("wrap").records if one.samples.get("step_time_s")]
    if not timed:
        return undecided("no step was timed")
    seen = any(name.startswith("device_peak") for one in timed for name in one.memory)
    return decided(
        seen, f"{len(timed[0].samples['step_time_s'])} steps; peak of the GPU {'seen' if seen else 'not seen'}"
    )


def cold_has_its_parts(evidence: Evidence) -> Decision:
    """Judge that import, load, first token and completion have times whose sum is within the total."""
    cold = [one.values for one in evidence.run("study").records if "cold_start_time_s" in one.values]
    if not cold:
        return undecided("no cold start ended")
    parts = ("cold_import_time_s", "cold_load_time_s", "cold_completion_time_s")
    holds = all(set(parts) <= set(one) and sum(one[part] for part in parts) <= one["cold_start_time_s"] for one in cold)
    mean = {name: sum(one.get(name, 0.0) for one in cold) / len(cold) for name in (*parts, "cold_start_time_s")}
    return decided(holds, "; ".join(f"{name} {value:.2f}" for name, value in mean.items()) + f" ({len(cold)} starts)")


def cudnn_takes_a_mask_on_hopper(evidence: Evidence) -> Decision:
    """Judge that cuDNN takes an explicit mask on sm_90 and sm_100, and memory-efficient attention elsewhere."""
    found = evidence.fact("attention")
    takes = found["takes_mask"]
    text = f"capability {found['capability']}: " + ", ".join(f"{name} {taken}" for name, taken in takes.items())
    if found["capability"] in ("9.0", "10.0"):
        return decided(takes["CUDNN_ATTENTION"] and "CUDNN" in found["chosen"]["masked"], text)
    return decided("EFFICIENT" in found["chosen"]["masked"], text)


def device_start_is_recorded(evidence: Evidence) -> Decision:
    """Judge that isolated trials of the study record the start time of the device."""
    values = [one.values for one in evidence.run("study").records]
    starts = [one["device_start_time_s"] for one in values if "device_start_time_s" in one]
    if not starts:
        return undecided("no isolated trial ended")
    return decided(min(starts) > 0, f"{min(starts):.2f} to {max(starts):.2f} s in {len(starts)} isolated trials")


def all_settings_share_a_base(evidence: Evidence) -> Decision:
    """Judge that the sweep ran at shared-base, and that all its trials were ok."""
    run = evidence.run("sweep")
    bad = sorted({f"{one.trial} {one.status}" for one in run.records if not _ok(one)})
    settings = {one.name for one in run.records if one.interleaving == "shared-base" and one.status == "ok"}
    if not settings and not bad:
        return undecided(f"no trial ended; {run.manifest.status}")
    text = f"{len(settings)} settings took turns on one base"
    return decided(not bad, text + (f"; {'; '.join(bad)}" if bad else ""))
