"""Whether a variant fits on a device, how sure that is, the most of it that does, and what to change first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from lorameter.models.costs.memory import (
    MEASURED_ERRORS,
    MEASURED_ON,
    PEAK_RANGES,
    PUBLISHED_PEAKS,
    PUBLISHED_WITHIN,
)
from lorameter.records.units import format_bytes, split_interval
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
    say,
    write_bytes,
    write_row,
)

if TYPE_CHECKING:
    from lorameter.run.memory_fit import Advice, FitStatus, Largest, MemoryDevice, MemoryOption, Needs
    from lorameter.studies.workload import Workload

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
    return tuple(_blocks(advice, workload, profile))


def _blocks(advice: Advice, workload: Workload, profile: str | None) -> Iterator[Block]:
    device = advice.device
    lines = [_finding(advice), *_assumed(device), *_errors(device)]
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
            rows=tuple(map(_row, advice.options)),
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


def _errors(device: MemoryDevice) -> Iterator[Line]:
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


def _row(option: MemoryOption) -> Row:
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
