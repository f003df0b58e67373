"""Requests until EOS, and the answers of the base to the same prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorameter.records.record import PartialRecord
from lorameter.trial.building import peft_methods

if TYPE_CHECKING:
    from lorameter.trial.trial import Trial


def open_ended(trial: Trial) -> PartialRecord:
    """Run one request until EOS; its answer goes into the record."""
    index, request = trial.server.open_ended()
    samples: dict[str, tuple[float, ...]] = {
        "open_ended_request_time_s": (request.request_time_s,),
        "open_ended_first_token_time_s": (request.first_token_time_s,),
        "open_ended_tokens": (float(len(request.tokens)),),
    }
    return PartialRecord(samples=samples, tokens={f"answer_{index}": list(request.tokens)})


def base_answers(trial: Trial) -> PartialRecord:
    """The answers of the base without an adapter to the same prompts."""
    if trial.request.variant.rewrites_base or trial.request.variant.merge_adapter:
        return PartialRecord()

    def answers() -> dict[str, list[int]]:
        with peft_methods.without_adapter(trial.trainee.model):
            return {f"base_answer_{index}": list(server.answer(index).tokens) for index in server.answered}

    server = trial.server
    return PartialRecord(tokens=trial.shared.once("answers", answers))
