"""The claims that the documentation makes about GPUs, with the sentence that makes each and the judge that decides it.

A limit stands where the sentence has one; where it has none, beside the judge with its reason. A sentence that changes
takes its claim with it: `tests/gpu/test_claims.py` looks for every quotation.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.claim import Claim, Decision, by_tests, decided, undecided
from benchmarks.gpu.evidence import Evidence, NotSeenError
from harness.machine.watch import COUNTER_PERIOD_S
from harness.records.record import TrialRecord

METERS, KERNELS = "tests/machine/test_gpu.py", "tests/kernels_check/test_gpu.py"
MOST_ERROR = 0.1
"""Of an estimate: on the variants of reports/proof/estimate.txt a CPU's is off by less."""
MOST_UNKNOWN = 0.01
"""Share of a profile's kernel time that may lie in kernels without a name of ours."""
HAND_OVER_S = "0.003"
REST_EFFECT = 0.01
"""The tolerance: what a hand-over may change of a step without being worth an alarm."""
VISITED_TWICE_MS = 1.0
"""A new length that costs the host less than this more than a known one costs nothing that a request would show."""


def zygote_forks(evidence: Evidence) -> Decision:
    """One thread, no device, and a child that computes on the card."""
    told = evidence.fact("zygote")
    child = told["child"]
    said = f"threads {', '.join(told['threads'])}; fork: {told['refuses_to_fork'] or 'allowed'}"
    if child.get("device") == "cpu":
        return undecided(f"torch sees no card in the child; {said}")
    lacks = told["lacks"] or "nothing"
    holds = told["refuses_to_fork"] is None and told["lacks"] is None and child.get("sum") == 8.0
    return decided(holds, f"{said}; lacks {lacks}; child: {child.get('error') or child['device']}")


def child_reads_nvml(evidence: Evidence) -> Decision:
    """Each counter a value or its reason; those that every data centre's card has are there."""
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
    """While work is queued no moment is one of an idle card."""
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


def controls_hold(evidence: Evidence) -> Decision:
    """Every negative control of the card, broken and sound."""
    found = evidence.document("selftest")
    if "outcomes" not in found:
        raise NotSeenError("selftest: rehearsed only")
    failed = [
        f"{one['control']} ({one['instrument']}): {one['fault']}" for one in found["outcomes"] if one["held"] is False
    ]
    on_card = [one for one in found["outcomes"] if one["control"].startswith("CUDA") and one["held"] is not None]
    if not on_card:
        return undecided("no control of a card was run")
    said = f"{found['counts']['held']} held, {len(on_card)} of them a card's, {found['counts']['skipped']} skipped"
    return decided(not failed, said + (f"; failed: {'; '.join(failed)}" if failed else ""))


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
    for variant in ("lora-r16", "qlora-nf4-r16"):
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
    for variant in ("lora-r16", "qlora-nf4-r16"):
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
        return undecided("no trial came to its end")
    if bad or idle:
        return decided(False, "; ".join([*bad, *idle])[:600])
    names = sorted({one.name for one in records})
    if len(names) < 2:
        return undecided(f"only {', '.join(names)} came to its end")
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
        return undecided("no cold start came to its end")
    parts = ("cold_import_time_s", "cold_load_time_s", "cold_completion_time_s")
    holds = all(set(parts) <= set(one) and sum(one[part] for part in parts) <= one["cold_start_time_s"] for one in cold)
    mean = {name: sum(one.get(name, 0.0) for one in cold) / len(cold) for name in (*parts, "cold_start_time_s")}
    return decided(holds, "; ".join(f"{name} {value:.2f}" for name, value in mean.items()) + f" ({len(cold)} starts)")


def new_lengths_cost_nothing(evidence: Evidence) -> Decision:
    """A length that is new takes the host as long as one that it knows."""
    told = evidence.fact("lengths")
    said = "; ".join(
        f"{which}: {one['new_ms']:.2f} ms new, {one['again_ms']:.2f} ms again, {one['worst_ms']:.1f} at worst"
        for which, one in told.items()
        if isinstance(one, dict)
    )
    default = told["default"]
    return decided(default["new_ms"] - default["again_ms"] <= VISITED_TWICE_MS, said)


def all_settings_share_a_base(evidence: Evidence) -> Decision:
    """The sweep ran at shared-base, all its trials were ok, and its control is no difference."""
    run = evidence.run("sweep")
    records = list(run.records)
    turns = [one for one in records if one.interleaving == "shared-base"]
    bad = sorted({f"{one.trial} {one.status}" for one in records if not _ok(one)})
    if not [one for one in turns if one.status == "ok"]:
        return decided(False, "; ".join(bad)) if bad else undecided(f"no trial came to its end; {run.manifest.status}")
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


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="fork",
        says="a zygote has one thread and leaves the device alone, and its children use it",
        file="docs/method.md",
        quote="A zygote imports torch, transformers, peft and bitsandbytes once, with one thread, and then only forks.",
        judge=zygote_forks,
    ),
    Claim(
        name="counters",
        says="a counter that the card does not give is missing with its reason",
        file="docs/method.md",
        quote="A value that a card, a driver or a container does not give is missing with its reason, never zero.",
        judge=child_reads_nvml,
    ),
    Claim(
        name="events",
        says="a pair of device events times a step",
        file="docs/method.md",
        quote="A CUDA step is timed by a pair of device events.",
        judge=events_agree,
    ),
    Claim(
        name="wall",
        says="by the tests, events agree with the wall within 1 %",
        file="docs/method.md",
        quote="A CUDA step is timed by a pair of device events.",
        judge=by_tests(f"{METERS}::test_device_events_agree_with_the_wall"),
    ),
    Claim(
        name="hand-over",
        says="a hand-over between turns does not slow the next step down",
        file="harness/machine/watch.py",
        quote="a hand-over of a millisecond between turns of 50 ms or more",
        judge=hand_over_costs_nothing,
    ),
    Claim(
        name="energy",
        says="the energy counter agrees with integrated power within 5 %",
        file="docs/method.md",
        quote="no energy is given for less than 2 s, which allows for steps of 0.1 s and an error of 5 %",
        judge=by_tests(f"{METERS}::test_the_energy_counter_agrees_with_integrated_power"),
    ),
    Claim(
        name="energy period",
        says="the energy counter moves at least every 0.1 s",
        file="docs/method.md",
        quote="The energy counter moves in steps whose period is not documented",
        judge=counter_moves_often_enough,
    ),
    Claim(
        name="clocks",
        says="clocks of an idle card are told from those of a card at work",
        file="harness/machine/throttle.py",
        quote="Nothing runs: the clocks of such a moment say nothing of a step.",
        judge=idle_clocks_are_left_out,
    ),
    Claim(
        name="peaks of memory",
        says="the allocator's peaks are those of the phase, and NVML sees what the allocator takes",
        file="docs/method.md",
        quote="on CUDA the allocator's peaks",
        judge=by_tests(
            f"{METERS}::test_nvml_sees_what_the_allocator_takes",
            f"{METERS}::test_the_allocator_has_not_retried_where_memory_is_plenty",
            f"{METERS}::test_the_allocator_counts_what_it_could_not_have",
        ),
    ),
    Claim(
        name="account of memory",
        says="an account of memory explains a step's peak within 2 %",
        file="docs/method.md",
        quote="sets the measured peak against kinds that are each measured by themselves",
        judge=by_tests("tests/trial/profiling/test_account.py::test_a_step_on_a_gpu_is_explained_within_two_percent"),
    ),
    Claim(
        name="estimate",
        says="the estimated peak of a 7B model is within 10 % of the measured one",
        file="README.md",
        quote="Weights, constants of quantisation, optimizer state, activations and logits follow from the shape",
        judge=estimate_is_near,
    ),
    Claim(
        name="mask",
        says="flash refuses an explicit mask on CUDA",
        file="docs/method.md",
        quote="On a CPU the flash kernel accepts a mask; on CUDA it refuses one",
        judge=flash_refuses_a_mask,
    ),
    Claim(
        name="names",
        says="the kernels of the usual products, attentions and norms have rules",
        file="README.md",
        quote="kernel names and what they mean, with the evidence for each",
        judge=names_are_known,
    ),
    Claim(
        name="attention",
        says="each backend of attention is told from the others, live and in a recording",
        file="README.md",
        quote="which attention operator ran",
        judge=by_tests(f"{KERNELS}::test_a_forced_backend_is_told_in_both_directions"),
    ),
    Claim(
        name="4 bits",
        says="unpacking and packed products of 4-bit weights are told by their kernels",
        file="README.md",
        quote="whether every targeted layer is stored in 4 bits",
        judge=by_tests(
            f"{KERNELS}::test_training_shapes_unpack_the_base",
            f"{KERNELS}::test_double_quantisation_unpacks_its_scales",
            f"{KERNELS}::test_one_token_is_multiplied_packed",
        ),
    ),
    Claim(
        name="paged state",
        says="only tensors in managed memory count as paged, and some are",
        file="docs/method.md",
        quote="Only tensors in managed memory count.",
        judge=by_tests(f"{KERNELS}::test_the_paged_share_is_what_the_driver_says"),
    ),
    Claim(
        name="TF32",
        says="TF32 is told by the kernels that ran",
        file="kernels_check/judges/execution.py",
        quote="kernels where CUDA ran, else what the flag allows",
        judge=by_tests(f"{KERNELS}::test_tf32_is_told_by_flag_by_number_and_by_kernel"),
    ),
    Claim(
        name="fused optimizer",
        says="fused and foreach optimizers are told by their kernels",
        file="docs/method.md",
        quote="every parameter that had a gradient was written by one of torch's fused kernels",
        judge=by_tests(f"{KERNELS}::test_the_optimizers_implementation_is_told"),
    ),
    Claim(
        name="sabotage",
        says="every known sabotage is caught on the card, every untouched twin passes",
        file="README.md",
        quote="every known sabotage is caught, every untouched twin passes",
        judge=controls_hold,
    ),
    Claim(
        name="after the check",
        says="a step after the check is as fast as before it",
        file="docs/method.md",
        quote="on a GPU CUPTI can go on slowing down launches",
        judge=by_tests("tests/run/executors/test_gpu.py::test_a_step_is_as_fast_after_the_check_as_before"),
    ),
    Claim(
        name="stated peaks",
        says="products and copies reach a fair share of the vendor's figures and never more",
        file="harness/models/costs/peaks.py",
        quote="A peak is dense",
        judge=by_tests(
            "tests/trial/profiling/test_peak.py::test_products_on_a_known_gpu",
            "tests/trial/profiling/test_peak.py::test_copies_on_a_known_gpu",
        ),
    ),
    Claim(
        name="MFU",
        says="no step uses more than the stated peak",
        file="docs/own-script.md",
        quote="where the shape of the model is known and its device has a stated peak",
        judge=nobody_beats_the_peak,
    ),
    *(
        Claim(
            name=f"phases, {title}",
            says=f"phases between events explain a step of Llama-2-7B in {title} within 2 %",
            file="docs/method.md",
            quote="Where its interval reaches over 2 % of the step the report says that it cannot tell",
            judge=step_is_explained(variant),
        )
        for title, variant in (("bf16", "lora-r16"), ("NF4", "qlora-nf4-r16"))
    ),
    Claim(
        name="kernels of a step",
        says="what a profile of a 7B step records is kernels, and at most 1 % of their time has no name",
        file="docs/method.md",
        quote="On a GPU what it records is kernels",
        judge=kernels_are_told,
    ),
    Claim(
        name="the study",
        says="Llama-2-7B in bf16 and in NF4: every trial is ok and every required path active",
        file="README.md",
        quote="checks that the attention kernel and the 4-bit path it claims were really running",
        judge=study_is_valid,
    ),
    Claim(
        name="A/A",
        says="an A/B of the same code with itself sees no difference",
        file="README.md",
        quote="A control that differs from itself makes the run invalid",
        judge=same_is_same,
    ),
    Claim(
        name="levels",
        says="a control that takes turns in lockstep is known better than one by whole replicates",
        file="README.md",
        quote="Turns, as fine as the variants allow.",
        judge=lockstep_is_finer,
    ),
    Claim(
        name="shared base",
        says="all settings of a sweep at 7B take turns on one base",
        file="README.md",
        quote="Variants that differ in their adapters share one base model in one process",
        judge=all_settings_share_a_base,
    ),
    Claim(
        name="cold start",
        says="a cold start on a card has its parts, each a number",
        file="docs/method.md",
        quote="a new interpreter: imports, load and quantise, adapter, first completion; each part apart",
        judge=cold_has_its_parts,
    ),
    Claim(
        name="new lengths",
        says="by torch's own choice of attention, a length of keys that is new costs the host what a known one costs",
        file="docs/method.md",
        quote="one greedy `generate` of a fixed number of new tokens",
        judge=new_lengths_cost_nothing,
    ),
)
