"""Describes what is known before a measurement: estimates of a plan, and what the machine can run and measure.

Estimates are the time of a plan, memory by kind, whether it fits, and counted sizes. The machine is described by the
doctor's checks and the rates of a calibration.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, get_args

from lorameter.machine.doctor import About, DoctorCheck, Grade
from lorameter.machine.provenance import Machine
from lorameter.measurements.metrics import MEASUREMENTS
from lorameter.models.costs.memory import (
    MEASURED_ERRORS,
    MEASURED_ON,
    PEAK_RANGES,
    PUBLISHED_PEAKS,
    PUBLISHED_WITHIN,
    MemoryEstimate,
)
from lorameter.records.record import Notice, memory_kind_title, order_memory_kinds
from lorameter.records.units import format_bytes, format_count, format_duration, format_percent
from lorameter.report.blocks import (
    Cell,
    Document,
    Line,
    Row,
    Section,
    Span,
    Table,
    Tone,
    list_sections,
    name_columns,
    to_line,
    to_lines,
    value_cell,
    write_number,
    write_ratio,
    write_row,
    write_value,
)
from lorameter.report.phrases import describe_request, warn_before_run
from lorameter.run.budget import DROPPABLE
from lorameter.run.forecast import Forecast
from lorameter.run.plan import Plan
from lorameter.studies.protocol import Protocol
from lorameter.verdicts.calibrate import DRAWS, Calibration, Rates, planned_effects

if TYPE_CHECKING:
    from lorameter.run.memory_fit import Advice, FitStatus, Largest, Needs
    from lorameter.studies.variant import Variant
    from lorameter.studies.workload import Workload
    from lorameter.trial.building.build import Sizes


MIB = 2**20
_OUTSIDE = {"context": "outside: CUDA's context", "paged_optimizer_state": "outside: paged optimizer state"}
_STATUSES: Mapping[FitStatus, tuple[str, Tone]] = {
    "fits": ("fits", "good"),
    "may-not-fit": ("may not fit", "warning"),
    "does-not-fit": ("does not fit", "bad"),
}
_BOUNDS = {"memory": "", "context": ", which is the model's context", "study": ", the maximum of a study"}


def describe_estimate(
    variant: Variant,
    workload: Workload,
    machine: Machine,
    estimates: Sequence[MemoryEstimate],
    measured: Mapping[str, int],
    *,
    elsewhere: bool = False,
) -> Document:
    """A row for each kind, a column for each phase; `measured` contains peaks in bytes by phase, if a run has them.

    Without estimates (the model's layers are unknown), only the measured peaks are shown. With `elsewhere`, the device
    is not on this machine, and `describe_fit` reports whether the workload fits there.
    """
    where = "device memory" if machine.device == "cuda" else "host memory"
    title = (
        f"{variant.name} on {workload.model}, {workload.batch_size} × {workload.sequence_length} tokens a batch, "
        f"{describe_request(workload)} a request; nothing was loaded"
    )
    if not estimates:
        peaks = (f"measured peak, {phase}: {_mib(peak).text} MiB of {where}" for phase, peak in measured.items())
        return tuple(to_line(text, indented=False) for text in (title, "estimated peak: unknown", *peaks))
    heads = name_columns(f"{where}, MiB", *(estimate.phase for estimate in estimates))
    table = Table(heads=heads, rows=tuple(_memory_rows(estimates, measured)))
    has = machine.device_memory_bytes if machine.device == "cuda" else machine.memory_bytes
    below = [] if measured else ["No earlier run of this variant and workload on this machine has measured it."]
    if has is not None:
        below.append(
            f"{format_bytes(max(estimate.needed_bytes for estimate in estimates))} of {format_bytes(has)} here"
        )
    first, *others = (to_line(text, indented=False) for text in (title, *below))
    return (first, table) if elsewhere else (first, table, *others)


def _memory_rows(estimates: Sequence[MemoryEstimate], measured: Mapping[str, int]) -> Iterator[Row]:
    kinds = list(order_memory_kinds({kind: 1 for estimate in estimates for kind in estimate.kinds}))
    for kind in kinds:
        sizes = (_mib(estimate.kinds.get(kind, 0)) for estimate in estimates)
        yield write_row(memory_kind_title(kind), *sizes, ends_group=kind == kinds[-1])
    yield write_row("estimated peak", *(_mib(estimate.total_bytes) for estimate in estimates), strong=True)
    if measured:
        peaks = [measured.get(estimate.phase, 0) for estimate in estimates]
        pairs = zip(estimates, peaks, strict=True)
        errors = [estimate.total_bytes / peak - 1 if peak else None for estimate, peak in pairs]
        yield write_row("measured peak", *map(_mib, peaks))
        written = (Cell() if error is None else write_number(error, "+.1%") for error in errors)
        yield write_row("error of the estimate", *written)
    for kind, title in _OUTSIDE.items():
        if any(estimate.outside_allocator.get(kind) for estimate in estimates):
            yield write_row(title, *(_mib(estimate.outside_allocator.get(kind, 0)) for estimate in estimates))


def _mib(size: int) -> Cell:
    return Cell(text=f"{size / MIB:,.1f}", value=size) if size else Cell()


def describe_fit(advice: Advice, workload: Workload, profile: str | None) -> Document:
    """The finding with its range, its assumptions, the largest batch that fits (with --max-batch), and the options.

    `profile` is the study's profile for the device, as in a run there.
    """
    device = advice.device
    low, high = PEAK_RANGES[device.machine.device]
    assumed = [f"Assumed, not measured on a GPU: {'; '.join(device.assumed)}."] if device.assumed else []
    basis = f"Range: {_format_errors((low - 1, high - 1))} of the estimate. {describe_basis(device.machine.device)}"
    study_profile = f"The study's profile {profile!r} is taken, as a run there would; --profile takes another."
    lines = [f"It has {format_bytes(device.total_bytes)}: {device.source}.", *assumed, basis]
    lines += [] if profile is None else [study_profile]
    options = Table(
        title="Possible changes, those that free most first",
        heads=(*name_columns("in the study", "frees", "needs then"), *name_columns("there")),
        rows=tuple(
            write_row(
                one.writes, write_value(one.freed_bytes, "byte"), _write_range(one.needs), _STATUSES[one.status][0]
            )
            for one in advice.options
        ),
        notes=to_lines(["batch_size is written in [workload], the others in [[variant]]"]),
    )
    return (
        Section(title=f"On {device.name}", lines=(_describe_status(advice), *to_lines(lines))),
        *list_sections({"The most that fits": [_describe_largest(one, workload) for one in advice.largest]}),
        *([options] if advice.options else []),
        _describe_first_change(advice),
        *to_lines(f"left out, {skipped.writes}: {skipped.why}." for skipped in advice.skipped),
    )


def _describe_status(advice: Advice) -> Line:
    usable, needs = advice.device.usable_bytes, advice.needs
    text, tone = _STATUSES[advice.status]
    left, lacking = usable - needs.high_bytes, needs.low_bytes - usable
    rest = {
        "fits": f"{format_bytes(left)} or more are left",
        "may-not-fit": f"from {format_bytes(-lacking)} left to {format_bytes(-left)} too little",
        "does-not-fit": f"{format_bytes(lacking)} or more are missing",
    }[advice.status]
    what = "free now" if advice.device.is_here else "usable"
    return to_line(
        Span(text=text, tone=tone), f": needs {_write_range(needs).line} of {format_bytes(usable)} {what}; {rest}."
    )


def _write_range(needs: Needs) -> Cell:
    return value_cell(needs.expected_bytes, needs.low_bytes, needs.high_bytes, "byte")


def describe_basis(device: str) -> str:
    """The comparison of peaks and estimates that supports the range, for "cpu" or "cuda"."""
    if device == "cuda":
        return (
            f"{PUBLISHED_WITHIN} of {PUBLISHED_PEAKS} published peaks of GPUs lie within it; all are of batches of one "
            "length. None was measured by this project."
        )
    return f"The estimate missed {MEASURED_ON} by {_format_errors(MEASURED_ERRORS)}."


def _format_errors(errors: tuple[float, float]) -> str:
    return " to ".join(f"{100 * error:+.1f} %".replace("-", "−") for error in errors)


def _describe_largest(largest: Largest, workload: Workload) -> str:
    sizes = {"batch_size": workload.batch_size, "sequence_length": workload.sequence_length}
    sizes[largest.key] = largest.value or largest.least
    text = f"{format_count(sizes['batch_size'], 'sequence')} of {sizes['sequence_length']} tokens"
    if largest.value is None:
        return f"{largest.key}: none, because not even {text} would fit."
    return f"{largest.key} = {largest.value}: {text}{_BOUNDS[largest.bound]}."


def _describe_first_change(advice: Advice) -> Line:
    if advice.turn is None:
        return to_line("All of them together are not enough: take a smaller model, or a GPU with more memory.")
    if not advice.turn:
        return to_line("Nothing has to be changed.")
    lines = Span(text=", ".join(advice.turn), tone="strong")
    if len(advice.turn) == 1:
        return to_line("Change first: ", lines, ". It fits with that alone.")
    return to_line("No single change is enough. The smallest set that is: ", lines, ".")


def describe_sizes(model: str, sizes: Sequence[Sizes], *, unknown: str | None = None) -> Document:
    """One row for each variant; counts are exact and have no intervals. `unknown`: why no formula checks them."""
    rows = (
        write_row(
            one.variant,
            write_number(one.trainable_parameters, ","),
            Cell(text=f"{100 * one.share:.3f} %", value=one.share),
            *(
                Cell(text=f"{size / MIB:.2f}", value=size)
                for size in (one.adapter_bytes, one.optimizer_state_bytes, one.gradient_bytes)
            ),
        )
        for one in sizes
    )
    heads = name_columns(
        "setting", "trainable parameters", "of the base", "adapter, MiB", "optimizer, MiB", "gradients, MiB"
    )
    return (
        to_line(
            f"{model}: {sizes[0].base_parameters:,} parameters in the base; counted, nothing was loaded", indented=False
        ),
        Table(heads=heads, rows=tuple(rows)),
        *(
            [to_line(f"counted by PEFT alone; other memory of the training is unknown: {unknown}", indented=False)]
            if unknown
            else []
        ),
    )


def describe_plan(
    plan: Plan, expected: Forecast, machine: Machine, notices: Sequence[Notice], data: str | None = None
) -> Document:
    """The first replicate's order, the interleaving and its reason, estimates of time, interval width, memory and disk,
    and the data."""
    size = f": {format_count(len(plan.slots), 'trial')} on {machine.device_name}"
    return (
        to_line(Span(text=plan.study.headline, tone="strong"), size, indented=False),
        *to_lines(_plan_lines(plan, expected)),
        *to_lines([f"data    {data}"] if data else []),
        *warn_before_run(notices),
    )


def _plan_lines(plan: Plan, expected: Forecast) -> Iterator[str]:
    names = [[slot.trial.partition("-")[2] for slot in group.slots] for group in plan.groups if group.replicate == 0]
    trials = sum(map(len, names))
    first = (
        "; ".join(map(", ".join, names))
        if trials <= 20  # more names would fill more than a few lines
        else f"{trials} trials in each replicate, shuffled by the study's seed"
    )
    replicates = plan.study.protocol.replicates
    yield f"order   {first}" + (f"; another in each of {replicates} replicates" if replicates > 1 else "")
    yield f"level   {plan.interleaving}: {plan.why}"
    measured = {measure for slot in plan.slots for measure in slot.measures}
    yield f"takes   {', '.join(one.title for one in MEASUREMENTS.values() if one.name in measured)}"
    yield from [f"dtype   {plan.study.dtype}"] if plan.study.dtype else []
    yield from _time_lines(expected, plan.study.protocol)
    live = " for everything that is in memory at the same time, including processes"
    for what, size, words in (("memory", expected.memory_bytes, live), ("disk  ", expected.disk_bytes, "")):
        forecast = f"unknown ({expected.unknown})" if size is None else f"estimate: {format_bytes(size)}{words}"
        yield f"{what}  {forecast}"


def _time_lines(time: Forecast, protocol: Protocol) -> Iterator[str]:
    """Time, replicates, and interval width."""
    took = "unknown" if time.time_s is None else f"estimate: {format_duration(time.time_s)}"
    yield f"time    {took} ({time.basis})"
    replicates = format_count(protocol.replicates, "replicate")
    if protocol.looks:
        after = "" if time.decided is None else f": after about {time.decided} if nothing differs, as in the time above"
        yield f"ends    when every comparison is decided{after}; at most {replicates}"
    if protocol.max_minutes is None:
        yield from () if protocol.looks else (f"fits    {replicates}, as planned: no time limit",)
    elif time.replicates is not None:
        skipped = f", without {', '.join(DROPPABLE[part] for part in DROPPABLE if part in time.skipped)}"
        fitting = f"estimate: {time.replicates} of {replicates} in {protocol.max_minutes:g} min"
        yield f"fits    {fitting}{skipped if time.skipped else ''}"
    if time.detectable is not None:
        slower = f"a step slower by {format_percent(time.detectable)}"
        yield f"finds   {slower}, with {time.replicates} replicates, in 80 % of such runs"
    if time.half_width is not None or time.sought_width_s is not None:
        half, sought_s = time.half_width, time.sought_width_s
        interval = f"estimate: intervals of training ratios of ± {format_percent(half or 0)} ({time.noise})"
        width = "no interval from one replicate" if half is None else interval
        takes = f"± 3 % takes about {format_duration(sought_s or 0)}"
        yield f"width   {width}; {'the time for ± 3 % is unknown' if sought_s is None else takes}"


TITLES: dict[About, str] = {
    "runs": "What this machine can run",
    "measures": "What it can measure",
    "spoils": "What would disturb a measurement here",
}


def describe_checks(checks: Sequence[DoctorCheck], *, fit: bool) -> Document:
    """A table for each of the three questions, and the answer in one line."""
    tables = (
        Table(
            title=title,
            heads=name_columns("", "", "found", "remedy", left=4),
            rows=tuple(
                write_row(check.name, Cell(verdict=check.grade), check.found, Cell(detail=check.remedy))
                for check in checks
                if check.about == about
            ),
        )
        for about, title in TITLES.items()
    )
    counts = Counter(check.grade for check in checks)
    grades = ", ".join(f"{counts[grade]} {grade}" for grade in get_args(Grade) if counts[grade])
    if not fit:
        answer, rest = Span(text="unfit", tone="alarm"), ": its measurements would not be valid"
    elif counts["bad"]:
        answer, rest = Span(text="fit to measure, with less precision", tone="warning"), ": fix the bad settings first"
    else:
        answer, rest = Span(text="fit to measure", tone="good"), ""
    return (*tables, to_line("This machine is ", answer, f"{rest}. Checks: {grades}.", indented=False))


def _gate_size(rate: Rates) -> str:
    ends_early = rate.used < rate.replicates
    return f"{rate.used:.1f} of {rate.replicates}, until decided" if ends_early else str(rate.replicates)


def describe_calibration(result: Calibration, rows: int) -> Document:
    """The scatter, both comparisons, the rates of resampled gates, and the replicates needed for smaller effects."""
    identical, injected = (
        write_ratio(found, verdict=found.verdict).line for found in (result.identical, result.injected)
    )
    replicates = f"{result.replicates} replicates of"
    rates = Table(
        title=f"Gates drawn from these replicates, {DRAWS} a row, default limits",
        heads=name_columns(
            "replicates", "identical: regressed", "identical: equivalent", "slow-down: regressed", left=0
        ),
        rows=tuple(
            write_row(_gate_size(rate), *map(_share, (rate.false_alarms, rate.equivalent, rate.found)))
            for rate in result.rates
        ),
        notes=to_lines([f"All draws are from {replicates} one run: they do not describe other times."]),
    )
    return (
        to_line(
            Span(text="What this machine can detect", tone="strong"),
            f": {result.device}, {result.interleaving}",
            indented=False,
        ),
        to_line(
            f"{replicates} {result.seconds_per_replicate:.1f} s; standard deviation of one replicate's log ratio on "
            f"identical code {100 * result.sd:.2f} % [{100 * result.sd_low:.2f}, {100 * result.sd_high:.2f}]"
        ),
        to_line(f"identical code   {identical}"),
        to_line(f"injected slow-down {injected} ({rows} rows in each adapted layer)"),
        rates,
        Section(
            title="To detect a slow-down in 80 % of the runs",
            lines=to_lines(planned_effects(result)),
        ),
    )


def _share(share: float) -> Cell:
    return Cell(text=f"{100 * share:.1f} %", value=share)
