"""Notices: facts that a reader of a run needs in addition to its numbers, each with a remedy.

A notice never changes a number. Notices that cast doubt on a number (contention, a failed control) quantify the doubt.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from lorameter.measurements.metrics import PHASE_TITLES, PRIMARY, Phase, get_samples
from lorameter.measurements.steps import losses_of_steps
from lorameter.records.record import Notice, TrialRecord
from lorameter.records.store import Run
from lorameter.records.units import format_count, format_duration, format_ratio
from lorameter.stats import MAX_ADVISED, Comparison, VerdictRule, count_outliers, drifting
from lorameter.stats.intervals import quantile
from lorameter.studies.study import Study
from lorameter.verdicts.same_training import sameness_notices
from lorameter.verdicts.series import OCCUPANCY_FLOOR, describe_machines, is_difference, occupancies
from lorameter.verdicts.validity import disturbance_notices

DRIFT = 0.05
"""Smallest level change that is reported, a fraction."""
MIN_STEPS_FOR_DRIFT = 12
"""With fewer steps, no level change is detectable above the noise."""


def collect_notices(run: Run, study: Study, controls: Mapping[Phase, Comparison | None]) -> tuple[Notice, ...]:
    """All notices of a run without repetition: those of its plan, of its trials, and those derived from its records;
    `controls` are the A/A comparisons."""
    ok = [record for record in run.records if record.status == "ok"]
    counted = [record for record in run.records if record.status == "ok" or record.disturbed]
    on_cpu = run.manifest.provenance.get("device") == "cpu"
    found = (
        *run.manifest.notices,
        *(notice for record in run.records for notice in record.notices),
        *_data(run, study),
        *sameness_notices(run, study),
        *(_cpu(ok) if on_cpu else ()),
        *disturbance_notices(counted, on_cpu=on_cpu),
        *site_notices(run.records),
        *_steps(ok),
        *_constant_loss(ok),
        *_cold_starts(ok),
        *_disturbed(run),
        *(notice for phase, control in controls.items() for notice in _control(PHASE_TITLES[phase], control)),
        *_damaged(run),
    )
    return tuple(dict.fromkeys(found))


def _data(run: Run, study: Study) -> Iterator[Notice]:
    if run.manifest.tokens.get("synthetic"):
        yield Notice(
            code="synthetic-data",
            message="the records are synthetic: losses compare variants, and say nothing of real text.",
            remedy="Give real records: --lorameter-data=FILE (pytest) or --data FILE.",
        )
    if run.manifest.tokens.get("tokenizer_substituted"):
        yield Notice(
            code="byte-tokenizer",
            message=f"the tokenizer of {study.workload.model} is not available; its tokens are bytes.",
            remedy="Give a local directory that holds the tokenizer files.",
        )


def _cpu(ok: list[TrialRecord]) -> Iterator[Notice]:
    """Notices about CPU runs: single-threaded trials that lost CPU time (multi-threaded trials are judged by CPU
    pressure; on a GPU the host may wait), and variants that share a heap (on a GPU, torch's allocator keeps its blocks
    for any variant)."""
    shares, disturbed = occupancies(ok)
    if disturbed:
        yield Notice(
            code="cpu-contention",
            message=f"{len(disturbed)} of {len(shares)} trials of one thread had less than {OCCUPANCY_FLOOR:.0%} of a "
            f"CPU while they were timed (lowest {min(disturbed):.0%}): other work ran on this machine.",
            remedy="Stop it, or measure more replicates. The intervals carry the noise. The CPU time of a step is "
            "shown next to its wall time: it depends less on other work. Verdicts rest on wall time, as CPU time is "
            "biased.",
        )
    if len({record.variant for record in ok if record.interleaving == "shared-base"}) > 1:
        yield Notice(
            code="shared-process",
            message="variants took turns in one process, which on a CPU has one heap for all of them: one that needs "
            "less memory is served from what another has given back, and can be some per cent faster than by itself.",
            remedy="Measure with --interleave lockstep, or --lorameter-interleave=lockstep (pytest), with so many "
            "variants as fit into memory together.",
        )


def _steps(ok: list[TrialRecord]) -> Iterator[Notice]:
    """Notices about timed steps: outliers, too short warm-ups, and level changes (a throttled clock, a memory leak,
    other work that started or ended)."""
    steps = [record.samples["step_time_s"] for record in ok if record.samples.get("step_time_s")]
    if count := count_outliers(steps):
        yield Notice(
            code="outliers",
            message=f"{count} of {sum(map(len, steps))} timed steps are outliers by Tukey's fences; all are kept, and "
            "each trial counts by its median.",
            remedy="If they cluster in one variant, look at its step_time_s in trials.jsonl.",
        )
    warmed = [record for record in ok if "warmup_steady" in record.values]  # isolated trials time no steps
    if unsteady := [record.trial for record in warmed if record.values["warmup_steady"] == 0.0]:
        yield Notice(
            code="warmup-incomplete",
            message=f"{len(unsteady)} of {len(warmed)} trials were still getting faster when their warm-up ended, "
            f"{unsteady[0]} among them.",
            remedy="Raise warmup_steps_max in the study's [protocol].",
        )
    timed = [record for record in ok if len(record.samples.get("step_time_s", ())) >= MIN_STEPS_FOR_DRIFT]
    found = drifting([record.samples["step_time_s"] for record in timed], tolerance=DRIFT)
    if changing := [record.trial for record, drifted in zip(timed, found, strict=True) if drifted]:
        yield Notice(
            code="drift",
            message=f"{len(changing)} of {len(timed)} trials got slower or found no steady level while they were "
            f"timed, {changing[0]} among them.",
            remedy="Trials that took turns drifted together and are compared turn by turn; look at clocks and heat if "
            "it is one variant only.",
        )


MIN_STEPS_FOR_A_CONSTANT = 3
"""Minimum number of equal losses: fewer can be equal by chance if there are few distinct values, as in 16 bits."""


def _constant_loss(ok: list[TrialRecord]) -> Iterator[Notice]:
    """Trials whose loss is bit-equal in every step after the first, although the batches differ.

    This happens if a very high learning rate saturates the layers in the first step at a finite loss; such a run has
    diverged as much as one with a NaN loss.
    """
    flat: list[TrialRecord] = []
    for record in ok:
        losses = losses_of_steps(record)[1:]
        if len(losses) >= MIN_STEPS_FOR_A_CONSTANT and len(set(losses)) == 1:
            flat.append(record)
    if flat:
        names = ", ".join(dict.fromkeys(record.name for record in flat))
        yield Notice(
            code="loss-constant",
            message=f"the loss of {len(flat)} of {len(ok)} trials ({names}) is the same to the last bit in every step "
            "after the first, on batches that differ: they learned nothing.",
            remedy="Lower learning_rate or lora_alpha, or set max_grad_norm; only their times are valid.",
        )


def _cold_starts(ok: list[TrialRecord]) -> Iterator[Notice]:
    """Variants whose whole cold start is not in the range predicted from the sums of its parts."""
    margin, tail = VerdictRule().margin_limit, 0.005
    sums: dict[tuple[str, str], list[float]] = {}
    whole_times: dict[tuple[str, str], float] = {}
    for record in ok:
        if "cold_start_time_s" in record.samples and record.role == "variant":
            sums.setdefault((record.side, record.name), []).append(math.log(record.samples["cold_start_time_s"][0]))
        if "cold_whole_time_s" in record.values:
            whole_times[record.side, record.name] = record.values["cold_whole_time_s"]
    for (side, name), whole_s in whole_times.items():
        logs = sums.get((side, name), [])
        if len(logs) < 2:
            continue
        half = quantile(len(logs) - 1, tail) * statistics.stdev(logs) * math.sqrt(1 + 1 / len(logs))
        if abs(math.log(whole_s) - statistics.fmean(logs)) > half + margin:
            where = f"{name} of the {side}" if side else name
            yield Notice(
                code="cold-start-sum",
                message=f"{where}: a whole cold start took {format_duration(whole_s)}, and the sum of its parts is "
                f"{format_duration(math.exp(statistics.fmean(logs)))}.",
                remedy="Measure more replicates on a quiet machine; if it remains, trust the whole and report it.",
            )


def _damaged(run: Run) -> Iterator[Notice]:
    if run.damaged_lines:
        yield Notice(
            code="damaged-lines",
            message=f"{format_count(run.damaged_lines, 'line')} of trials.jsonl truncated, or with checks that are "
            "missing from checks.jsonl: those measurements count as not run.",
            remedy=f"Restore the files, or measure them again: lorameter run --resume {run.manifest.run}",
        )


def _disturbed(run: Run) -> Iterator[Notice]:
    """Trials that were measured again after an interruption or a disturbance, and trials that still exceeded a limit in
    the end."""
    if run.measured_again:
        yield Notice(
            code="measured-again",
            message=f"{format_count(run.measured_again, 'trial')} measured again after an interruption; only the last "
            "measurement of each counts.",
            remedy="Nothing to do; the earlier records are in trials.jsonl.",
        )
    again = list(dict.fromkeys(record.trial for record in run.disturbed))
    excluded = [record.trial for record in run.records if record.disturbed]
    counting = sum(record.status == "ok" for record in run.records if record.trial in again)
    if again:
        first = run.disturbed[0]
        why = first.failure.message if first.failure else ""
        yield Notice(
            code="disturbed",
            message=f"{format_count(len(again), 'trial')} measured again because of disturbances, {first.trial} "
            f"among them: {why}; {counting} of them count now.",
            remedy="Nothing to do for these; the earlier records are in trials.jsonl.",
        )
    if excluded:
        yield Notice(
            code="still-disturbed",
            message=f"{format_count(len(excluded), 'trial')} left out because of disturbances above a limit, "
            f"{excluded[0]} among them.",
            remedy="Stop other work on this machine and measure again. On a shared machine, let such trials "
            "count: --allow-disturbed, --lorameter-allow-disturbed (pytest), or allow_disturbed in [protocol].",
        )


def _control(title: str, control: Comparison | None) -> Iterator[Notice]:
    if control is None:
        return
    ratio = control.reason if control.ratio is None else format_ratio(control.ratio, control.low, control.high)
    if is_difference(control):
        yield Notice(
            code="control-failed",
            message=f"{title}: the reference differs from itself, {ratio}, so this run is invalid.",
            remedy="Stop other work on this machine and measure again; ignore the differences in this run.",
        )
    elif control.verdict == "inconclusive":
        count = control.replicates_needed or 5
        unseen = f"; a slow-down of less than {control.mde80:.0%} would go unseen" if control.mde80 else ""
        more = f"Measure more: --replicates {count}, --lorameter-replicates={count} (pytest)."
        yield Notice(
            code="control-inconclusive",
            message=f"{title}: the control is inconclusive, {ratio}, so no two variants can be called equivalent"
            f"{unseen}.",
            remedy=more if count <= MAX_ADVISED else "Stop other work on this machine, and measure again.",
        )


def join_notices(run: Run, by_site: Mapping[str, Sequence[Notice]]) -> tuple[Notice, ...]:
    """The notices of a run whose sites are different machines: those common to all sites, and the others with their
    site."""
    first = next(iter(by_site.values()), ())
    common = [notice for notice in first if all(notice in notices for notices in by_site.values())]
    own = [
        msgspec.structs.replace(notice, message=f"{site}: {notice.message}")
        for site, notices in by_site.items()
        for notice in notices
        if notice not in common
    ]
    mixed = Notice(
        code="sites-mixed",
        message=f"the sites are different machines ({describe_machines(run.records)}): each is judged by itself, with "
        "its part of the replicates, and no number is taken over all of them.",
        remedy="Read each site; for one number measure on machines of one kind.",
    )
    return (mixed, *common, *own)


def site_notices(records: Sequence[TrialRecord]) -> Iterator[Notice]:
    """A notice about a run on several sites: how much they differ.

    On sites of one kind a replicate is measured on one site, so a ratio is within a site, and a slow site slows both
    sides of the ratio. Absolute values do differ: in a survey of clusters, GPUs of one model differed by 8 % on
    average, and outliers by half (Sinha et al., "Not All GPUs Are Created Equal", 2022, arXiv 2208.11035).
    """
    sites = {record.site for record in records if record.site}
    if len(sites) < 2:
        return
    logs = _mean_logs(records)
    differences = [f"{site} {math.expm1(log - statistics.fmean(logs.values())):+.1%}" for site, log in logs.items()]
    listed = ", ".join(differences) or "not known"
    yield Notice(
        code="sites",
        message=f"replicates were spread over {len(sites)} sites (step times, from their mean: {listed}). "
        "Ratios are within a site; an absolute value is the mean of these sites', and its interval is over them, not "
        "over replicates.",
        remedy="Where absolute values matter, measure on one site, and leave out a site that is far from the others "
        "(`lorameter doctor` on it shows its clocks, its temperature and other processes).",
    )


def _mean_logs(records: Sequence[TrialRecord]) -> dict[str, float]:
    """The mean log of the median step times on each site, over the variants that every site has; {} without any."""
    times: dict[str, dict[str, list[float]]] = {}
    for record in records:
        samples = get_samples(record, PRIMARY["train"])
        if record.status == "ok" and record.site and samples:
            variants = times.setdefault(record.site, {})
            logs = variants.setdefault(f"{record.name} {record.role} {record.side}", [])
            logs.append(math.log(statistics.median(samples)))
    shared = set.intersection(*map(set, times.values())) if times else set()
    return {
        site: statistics.fmean(statistics.fmean(own[name]) for name in shared) for site, own in times.items() if shared
    }
