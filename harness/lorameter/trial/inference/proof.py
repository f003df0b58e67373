"""What the requests of a trial must show before their times count.

Which attention they run is watched in one of their own, since no training step tells it. And where prompts of a batch
name different adapters, each must get the answer of its own.
"""

from __future__ import annotations

from typing import Any

import msgspec

import kernels_check
from lorameter.records import codec
from lorameter.records.record import Failure, PartialRecord, judge_required
from lorameter.studies.request import TrialRequest
from lorameter.trial.building.requirements import attention_of
from lorameter.trial.inference.server import Server


def prove_attention(fragment: PartialRecord, model: Any, server: Server, request: TrialRequest) -> PartialRecord:
    """The fragment with the check, which may make its trial invalid as one of a step does."""
    required = attention_of(request.variant, request.requirements)
    check = kernels_check.watch_request(model, server.ask_shortly, required)
    seen = msgspec.structs.replace(fragment, checks=(codec.to_json(check),))
    name, fallback = request.variant.name, request.allow_fallback
    return judge_required(seen, {check.path: check.required}, name=name, allow_fallback=fallback)


def prove_mixing(fragment: PartialRecord, server: Server, request: TrialRequest) -> PartialRecord:
    """The fragment of a server that holds the adapters of the workload, with what came of a mixed batch."""
    if request.workload.adapters == 1 or fragment.status != "ok":
        return fragment
    server.hold_adapters()
    values = {**fragment.values, "adapters": float(request.workload.adapters)}
    found = server.check_mixing()
    if found is None:
        return msgspec.structs.replace(fragment, values=values)
    values |= {
        "mixed_rows": float(found.rows),
        "mixed_rows_rounded": float(len(found.rounded)),
        "mixed_rows_telling": float(found.telling),
    }
    fragment = msgspec.structs.replace(fragment, values=values)
    if found.wrong:
        rows = ", ".join(map(str, found.wrong))
        message = (
            f"of {found.rows} prompts in one batch for {request.workload.adapters} adapters, row {rows} (from 0) got "
            "another answer than its adapter gives alone, and rounding does not explain it"
        )
        return fragment.failed("invalid", Failure(phase="generate", kind="MixedAnswers", message=message))
    if not found.telling:
        message = (
            f"the {request.workload.adapters} adapters give the same answers to all of {found.rows} prompts, so that "
            "nothing shows whether each is answered by its own; raise new_tokens"
        )
        return fragment.failed("invalid", Failure(phase="generate", kind="AdaptersAlike", message=message))
    return fragment
