"""The judges of the claims: what of the evidence confirms one, and what refutes it.

A limit stands where the sentence has one; where it has none, here with its reason.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.claim import Decision, decided, undecided
from benchmarks.gpu.evidence import Evidence, NotSeenError
from benchmarks.gpu.steps import BASES
from lorameter.machine.telemetry import COUNTER_PERIOD_S
from lorameter.records.record import TrialRecord

MOST_ERROR = 0.1
"""Of an estimate: on the variants of reports/proof/memory_estimate.txt a CPU's is off by less."""
MOST_UNKNOWN = 0.01
"""Share of a profile's kernel time that may lie in kernels without a name of ours."""
HAND_OVER_S = "0.003"
REST_EFFECT = 0.01
"""The tolerance: what a hand-over may change of a step without being worth an alarm."""
NEW_LENGTH_MS = (15.0, 60.0)
"""What a new length may cost and still be what was published, 23 to 37 ms: that was another host."""


def zygote_forks(evidence: Evidence) -> Decision:
    """One thread, no device, and a child that computes on the GPU."""
    told = evidence.fact("zygote")
    child = told["child"]
    said = f"threads {', '.join(told['threads'])}; fork: {told['refuses_to_fork'] or 'allowed'}"
    if "threads" in child:
        said += f"; threads after it {len(child['threads'])}, with the device {len(child['threads_with_device'])}"
    if child.get("device") == "cpu":
        return undecided(f"torch sees no GPU in the child; {said}")
    lacks = told["lacks"] or "nothing"
    alone = len(told["threads"]) == len(child.get("threads", ())) == 1
    holds = alone and told["refuses_to_fork"] is None and told["lacks"] is None and child.get("sum") == 8.0
    return decided(holds, f"{said}; lacks {lacks}; child: {child.get('error') or child['device']}")


def child_reads_nvml(evidence: Evidence) -> Decision:
    """Each counter a value or its reason; those that every data centre's GPU has are there."""
    child = evidence.fact("zygote")["child"]
    if "known" not in child:
        return undecided(child.get("nvml") or child.get("error", "the child says nothing of NVML"))
    silent = [name for name, reason in child["missing"].items() if not reason]
    if silent:
        return decided(False, f"missing without a reason: {', '.join(silent)}")
    missing = "; ".join(f"{name}: {reason}" for name, reason in child["missing"].items())
    return decided(True, f"{len(child['known'])} values" + (f"; missing {missing}" if missing else ""))


def events_agree(evidence: Evidence) -> Decision:
    """A lap by events is the wall's, and holds no less than the kernels that CUPTI recorded in it."""
    told = evidence.fact("clock")
    wall, kernels = told["events_over_wall"], told["events_over_kernels"]
    said = f"events over wall {wall:.4f}, over recorded kernels {kernels:.4f}" if kernels else f"over wall {wall:.4f}"
    if kernels is None:
        return undecided(f"no kernel was recorded; {said}")
    return decided(0.99 <= wall <= 1.001 and 0.995 <= kernels <= 1.05, said)


def hand_over_costs_nothing(evidence: Evidence) -> Decision:
    """The step after a rest as long as a hand-over is the step without one."""
    after = evidence.fact("clock")["after_rest"]
    said = ", ".join(f"× {ratio:.3f} after {float(rest) * 1e3:g} ms" for rest, ratio in after.items())
    return decided(abs(after[HAND_OVER_S] - 1) <= REST_EFFECT, said)


def counter_moves_often_enough(evidence: Evidence) -> Decision:
    """The period of the energy counter is at most the one that is allowed for."""
    period = evidence.fact("counters")["energy_period_ms"]
    if period is None:
        return undecided("the counter did not move twice while it was looked at")
    return decided(period <= COUNTER_PERIOD_S * 1e3, f"it moves every {period:.1f} ms")


def idle_clocks_are_left_out(evidence: Evidence) -> Decision:
    """While work is queued no moment is one of an idle GPU."""
    told = evidence.fact("counters")
    queued, after = told["queued"], told["after"]
    said = (
        f"idle in {queued['idle']} of {queued['of']} moments with work queued, in {after['idle']} of {after['of']} "
        f"after it; {(queued['sm_clock_hz'] or 0) / 1e9:.2f} and {(after['sm_clock_hz'] or 0) / 1e9:.2f} GHz"
    )
    return decided(queued["idle"] == 0, said)


def flash_refuses_a_mask(evidence: Evidence) -> Decision:
    """Forced to one backend, an explicit mask is refused by flash; what then runs is said."""
    told = evidence.fact("attention")
    takes = ", ".join(name for name, taken in told["takes_mask"].items() if taken) or "nobody"
    chosen = ", ".join(f"{case}: {backend}" for case, backend in told["chosen"].items())
    return decided(not told["takes_mask"]["FLASH_ATTENTION"], f"a mask is taken by {takes}; chosen for {chosen}")


def names_are_known(evidence: Evidence) -> Decision:
    """No kernel of the usual calls is without a rule."""
    told = evidence.fact("names")
    if told["empty"]:
        return undecided(f"no kernel was recorded of {', '.join(told['empty'])}")
    count = sum(len(kernels) for kernels in told["kernels"].values())
    unknown = "; ".join(told["unknown"])
    return decided(not told["unknown"], f"{count} kernels, unknown: {unknown or 'none'}")


def step_is_explained(variant: str) -> Any:
    """A judge of one profile: its phases add up to the step."""

    def judge(evidence: Evidence) -> Decision:
        step = _profile(evidence, variant)["step"]
        rest, whole = step["remainder"], step["step"]["value"]
        low, high = (100 * rest[end] / whole for end in ("low", "high"))
        said = f"a step of {whole * 1e3:.1f} ms leaves [{low:.2f}, {high:.2f}] % unexplained ({step['pairs']} pairs)"
        return undecided(said) if step["explained"] is None else decided(step["explained"], said)

    return judge


def kernels_are_told(evidence: Evidence) -> Decision:
    """The profiles' seconds are those of kernels with a name."""
    said, worst = [], 0.0
    for variant in BASES:
        seconds = {
            category: sum(phases.values()) for category, phases in _profile(evidence, variant)["categories_s"].items()
        }
        busy = sum(value for category, value in seconds.items() if category != "idle")
        if not busy:
            return undecided(f"{variant}: no kernel was recorded")
        share = seconds.get("other", 0.0) / busy
        worst = max(worst, share)
        said.append(f"{variant}: {100 * share:.2f} % of the kernels' time without a name")
    return decided(worst <= MOST_UNKNOWN, "; ".join(said))


def nobody_beats_the_peak(evidence: Evidence) -> Decision:
    """A step's share of the stated peak is a share."""
    said, holds = [], True
    for variant in BASES:
        trained = _profile(evidence, variant)["ceilings"].get("train")
        if not trained:
            return undecided("the device has no stated peak")
        used = trained["hfu"]
        said.append(f"{variant}: HFU {100 * used['value']:.1f} %, MFU {100 * trained['mfu']['value']:.1f} %")
        holds = holds and 0 < used["value"] < 1
    return decided(holds, "; ".join(said))


def study_is_valid(evidence: Evidence) -> Decision:
    """Every trial ok, every required path active, on both bases."""
    records = list(evidence.run("study").records)
    bad = [f"{one.trial} {one.status}: {one.failure.message if one.failure else ''}" for one in records if not _ok(one)]
    paths = [check for one in records for check in one.checks]
    idle = sorted({f"{check['path']} {check['status']}" for check in paths if check["status"] not in _MET})
    if not records:
        return undecided("no trial ended")
    if bad or idle:
        return decided(False, "; ".join([*bad, *idle])[:600])
    names = sorted({one.name for one in records})
    if len(names) < 2:
        return undecided(f"only {', '.join(names)} ended")
    return decided(True, f"{len(records)} trials of {', '.join(names)} ok, {len(paths)} checks met")


_MET = ("active", "not_applicable")


def _ok(record: TrialRecord) -> bool:
    return record.status in ("ok", "interrupted", "not_run")


def estimate_is_near(evidence: Evidence) -> Decision:
    """The estimated peak of training beside the one that the study measured."""
    train = evidence.document("estimate")["train"]
    if train["measured_bytes"] is None:
        return undecided("the study has left no peak to set beside it")
    said = (
        f"estimated {train['total_bytes'] / 2**30:.2f} GiB, measured {train['measured_bytes'] / 2**30:.2f} GiB: "
        f"{100 * train['error']:+.1f} %"
    )
    return decided(abs(train["error"]) <= MOST_ERROR, said)


def same_is_same(evidence: Evidence) -> Decision:
    """An A/B of one interpreter with itself: its control and its verdicts on time."""
    found = evidence.document("same")
    if "comparisons" not in found:
        raise NotSeenError("same: rehearsed only")
    timed = [one for one in found["comparisons"] if one["metric"].endswith("_s")]
    judged = [*timed, *found["control"].values()]
    if not timed:
        return undecided("nothing was compared")
    said = "; ".join(f"{one['metric']} {_interval(one)} {one['verdict']}" for one in timed)
    return decided(all(one["verdict"] not in ("regressed", "improved") for one in judged), said)


def lockstep_is_finer(evidence: Evidence) -> Decision:
    """The control's half-width where processes take turns, against where they follow each other."""
    widths = {}
    for level in ("lockstep", "replicates"):
        control = evidence.document(level).get("control", {}).get("train")
        if not control or control["low"] is None:
            return undecided(f"{level}: no control was judged")
        widths[level] = (control["high"] - control["low"]) / 2
    said = "; ".join(f"{level}: ± {100 * width:.2f} %" for level, width in widths.items())
    return decided(widths["lockstep"] < widths["replicates"], f"half-width of the control, {said}")


def cold_has_its_parts(evidence: Evidence) -> Decision:
    """Import, load, first token and completion, each a number, and their sum within the whole."""
    cold = [one.values for one in evidence.run("cold").records if "cold_start_time_s" in one.values]
    if not cold:
        return undecided("no cold start ended")
    parts = ("cold_import_time_s", "cold_load_time_s", "cold_completion_time_s")
    holds = all(set(parts) <= set(one) and sum(one[part] for part in parts) <= one["cold_start_time_s"] for one in cold)
    mean = {name: sum(one.get(name, 0.0) for one in cold) / len(cold) for name in (*parts, "cold_start_time_s")}
    return decided(holds, "; ".join(f"{name} {value:.2f}" for name, value in mean.items()) + f" ({len(cold)} starts)")


def new_lengths_cost_what_was_published(evidence: Evidence) -> Decision:
    """Where torch takes cuDNN's attention for one token, a length that is new keeps the host as long as published."""
    told, chosen = evidence.fact("lengths"), evidence.fact("attention")["chosen"]["one token"]
    said = "; ".join(
        f"{which}: {told[which]['new_ms']:.2f} ms new, {told[which]['again_ms']:.2f} ms again" for which in told["of"]
    )
    if "CUDNN" not in chosen:
        return undecided(f"torch takes {chosen} here; {said}")
    low, high = NEW_LENGTH_MS
    return decided(low <= told["default"]["new_ms"] - told["default"]["again_ms"] <= high, said)


def cudnn_takes_a_mask_on_hopper(evidence: Evidence) -> Decision:
    """On sm_90 and sm_100 an explicit mask is cuDNN's; elsewhere memory-efficient takes it."""
    told = evidence.fact("attention")
    takes = told["takes_mask"]
    said = f"capability {told['capability']}: " + ", ".join(f"{name} {taken}" for name, taken in takes.items())
    if told["capability"] in ("9.0", "10.0"):
        return decided(takes["CUDNN_ATTENTION"] and "CUDNN" in told["chosen"]["masked"], said)
    return decided("EFFICIENT" in told["chosen"]["masked"], said)


def paging_waits_for_every_tensor(evidence: Evidence) -> Decision:
    """An update waits for the device at least once for each tensor."""
    told = evidence.fact("paged")
    return decided(told["waits"] >= told["tensors"], f"{told['waits']} waits for {told['tensors']} tensors")


def start_of_the_device_is_told(evidence: Evidence) -> Decision:
    """Isolated trials of the study say what the device's own start took."""
    starts = [one.values["device_start_time_s"] for one in evidence.run("study").records
              if "device_start_time_s" in one.values]  # fmt: skip
    if not starts:
        return undecided("no isolated trial ended")
    return decided(min(starts) > 0, f"{min(starts):.2f} to {max(starts):.2f} s in {len(starts)} isolated trials")


def all_settings_share_a_base(evidence: Evidence) -> Decision:
    """The sweep ran at shared-base, all its trials were ok, and its control is no difference."""
    run = evidence.run("sweep")
    records = list(run.records)
    turns = [one for one in records if one.interleaving == "shared-base"]
    bad = sorted({f"{one.trial} {one.status}" for one in records if not _ok(one)})
    if not [one for one in turns if one.status == "ok"]:
        return decided(False, "; ".join(bad)) if bad else undecided(f"no trial ended; {run.manifest.status}")
    settings = {one.name for one in turns if one.status == "ok"}
    said = f"{len(settings)} settings took turns on one base"
    return decided(not bad, said + (f"; {'; '.join(bad)}" if bad else ""))


def _profile(evidence: Evidence, variant: str) -> dict[str, Any]:
    found = evidence.document(f"profile-{variant}")
    if "step" not in found:
        raise NotSeenError(f"profile-{variant}: rehearsed only")
    return found


def _interval(one: dict[str, Any]) -> str:
    if one["low"] is None:
        return f"{one['ratio']}"
    return f"{one['ratio']:.4f} [{one['low']:.4f}, {one['high']:.4f}]"
