"""Loads a saved adapter after a cold start, and answers once.

A cold start is the time in which a new interpreter imports the libraries, loads the adapter and answers a request.
Imports depend on the environment and not on the variant. So they are timed in a new interpreter, and the part that
depends on the variant (load, first token, first completion) in a fresh child of a process that has already imported; a
cold start is the sum. One cold start is measured as a whole in a new interpreter, to check the sum. The base is read,
converted and quantised from its own files, as for a user, instead of using the prepared base of the run. The page cache
is warm; interpreter, libraries, allocator and device context are cold.
"""

from __future__ import annotations

import time
from pathlib import Path

from lorameter.models import catalogue
from lorameter.records.record import PartialRecord
from lorameter.studies.request import TrialRequest
from lorameter.trial.building import peft_methods
from lorameter.trial.building.base_model import load_base
from lorameter.trial.building.build import set_precision
from lorameter.trial.data.stream import TokenStream
from lorameter.trial.process import prepare_process, synchronize
from lorameter.trial.serving.server import generate


def load_and_answer(request: TrialRequest) -> PartialRecord:
    """Run the part of a cold start that depends on the variant: load the saved adapter on its base, and answer once."""
    entered = time.monotonic()
    prepare_process(request)
    variant = request.variant
    set_precision(variant)
    stream = TokenStream(Path(request.tokens_path), request.workload, variant, request.device)
    source = catalogue.resolve(request.workload.model)
    begin = time.monotonic()
    base = load_base(source, variant, device=request.device, seed=request.workload.data_seed)
    base_loaded = time.monotonic()
    model = peft_methods.load(base, variant, Path(request.scratch) / "adapter")
    if variant.merge_adapter:
        peft_methods.merge(model)
    model.eval()
    synchronize(request.device)
    loaded = time.monotonic()
    first = generate(model, stream.prompts(0), request.workload.new_tokens, variant=variant)
    values = {
        "cold_after_import_time_s": time.monotonic() - entered,
        "cold_prepare_time_s": begin - entered,
        "cold_load_time_s": loaded - begin,
        "cold_base_time_s": base_loaded - begin,
        "cold_adapter_time_s": loaded - base_loaded,
        "cold_first_token_time_s": first.first_token_time_s,
        "cold_completion_time_s": first.request_time_s,
    }
    return PartialRecord(values=values, tokens={"cold_completion": list(first.tokens)})
