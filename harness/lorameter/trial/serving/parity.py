"""An adapter as PEFT loads it, served in several ways, and how far their answers and logits are from each other.

Every way begins with the saved adapter, as a user's does, in eval mode, greedy, with the same seed. The reference's
logits are written into the trial's folder, an answer each, for those that are compared with it in other processes: one
that dies of a base that does not fit must not take with it what the others have found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorameter.errors import LorameterError
from lorameter.models import catalogue
from lorameter.records import codec
from lorameter.records.os_errors import failed_record
from lorameter.records.parity import PROMPTS, SERVED, LogitDistance, Served
from lorameter.records.record import PartialRecord
from lorameter.studies.request import ServingMode, ServingRequest
from lorameter.trial.building import peft_methods
from lorameter.trial.building.base_model import load_base
from lorameter.trial.building.build import seed_everything, set_precision
from lorameter.trial.building.packing import unpack_4bit
from lorameter.trial.building.quantising import dtype_of
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.process import prepare_process
from lorameter.trial.serving.generate import generate

ROWS = 16
"""Positions at a time: 16 of 262,144 words are 34 MB in float64."""


def serve_adapter(request: ServingRequest) -> PartialRecord:
    """What is observed of each way of a group. One that raises is a failure of its own, and the others go on."""
    prepare_process(request.trial)
    set_precision(request.trial.variant)
    stream = TokenStream(
        Path(request.trial.tokens_path), request.trial.workload, request.trial.variant, request.trial.device
    )
    model: Any = None
    served: list[Served] = []
    answers = request.reference
    for way in request.ways:
        try:
            if model is None:
                model = load_served(request, way)
            found = observe(prepare_way(model, way), way, stream, request, answers)
        except Exception as error:
            failed = failed_record(error, "parity")
            if failed.status == "interrupted":  # the disk is full, and it is for the next one as well
                return failed
            found = Served(way=way.name, failure=failed.failure)
        served.append(found)
        if not answers:
            if found.failure is not None:  # there is nothing to compare with
                break
            answers = found.answers
    prompts = [prompt[0].tolist() for prompt in _prompts(stream, request)]
    return PartialRecord(tokens={SERVED: codec.to_json(served), PROMPTS: prompts})


def load_served(request: ServingRequest, way: ServingMode) -> Any:
    """The base of a way with the unmerged adapter, in eval mode."""
    trial = request.trial
    base: Any = load_base(
        catalogue.resolve(trial.workload.model), way.variant, device=trial.device, seed=trial.workload.data_seed
    )
    variant = way.variant
    if way.dequantised:
        base = dequantised(base, variant.dtype)
        variant = dataclasses.replace(variant, quantization="none", prepare_for_kbit=False)
    seed_everything(trial.seed)
    model = peft_methods.load(base, variant, Path(request.adapter))
    model.eval()
    return model


def dequantised(base: Any, dtype: str) -> Any:
    """A quantised base with its weights turned back into a type, by transformers' own hand."""
    unpack_4bit(base)
    return base.dequantize(dtype=dtype_of(dtype))


def prepare_way(model: Any, way: ServingMode) -> Any:
    """The model as the way has it: merged, where it asks for that, which nothing takes back."""
    if way.merged:
        peft_methods.merge(model)
    elif peft_methods.is_merged(model):
        raise LorameterError(f"{way.name}: the adapter is merged into this base already")
    return model


def observe(
    model: Any, way: ServingMode, stream: TokenStream, request: ServingRequest, reference: Sequence[Sequence[int]]
) -> Served:
    """Answers, logits over the reference's answers (its own, where `reference` is empty), and held-out losses."""
    folder = Path(request.trial.scratch)
    seed_everything(request.trial.seed)
    with peft_methods.serving(model, adapter=way.adapter), torch.no_grad():
        prompts = list(_prompts(stream, request))
        answers = tuple(_answer(model, prompt, way, request) for prompt in prompts)
        distances: list[LogitDistance] = []
        for index, (prompt, answer) in enumerate(zip(prompts, reference or answers, strict=True)):
            logits = answer_logits(model, prompt, answer)
            kept = folder / f"reference-logits-{index}.safetensors"
            if reference:
                distances.append(measure_distance(load_file(kept)["logits"], logits.cpu()))
            else:
                save_file({"logits": logits.cpu().contiguous()}, kept)
        losses = [loss for batch in stream.held_out() for loss in _losses(model, batch, request)]
    return Served(way=way.name, answers=answers, distances=tuple(distances), losses=tuple(losses))


def answer_logits(model: Any, prompt: torch.Tensor, answer: Sequence[int]) -> torch.Tensor:
    """The logits from which each token of an answer is chosen, given all tokens before it; shape (tokens,
    vocabulary), in the model's type. One pass over prompt (shape (1, length)) and answer, without a cache."""
    tokens = torch.tensor([list(answer)], dtype=prompt.dtype, device=prompt.device)
    whole = torch.cat([prompt, tokens], dim=1)
    logits: torch.Tensor = model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits
    return logits[0, prompt.shape[1] - 1 : -1]


def _prompts(stream: TokenStream, request: ServingRequest) -> Iterator[torch.Tensor]:
    """Whole prompts, where the workload has answers that the model ends itself; else those of a fixed length."""
    whole = request.trial.workload.open_ended_tokens > 0
    take: Callable[[int], torch.Tensor] = stream.open_ended_prompt if whole else stream.prompt
    yield from (take(index) for index in range(stream.open_ended_prompt_count if whole else stream.prompt_count))


def _answer(model: Any, prompt: torch.Tensor, way: ServingMode, request: ServingRequest) -> tuple[int, ...]:
    workload = request.trial.workload
    if workload.open_ended_tokens:
        return generate(model, prompt, workload.open_ended_tokens, until_end=True, variant=way.variant).tokens
    return generate(model, prompt, workload.new_tokens, variant=way.variant).tokens


def _losses(model: Any, batch: dict[str, torch.Tensor], request: ServingRequest) -> list[float]:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    return sequence_losses(logits, batch["labels"], request.trial.workload.sequence_length)


# --- distances -------------------------------------------------------------------------------------------------------


def measure_distance(reference: torch.Tensor, other: torch.Tensor) -> LogitDistance:
    """The distance of `other` from `reference`, both of shape (positions, vocabulary), on one device.

    Raises:
        LorameterError: their shapes differ, there is no position, or a logit is not finite.
    """
    if reference.shape != other.shape or reference.dim() != 2 or not reference.numel():
        raise LorameterError(f"logits of shapes {tuple(reference.shape)} and {tuple(other.shape)} are not compared")
    for which, logits in (("the reference's", reference), ("its", other)):
        if not logits.isfinite().all():
            raise LorameterError(f"{which} logits hold a number that is not finite")
    differs, kl, means, largest, cosines = [], [], [], [], []
    for rows, others in zip(reference.split(ROWS), other.split(ROWS), strict=True):
        ours, theirs = rows.double(), others.double()
        differs.append(ours.argmax(-1) != theirs.argmax(-1))
        log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))  # rounding may go below what it cannot be
        apart = (ours - theirs).abs()
        means.append(apart.mean(-1))
        largest.append(apart.amax(-1))
        cosines.append(torch.cosine_similarity(ours, theirs, dim=-1))
    divergence, cosine = torch.cat(kl), torch.cat(cosines)
    return LogitDistance(
        positions=reference.shape[0],
        argmax_differs=int(torch.cat(differs).sum()),
        kl_mean_nats=float(divergence.mean()),
        kl_max_nats=float(divergence.max()),
        difference_mean=float(torch.cat(means).mean()),
        difference_max=float(torch.cat(largest).max()),
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
    )


def sequence_losses(logits: torch.Tensor, labels: torch.Tensor, length: int) -> list[float]:
    """Mean loss over the labelled tokens of each sequence of `length` tokens that has one, in nats.

    Args:
        logits: shape (rows, tokens, vocabulary); a row may hold several sequences one after the other.
        labels: shape (rows, tokens), as transformers takes them: a token's label is at its own position, -100 is none.
        length: tokens of a sequence. The first token of each has no label, or its loss would cross the border.
    """
    losses: list[float] = []
    for row, expected in zip(logits, labels, strict=True):
        each = torch.nn.functional.cross_entropy(row[:-1].float(), expected[1:], reduction="none", ignore_index=-100)
        each = torch.nn.functional.pad(each, (1, 0)).double().reshape(-1, length)
        counts = (torch.nn.functional.pad(expected[1:], (1, 0), value=-100) != -100).reshape(-1, length).sum(-1)
        losses += [float(total / count) for total, count in zip(each.sum(-1), counts, strict=True) if int(count)]
    return losses
