"""Describes the answers of a trained adapter, and their parity: whether each way of serving it gives the same answers.

Parity has first a verdict for each way, then the numbers behind it. A sample has one panel a prompt: the reference, and
the answers before and after training.

The run generated, timed and stored the answers (requests until EOS); this module only decodes them with the tokenizer
of the run's model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorameter.errors import require
from lorameter.models import catalogue, shapes
from lorameter.parity import Judgement, Likeness, Parity, Verdict, first_difference
from lorameter.records.record import TrialRecord
from lorameter.records.store import Run
from lorameter.records.units import format_count, format_percent, three_digits
from lorameter.report.blocks import (
    Cell,
    ColumnHeader,
    Document,
    Line,
    Panel,
    Section,
    Span,
    Table,
    Tone,
    to_line,
    to_lines,
    value_cell,
    write_number,
    write_row,
    write_value,
)
from lorameter.report.phrases import describe_notices
from lorameter.stats import Estimate, Proportion
from lorameter.studies.study_file import read_own_workloads, read_study

MAX_SHOWN = 3
"""Maximum answers of each way that are shown with the reference's."""


def describe_parity(parity: Parity, judgement: Judgement) -> Document:
    """The report of a parity: verdicts, answers, logits, losses and notices."""
    notices = (*parity.notices, *(() if parity.record is None else parity.record.notices))
    rows = [one for one in (*judgement.likenesses, judgement.base_alone, judgement.noise_floor) if one is not None]
    adapter = f"adapter {parity.adapter}"
    if parity.record is not None:
        adapter = f"adapter trained for {format_count(round(parity.record.values['training_steps']), 'step')}"
    return (
        to_line(
            Span(text=parity.variant.name or parity.adapter, tone="strong"),
            f" of {parity.study} on {parity.device_name} ({parity.device}); {parity.workload.model}, {adapter}",
            indented=False,
        ),
        Section(title=f"Against {parity.reference.way}", lines=tuple(_verdicts(judgement))),
        _answers(rows),
        _logits(rows),
        _losses(rows, parity),
        *describe_notices(notices),
    )


def _verdicts(judgement: Judgement) -> Iterator[Line]:
    for one in judgement.likenesses:
        text, tone = _VERDICT_TEXTS[one.verdict]
        yield to_line(Span(text=text, tone=tone), f": {format_likeness(one)}", label=one.way)
    for way, why in judgement.failures.items():
        yield to_line(Span(text="no answer", tone="alarm"), f": {why}", label=way)
    for control, title in (
        (judgement.base_alone, "what the adapter changes"),
        (judgement.noise_floor, "the noise floor"),
    ):
        if control is not None:
            yield to_line(f"{title}: {format_likeness(control)}", label=control.way)
    control = judgement.base_alone or judgement.noise_floor
    if control is not None and judgement.distinct == 1 < control.answers.of:
        yield to_line(
            Span(text="few different answers", tone="warning"),
            f": the reference gives one answer to all {control.answers.of} prompts, so they are hardly more than one "
            f"observation. Use a trained model, or train for longer (--epochs).",
        )
    if judgement.trouble:
        yield to_line(Span(text="no verdict can be relied on", tone="alarm"), f": {judgement.trouble}.")


_VERDICT_TEXTS: Mapping[Verdict, tuple[str, Tone]] = {
    "same": ("same answers", "note"),
    "noise": ("answers differ no more than between two runs of the reference", "note"),
    "differ": ("answers differ", "warning"),
}


def format_likeness(one: Likeness) -> str:
    """The number of its answers that differ, and the distance of its logits from the reference's."""
    first = "" if one.first_difference is None else f", first at token {one.first_difference:g} (median)"
    logits = f"logits differ by {three_digits(one.difference_max)} at most"
    if one.difference_max == 0:
        logits = "no logit differs"
    elif one.verdict != "noise" and one.within_floor:
        logits = "logits differ no more than between two runs of the reference"
    return f"{one.answers.count} of {one.answers.of} differ {_interval(one.answers)}{first}; {logits}"


def _interval(part: Proportion) -> str:
    low, high = ("0 %" if end == 0 else format_percent(end) for end in (part.low, part.high))
    return f"[{low}, {high}]"


def _answers(rows: Sequence[Likeness]) -> Table:
    return Table(
        title="Answers, and what would be chosen next at each token of the reference's",
        heads=(
            _WAY,
            ColumnHeader(text="answers that differ", right=True),
            ColumnHeader(text="first at", right=True, drop_priority=1),
            ColumnHeader(text="tokens that differ", right=True),
        ),
        rows=tuple(
            write_row(one.way, _part(one.answers), write_number(one.first_difference), _part(one.tokens))
            for one in rows
        ),
        notes=to_lines(["95 % intervals over prompts and over answers; more prompts (--prompts) narrow them"]),
    )


_WAY = ColumnHeader(text="served")


def _part(part: Proportion) -> Cell:
    text = f"{part.count} of {part.of}"
    return Cell(text=text, interval=_interval(part), value=part.share, low=part.low, high=part.high)


def _logits(rows: Sequence[Likeness]) -> Table:
    names = ("KL mean", "KL max", "|Δ| mean", "|Δ| max")
    return Table(
        title="Logits at the same positions",
        heads=(_WAY, *(ColumnHeader(text=name, right=True) for name in names)),
        rows=tuple(
            write_row(
                one.way,
                _mean(one.kl_mean_nats),
                write_value(one.kl_max_nats, "1"),
                _mean(one.difference_mean),
                write_value(one.difference_max, "1"),
            )
            for one in rows
        ),
        notes=to_lines(["KL(reference ‖ other) in nats, |Δ| of logits; means with 95 % intervals"]),
    )


def _mean(mean: Estimate, sign: str = "") -> Cell:
    """A mean in powers of ten if it is small: a unit prefix would hide its size."""
    form = f"{sign}.3g"
    interval = "[no interval]" if mean.low is None or mean.high is None else f"[{mean.low:{form}}, {mean.high:{form}}]"
    return Cell(text=f"{mean.value:{form}}", interval=interval, value=mean.value, low=mean.low, high=mean.high)


def _losses(rows: Sequence[Likeness], parity: Parity) -> Table:
    return Table(
        title="Held-out loss, in nats",
        heads=(_WAY, ColumnHeader(text="loss", right=True), ColumnHeader(text="above the reference's", right=True)),
        rows=tuple(
            write_row(
                one.way,
                value_cell(one.held_out_loss.value, one.held_out_loss.low, one.held_out_loss.high, "1"),
                _mean(one.loss_difference, "+"),
            )
            for one in rows
        ),
        notes=to_lines([f"paired over {format_count(len(parity.reference.losses), 'held-out sequence')}"]),
    )


def describe_differing_answers(parity: Parity, decode: Callable[[Sequence[int]], str]) -> Document:
    """The first different answers of each way, with the reference's answers."""
    controls = {way.name for way in parity.ways if way.is_control}
    panels: list[Panel] = []
    for one in parity.served[1:]:
        if one.way in controls or one.failure is not None:
            continue
        pairs = zip(parity.prompts, parity.reference.answers, one.answers, strict=True)
        differing = [
            (index, place, *texts)
            for index, texts in enumerate(pairs)
            if (place := first_difference(texts[1], texts[2])) is not None
        ]
        panels += (
            _make_panel(
                f"{one.way}, prompt {index}, from token {place}",
                {"prompt": decode(prompt), parity.reference.way: decode(ours), one.way: decode(theirs)},
            )
            for index, place, prompt, ours, theirs in differing[:MAX_SHOWN]
        )
    return tuple(panels)


def describe_samples(samples: Sequence[Sample], title: str) -> Document:
    """Prompt, reference, and the model's answers before and after training."""
    panels = (
        _make_panel(
            f"prompt {number}",
            {
                "prompt": sample.prompt,
                "reference": sample.reference,
                "before training": "not measured" if sample.base_answer is None else sample.base_answer,
                f"after training, {sample.tokens} tokens, "
                f"{'ended by the model' if sample.ended else 'cut at the limit'}": sample.trained,
            },
        )
        for number, sample in enumerate(samples)
    )
    return to_line(Span(text=title, tone="strong"), indented=False), *panels


def _make_panel(title: str, texts: Mapping[str, str]) -> Panel:
    return Panel(title=title, passages=tuple((name, text.strip() or "(nothing)") for name, text in texts.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt and its continuations."""

    prompt: str
    reference: str
    """The continuation in the held-out record."""
    base_answer: str | None
    """The base model's answer; None if it was not generated."""
    trained: str
    tokens: int
    """Tokens of the trained model's answer, including the final one."""
    ended: bool
    """Whether the model ended the answer itself; otherwise it was truncated at the workload's limit."""


def read_samples(run: Run, variant: str, *, replicate: int = 0, count: int | None = None) -> tuple[Sample, ...]:
    """The answers of one variant in one replicate, in prompt order.

    Args:
        run: a run whose workload has `open_ended_tokens`.
        variant: its name in the study.
        replicate: number of the replicate, and so of the trained adapter, from 0.
        count: maximum number of answers; None for all.

    Raises:
        UsageError: the variant or replicate does not exist, or the run has no answers; the message lists the existing
            ones.
    """
    name, tokens = run.manifest.run, run.manifest.tokens
    answered = [one for one in run.records if one.role == "variant" and _prompts(one)]
    records = {one.replicate: one for one in answered if one.name == variant}
    names = ", ".join(dict.fromkeys(one.name for one in answered))
    require(records or not answered, f"variant {variant!r}: run {name} has no answers of it. It has those of: {names}.")
    known = ", ".join(map(str, sorted(records)))
    require(replicate in records or not records, f"replicate = {replicate}: run {name} has {known} of {variant}.")
    workload = read_own_workloads(run).get(variant) or read_study(run).workload
    examples = tokens.get("own", {}).get(variant, tokens).get("examples", [])
    chosen = [index for index in _prompts(records[replicate]) if index < len(examples)][:count] if records else []
    require(
        chosen,
        f"run {name} has no answers. Write open_ended_tokens = 64 in [workload] of the study and measure it again "
        "with the phase generate.",
    )
    source = catalogue.resolve(workload.model)
    from lorameter.trial.data.tokens import load_tokenizer

    tokenizer, _ = load_tokenizer(source, vocab_size=shapes.shape(source).vocab_size)
    limit, record = workload.open_ended_tokens, records[replicate]
    return tuple(_sample(record, index, examples[index], tokenizer, limit) for index in chosen)


def _prompts(record: TrialRecord) -> list[int]:
    """The prompts that a trial has answered, in order."""
    found = (re.fullmatch(r"answer_(\d+)", key) for key in record.tokens)
    return sorted(int(match[1]) for match in found if match)


def _sample(record: TrialRecord, index: int, example: dict[str, str], tokenizer: Any, limit: int) -> Sample:
    trained: Sequence[int] = record.tokens[f"answer_{index}"]
    base_answer = record.tokens.get(f"base_answer_{index}")
    return Sample(
        prompt=example["prompt"],
        reference=example["reference"],
        base_answer=None if base_answer is None else str(tokenizer.decode(base_answer, skip_special_tokens=True)),
        trained=str(tokenizer.decode(trained, skip_special_tokens=True)),
        tokens=len(trained),
        ended=len(trained) < limit or list(trained[-1:]) == [tokenizer.eos_token_id],
    )
