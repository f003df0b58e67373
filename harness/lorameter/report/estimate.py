"""What is known before anything is measured: a plan with its time, memory by kind, whether it fits, counted sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lorameter.machine.provenance import Machine
from lorameter.models.costs.memory import (
    MEASURED_ERRORS,
    MEASURED_ON,
    PEAK_RANGES,
    PUBLISHED_PEAKS,
    PUBLISHED_WITHIN,
)
from lorameter.records.memory_account import in_order, title_of
from lorameter.records.record import Notice
from lorameter.records.units import format_bytes, format_count, format_duration, format_percent, split_interval
from lorameter.report.blocks import (
    Block,
    Cell,
    ColumnHeader,
    Document,
    Line,
    Row,
    Section,
    Span,
    Table,
    Tone,
    name_columns,
    say,
    say_each,
    write_bytes,
    write_row,
)
from lorameter.report.notices import warn_before_run
from lorameter.report.phrases import say_request
from lorameter.run.budget import DROPPABLE
from lorameter.run.forecast import Forecast
from lorameter.run.forecast_time import TimeForecast
from lorameter.run.plan import Plan
from lorameter.studies.protocol import Protocol

if TYPE_CHECKING:
    from lorameter.machine.provenance import Machine
    from lorameter.models.costs.memory import MemoryEstimate
    from lorameter.run.memory_fit import Advice, FitStatus, Largest, MemoryDevice, MemoryOption, Needs
    from lorameter.studies.variant import Variant
    from lorameter.studies.workload import Workload
    from lorameter.trial.building.sizes import Sizes

MIB = 2**20
_BESIDE = {"context": "outside: CUDA's context", "paged_optimizer_state": "outside: paged optimizer state"}


def describe_estimate(
    variant: Variant,
    workload: Workload,
    machine: Machine,
    estimates: Sequence[MemoryEstimate],
    measured: Mapping[str, int],
    *,
    elsewhere: bool = False,
) -> Document:
    """One row a kind, one column a phase; `measured` are peaks in bytes by phase, where a run has them.

    Without estimates, as of a model whose layers are not known, there are the measured peaks alone. `elsewhere` is said
    of another device: whether it fits on that is another document (`lorameter.report.estimate`).
    """
    return tuple(_blocks(variant, workload, machine, estimates, measured, elsewhere))


def _blocks(
    variant: Variant,
    workload: Workload,
    machine: Machine,
    estimates: Sequence[MemoryEstimate],
    measured: Mapping[str, int],
    elsewhere: bool,
) -> Iterator[Block]:
    where = "device memory" if machine.device == "cuda" else "host memory"
    yield say(
        f"{variant.name} on {workload.model}, {workload.batch_size} × {workload.sequence_length} "
        f"tokens a batch, {say_request(workload)} a request; nothing was loaded",
        indented=False,
    )
    if not estimates:
        yield say("estimated peak: unknown", indented=False)
        for phase, peak in measured.items():
            yield say(f"measured peak, {phase}: {_mib(peak).text} MiB of {where}", indented=False)
        return
    heads = name_columns(f"{where}, MiB", *(estimate.phase for estimate in estimates))
    yield Table(heads=heads, rows=(*_kinds(estimates), *_peaks(estimates, measured), *_beside(estimates)))
    if elsewhere:
        return
    if not measured:
        yield say("No earlier run of this variant and workload on this machine has measured it.", indented=False)
    has = machine.device_memory_bytes if machine.device == "cuda" else machine.memory_bytes
    if has is not None:
        needed = max(one.needed_bytes for one in estimates)
        yield say(f"{format_bytes(needed)} of {format_bytes(has)} here", indented=False)


def _kinds(estimates: Sequence[MemoryEstimate]) -> Iterator[Row]:
    kinds = in_order({kind: 1 for estimate in estimates for kind in estimate.kinds})
    for place, kind in enumerate(kinds, start=1):
        cells = (Cell(text=title_of(kind)), *(_mib(estimate.kinds.get(kind, 0)) for estimate in estimates))
        yield Row(cells=cells, ends_group=place == len(kinds))


def _peaks(estimates: Sequence[MemoryEstimate], measured: Mapping[str, int]) -> Iterator[Row]:
    yield write_row("estimated peak", *(_mib(estimate.total_bytes) for estimate in estimates), strong=True)
    if measured:
        yield write_row("measured peak", *(_mib(measured.get(estimate.phase, 0)) for estimate in estimates))
        yield write_row("error of the estimate", *(_error(estimate, measured) for estimate in estimates))


def _beside(estimates: Sequence[MemoryEstimate]) -> Iterator[Row]:
    for kind, title in _BESIDE.items():
        if any(estimate.beside.get(kind) for estimate in estimates):
            yield write_row(title, *(_mib(estimate.beside.get(kind, 0)) for estimate in estimates))


def _mib(size: int) -> Cell:
    return Cell(text=f"{size / MIB:,.1f}", value=size, unit="byte") if size else Cell()


def _error(estimate: MemoryEstimate, measured: Mapping[str, int]) -> Cell:
    peak = measured.get(estimate.phase)
    if not peak:
        return Cell()
    error = estimate.total_bytes / peak - 1
    return Cell(text=f"{error:+.1%}", value=error, unit="1")


_WORDS: Mapping[FitStatus, tuple[str, Tone]] = {
    "fits": ("fits", "good"),
    "may-not-fit": ("may not fit", "warning"),
    "does-not-fit": ("does not fit", "bad"),
}
_BOUNDS = {"memory": "", "context": ", which is the model's context", "study": ", the most that a study may ask for"}


def describe_fit(advice: Advice, workload: Workload, profile: str | None) -> Document:
    """The finding with its range, what it assumes, the most that fits where that was asked for, and the options.

    `profile` is that of the study which the device takes, as a run there would.
    """
    return tuple(_fit_blocks(advice, workload, profile))


def _fit_blocks(advice: Advice, workload: Workload, profile: str | None) -> Iterator[Block]:
    device = advice.device
    lines = [_finding(advice), *_assumed(device), *_describe_range(device)]
    if profile is not None:
        lines.append(say(f"The study's profile {profile!r} is taken, as a run there would; --profile takes another."))
    yield Section(title=f"On {device.name}", lines=tuple(lines))
    if advice.largest:
        yield Section(title="The most that fits", lines=tuple(_most(one, workload) for one in advice.largest))
    if advice.options:
        yield Table(
            title="What can be changed, what frees most first",
            heads=(
                ColumnHeader(text="in the study"), ColumnHeader(text="frees", right=True),
                ColumnHeader(text="needs then", right=True),
                ColumnHeader(text="there"),
            ),
            rows=tuple(map(_option, advice.options)),
            blank_line_before=True,
        )  # fmt: skip
    if any(option.table == "workload" for option in advice.options):
        yield say("batch_size is written in [workload], the others in [[variant]].")
    yield _first(advice)
    for one in advice.skipped:
        yield say(f"left out, {one.writes}: {one.why}.")


def _finding(advice: Advice) -> Line:
    usable, needs = advice.device.usable_bytes, advice.needs
    text, tone = _WORDS[advice.status]
    left, lacking = usable - needs.high_bytes, needs.low_bytes - usable
    rest = {
        "fits": f"{format_bytes(left)} or more are left",
        "may-not-fit": f"from {format_bytes(-lacking)} left to {format_bytes(-left)} too little",
        "does-not-fit": f"{format_bytes(lacking)} or more are lacking",
    }[advice.status]
    what = "free now" if advice.device.is_here else "usable"
    return say(Span(text=text, tone=tone), f": needs {_range(needs).line} of {format_bytes(usable)} {what}; {rest}.")


def _range(needs: Needs) -> Cell:
    value, low, high = needs.expected_bytes, needs.low_bytes, needs.high_bytes
    text, interval = split_interval(value, low, high, "byte")
    return Cell(text=text, interval=interval, value=value, low=low, high=high, unit="byte")


def _assumed(device: MemoryDevice) -> Iterator[Line]:
    yield say(f"It has {format_bytes(device.total_bytes)}: {device.source}.")
    if device.assumed:
        yield say(f"Assumed, and measured on no GPU: {'; '.join(device.assumed)}.")


def _describe_range(device: MemoryDevice) -> Iterator[Line]:
    """The range, and what supports it."""
    low, high = PEAK_RANGES[device.machine.device]
    yield say(f"Range: {_span((low - 1, high - 1))} of the estimate. {describe_basis(device.machine.device)}")


def describe_basis(device: str) -> str:
    """The comparison of peaks and estimates that supports the range for a "cpu" or for "cuda"."""
    if device == "cuda":
        return (
            f"{PUBLISHED_WITHIN} of {PUBLISHED_PEAKS} published peaks of GPUs lie within it; all are of batches of one "
            "length. None was measured by this project."
        )
    return f"The estimate missed {MEASURED_ON} by {_span(MEASURED_ERRORS)}."


def _span(errors: tuple[float, float]) -> str:
    return " to ".join(f"{100 * error:+.1f} %".replace("-", "−") for error in errors)


def _most(one: Largest, workload: Workload) -> Line:
    rows = one.value or one.least if one.key == "batch_size" else workload.batch_size
    length = one.value or one.least if one.key == "sequence_length" else workload.sequence_length
    text = f"{rows} {'sequence' if rows == 1 else 'sequences'} of {length} tokens"
    if one.value is None:
        return say(f"{one.key}: none, for not even {text} would fit.")
    return say(f"{one.key} = {one.value}: {text}{_BOUNDS[one.bound]}.")


def _option(option: MemoryOption) -> Row:
    there = _WORDS[option.status][0]
    return write_row(option.writes, write_bytes(option.freed_bytes), _range(option.needs), there)


def _first(advice: Advice) -> Line:
    if advice.turn is None:
        return say("All of them together are not enough: take a smaller model, or a GPU with more memory.")
    if not advice.turn:
        return say("Nothing has to be changed.")
    lines = ", ".join(advice.turn)
    if len(advice.turn) == 1:
        return say("Change first: ", Span(text=lines, tone="strong"), ". It fits with that alone.")
    return say("None alone is enough. The fewest that are: ", Span(text=lines, tone="strong"), ".")


_SIZES = name_columns(
    "setting", "trainable parameters", "of the base", "adapter, MiB", "optimizer, MiB", "gradients, MiB"
)


def describe_sizes(model: str, sizes: Sequence[Sizes], *, unknown: str | None = None) -> Document:
    """One row a variant; exact counts, so no interval. `unknown` is why a formula cannot be held against them."""
    base = f"{model}: {sizes[0].base_parameters:,} parameters in the base; counted, nothing was loaded"
    alone = f"counted by PEFT alone; other memory of the training is unknown: {unknown}"
    return (
        say(base, indented=False),
        Table(heads=_SIZES, rows=tuple(map(_size, sizes))),
        *((say(alone, indented=False),) if unknown else ()),
    )


def _size(one: Sizes) -> Row:
    return write_row(
        one.variant,
        Cell(text=f"{one.trainable_parameters:,}", value=one.trainable_parameters, unit="1"),
        Cell(text=f"{100 * one.share:.3f} %", value=one.share, unit="1"),
        *map(_in_mib, (one.adapter_bytes, one.optimizer_state_bytes, one.gradient_bytes)),
    )


def _in_mib(size: int) -> Cell:
    return Cell(text=f"{size / MIB:.2f}", value=size, unit="byte")


def describe_plan(
    plan: Plan, expected: Forecast, machine: Machine, notices: Sequence[Notice], data: str | None = None
) -> Document:
    """A line a replicate, the level and why, estimates of time, width, memory and disk, and the kind of the `data`."""
    size = f": {format_count(len(plan.slots), 'trial')} on {machine.device_name}"
    return (
        say(Span(text=plan.study.title, tone="strong"), size, indented=False),
        *say_each(_plan_lines(plan, expected)),
        *say_each([f"data    {data}"] if data else []),
        *warn_before_run(notices),
    )


def _plan_lines(plan: Plan, expected: Forecast) -> Iterator[str]:
    for replicate in range(plan.study.protocol.replicates):
        groups = [group for group in plan.groups if group.replicate == replicate]
        names = "; ".join(", ".join(slot.trial.partition("-")[2] for slot in group.slots) for group in groups)
        yield f"replicate {replicate + 1}: {names}"
    yield f"level   {plan.interleaving}: {plan.why}"
    yield from _estimates(expected.time, plan.study.protocol)
    for what, size, words in (
        ("memory", expected.memory_bytes, " for what is live together, processes included"),
        ("disk  ", expected.disk_bytes, ""),
    ):
        known = f"unknown ({expected.unknown})" if size is None else f"estimate: {format_bytes(size)}{words}"
        yield f"{what}  {known}"


def _estimates(time: TimeForecast, protocol: Protocol) -> Iterator[str]:
    """Time, replicates, and the width of the intervals."""
    took = "unknown" if time.time_s is None else f"estimate: {format_duration(time.time_s)}"
    yield f"time    {took} ({time.basis})"
    if protocol.max_minutes is None:
        yield f"fits    {format_count(protocol.replicates, 'replicate')}, as planned: no time limit"
    elif time.replicates is not None:
        skipped = f", without {', '.join(DROPPABLE[part] for part in DROPPABLE if part in time.skipped)}"
        fitting = (
            f"{time.replicates} of {format_count(protocol.replicates, 'replicate')} in {protocol.max_minutes:g} min"
        )
        yield f"fits    estimate: {fitting}{skipped if time.skipped else ''}"
    if time.half_width is None and time.sought_width_s is None:
        return
    width = "no interval from one replicate"
    if time.half_width is not None:
        width = f"estimate: intervals of training ratios of ± {format_percent(time.half_width)} ({time.noise})"
    sought_s = time.sought_width_s
    needed = "the time for ± 3 % is unknown" if sought_s is None else f"± 3 % takes about {format_duration(sought_s)}"
    yield f"width   {width}; {needed}"
