"""Serves a saved adapter in several modes, whose answers and logits are compared.

Every mode loads the saved adapter with PEFT, as a user does, in eval mode, with greedy decoding and the same seed. The
logits of the reference are written into the trial's folder, one file per answer, for modes served in other processes: a
mode that runs out of memory must not lose the results of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorameter.errors import LorameterError
from lorameter.models import catalogue
from lorameter.records import codec
from lorameter.records.os_errors import failed_record
from lorameter.records.record import PROMPTS, SERVED, LogitDistance, PartialRecord, ServedAnswers
from lorameter.studies.request import ServingMode, ServingRequest
from lorameter.trial.building import peft_methods
from lorameter.trial.building.base_model import load_base
from lorameter.trial.building.build import seed_everything, set_precision
from lorameter.trial.building.quantizers import make_quantizer
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.process import prepare_process
from lorameter.trial.serving.server import answer_logits, generate
from lorameter.trial.step import model_inputs

ROWS = 16
"""Positions that are compared at a time: 16 positions of 262,144 vocabulary entries take 34 MB in float64."""


# --- modes ------------------------------------------------------------------------------------------------------------


def serve_adapter(request: ServingRequest) -> PartialRecord:
    """The results of each mode of a group. An exception fails only its own mode."""
    trial = request.trial
    prepare_process(trial)
    set_precision(trial.variant)
    stream = TokenStream(Path(trial.tokens_path), trial.workload, trial.variant, trial.device)
    model: Any = None
    served: list[ServedAnswers] = []
    answers = request.reference
    for mode in request.ways:
        try:
            model = load_served(request, mode) if model is None else model
            if mode.merged:
                peft_methods.merge(model)  # cannot be undone, so merged modes come last (`serving_modes`)
            result = observe(model, mode, stream, request, answers)
        except Exception as error:
            failed = failed_record(error, "parity")
            if failed.status == "interrupted":  # the disk is full, also for the next mode
                return failed
            result = ServedAnswers(way=mode.name, failure=failed.failure)
        served.append(result)
        answers = answers or result.answers
        if not answers:  # without a reference there is nothing to compare
            break
    prompts = [prompt[0].tolist() for prompt in _prompts(stream, request)]
    return PartialRecord(tokens={SERVED: codec.to_json(served), PROMPTS: prompts})


def load_served(request: ServingRequest, mode: ServingMode) -> Any:
    """The base of a mode with the unmerged adapter, in eval mode."""
    trial, variant = request.trial, mode.variant
    source = catalogue.resolve(trial.workload.model)
    base: Any = load_base(source, variant, device=trial.device, seed=trial.workload.data_seed)
    if mode.dequantised:
        base, variant = make_quantizer(variant).dequantise(base), variant.unquantised()
    seed_everything(trial.seed)
    return peft_methods.load(base, variant, Path(request.adapter)).eval()


def observe(
    model: Any, mode: ServingMode, stream: TokenStream, request: ServingRequest, reference: Sequence[Sequence[int]]
) -> ServedAnswers:
    """Answers, distances of the logits over the reference's answers, and held-out losses. Without a `reference`, the
    logits over the mode's own answers are saved as the reference."""
    workload = request.trial.workload
    new_tokens, until_end = workload.open_ended_tokens or workload.new_tokens, workload.open_ended_tokens > 0
    seed_everything(request.trial.seed)
    with nullcontext() if mode.adapter else peft_methods.without_adapter(model), torch.no_grad():
        prompts = _prompts(stream, request)
        answers = tuple(
            generate(model, prompt, new_tokens, until_end=until_end, variant=mode.variant).tokens for prompt in prompts
        )
        distances: list[LogitDistance] = []
        for index, (prompt, answer) in enumerate(zip(prompts, reference or answers, strict=True)):
            logits = answer_logits(model, prompt, torch.tensor([answer]))[0].cpu()
            file = Path(request.trial.scratch) / f"reference-logits-{index}.safetensors"
            if reference:
                distances.append(measure_distance(load_file(file)["logits"], logits))
            else:
                save_file({"logits": logits.contiguous()}, file)
        losses: list[float] = []
        for batch in stream.held_out():
            logits = model(**model_inputs(batch)).logits
            losses += sequence_losses(logits, batch["labels"], workload.sequence_length)
    return ServedAnswers(way=mode.name, answers=answers, distances=tuple(distances), losses=tuple(losses))


def _prompts(stream: TokenStream, request: ServingRequest) -> list[torch.Tensor]:
    """Whole prompts if the workload has requests until EOS, else prompts of a fixed length."""
    if request.trial.workload.open_ended_tokens:
        return [stream.open_ended_prompt(index) for index in range(stream.open_ended_prompt_count)]
    return [stream.prompt(index) for index in range(stream.prompt_count)]


# --- distances -------------------------------------------------------------------------------------------------------


def measure_distance(reference: torch.Tensor, other: torch.Tensor) -> LogitDistance:
    """The distance of `other` from `reference`, both of shape (positions, vocabulary), on one device.

    Raises:
        LorameterError: a logit is not finite.
    """
    if not (reference.isfinite().all() and other.isfinite().all()):
        raise LorameterError("the logits hold a number that is not finite")
    chunks: list[tuple[torch.Tensor, ...]] = []
    for rows, others in zip(reference.split(ROWS), other.split(ROWS), strict=True):
        ours, theirs = rows.double(), others.double()
        log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)  # rounding can make it negative
        difference = (ours - theirs).abs()
        cosine = torch.cosine_similarity(ours, theirs, dim=-1)
        chunks.append((ours.argmax(-1) != theirs.argmax(-1), kl, difference.mean(-1), difference.amax(-1), cosine))
    differs, kl, means, largest, cosine = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return LogitDistance(
        positions=reference.shape[0],
        argmax_differs=int(differs.sum()),
        kl_mean_nats=float(kl.mean()),
        kl_max_nats=float(kl.max()),
        difference_mean=float(means.mean()),
        difference_max=float(largest.max()),
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
    )


def sequence_losses(logits: torch.Tensor, labels: torch.Tensor, length: int) -> list[float]:
    """Mean loss in nats over the labelled tokens of each sequence of `length` tokens that has a label.

    Args:
        logits: shape (rows, tokens, vocabulary); a row may hold several sequences one after the other.
        labels: shape (rows, tokens), in the convention of transformers: a token's label is at its own position, -100
            means none.
        length: tokens of a sequence. The first token of each sequence has no label: the previous sequence must not
            predict it.
    """
    losses: list[float] = []
    for row, expected in zip(logits, labels, strict=True):
        each = torch.nn.functional.cross_entropy(row[:-1].float(), expected[1:], reduction="none", ignore_index=-100)
        token_losses = torch.nn.functional.pad(each, (1, 0)).double().reshape(-1, length)
        counts = (torch.nn.functional.pad(expected[1:], (1, 0), value=-100) != -100).reshape(-1, length).sum(-1)
        losses += [
            float(total / count) for total, count in zip(token_losses.sum(-1), counts, strict=True) if int(count)
        ]
    return losses
