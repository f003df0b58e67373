"""Describes the answers of a trained adapter: the reference, and answers before and after training, one panel a prompt.

The run generated, timed and stored the answers (requests until EOS); this module only decodes them with the tokenizer
of the run's model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorameter.errors import UsageError
from lorameter.models import catalogue, shapes
from lorameter.records.record import TrialRecord
from lorameter.records.store import Run
from lorameter.report.blocks import Document, Panel, Span, say
from lorameter.studies.from_run import read_workload_of


def describe_samples(samples: Sequence[Sample], title: str) -> Document:
    """Prompt, reference, and the model's answers before and after training."""
    panels = (Panel(title=f"prompt {number}", passages=_passages(one)) for number, one in enumerate(samples))
    return say(Span(text=title, tone="strong"), indented=False), *panels


def _passages(sample: Sample) -> tuple[tuple[str, str], ...]:
    end = "ended by the model" if sample.ended else "cut at the limit"
    texts = {
        "prompt": sample.prompt,
        "reference": sample.reference,
        "before training": "not measured" if sample.base_answer is None else sample.base_answer,
        f"after training, {sample.tokens} tokens, {end}": sample.trained,
    }
    return tuple((author, text.strip() or "(nothing)") for author, text in texts.items())


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
    answered = [one for one in run.records if one.role == "variant" and _prompts(one)]
    records = {one.replicate: one for one in answered if one.name == variant}
    if answered and not records:
        names = ", ".join(dict.fromkeys(one.name for one in answered))
        raise UsageError(f"variant {variant!r}: run {run.manifest.run} has no answers of it. It has those of: {names}.")
    if records and replicate not in records:
        known = ", ".join(map(str, sorted(records)))
        raise UsageError(f"replicate = {replicate}: run {run.manifest.run} has {known} of {variant}.")
    workload, tokens = read_workload_of(run, variant), run.manifest.tokens
    examples = tokens.get("own", {}).get(variant, tokens).get("examples", [])
    chosen = [index for index in _prompts(records[replicate]) if index < len(examples)][:count] if records else []
    if not chosen:
        raise UsageError(
            f"run {run.manifest.run} kept no answers. Write open_ended_tokens = 64 in [workload] of the study and "
            "measure it again with the phase generate."
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
