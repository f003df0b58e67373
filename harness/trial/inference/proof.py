"""Which attention the requests of a trial run: watched in one of their own, since no training step tells it."""

from __future__ import annotations

import dataclasses
from typing import Any

import kernels_check
from harness.records import codec
from harness.records.record import Fragment, Instrument
from harness.records.required import judge_required
from harness.studies.request import TrialRequest
from harness.trial.building.requirements import attention_of
from harness.trial.inference.server import Server


def prove_attention(fragment: Fragment, model: Any, server: Server, request: TrialRequest) -> Fragment:
    """The fragment with the check, which may make its trial invalid as one of a step does.

    A profile's records would be in the peaks of a trial that has such, so that the spy looks on there.
    """
    required = attention_of(request.variant, request.requirements)
    instrument: Instrument = "spy" if "peaks" in request.measures else request.instrument
    check = kernels_check.watch_request(model, server.ask_shortly, required, instrument=instrument)
    if check is None:
        return fragment
    seen = dataclasses.replace(fragment, checks=(codec.to_json(check),))
    name, fallback = request.variant.name, request.allow_fallback
    return judge_required(seen, {check.path: check.required}, name=name, allow_fallback=fallback)
