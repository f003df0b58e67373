"""Cold inference: what a user waits for who starts a fresh interpreter, loads a trained adapter and asks once.

Its own process, started by the parent, whose clock reading at the spawn comes as an argument: CLOCK_MONOTONIC is one
clock for all processes of a machine, so the interpreter's own start is in the number. Each part is a number of its
own: import, load, first token, first completion. The base is read, converted and quantised from its own files, as a
user's is, and not taken from what the run has prepared. The page cache is warm (the files were just read or written);
what is cold is the interpreter, the libraries, the allocator and the device context.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from lorameter.records.record import PartialRecord
from lorameter.studies.request import TrialRequest


def start_cold(request: TrialRequest, spawned_monotonic_s: float) -> PartialRecord:
    """Import, load, ask once; times in seconds since the parent's spawn or of each part."""
    from lorameter.models import catalogue
    from lorameter.trial.building import lora
    from lorameter.trial.building.base_model import load_base
    from lorameter.trial.building.build import set_precision
    from lorameter.trial.data.stream import TokenStream
    from lorameter.trial.inference.generate import generate
    from lorameter.trial.inference.waterfall import Waterfall
    from lorameter.trial.process import prepare_process, synchronize

    imported = time.monotonic()
    waterfall = Waterfall() if request.waterfall else None
    prepare_process(request)
    variant = request.variant
    set_precision(variant)
    stream = TokenStream(Path(request.tokens_path), request.workload, variant, request.device)
    source = catalogue.resolve(request.workload.model)
    begin = time.monotonic()
    with waterfall.loading(request.device) if waterfall else contextlib.nullcontext():
        base = load_base(source, variant, device=request.device, seed=request.workload.data_seed)
    read = time.monotonic()
    model = lora.load(base, variant, Path(request.scratch) / "adapter")
    if variant.merge_adapter:
        lora.merge(model)
    model.eval()
    synchronize(request.device)
    loaded = time.monotonic()
    with waterfall.answering(lora.wrapped(model), request.device) if waterfall else contextlib.nullcontext():
        first = generate(model, stream.prompts(0), request.workload.new_tokens, variant=variant)
    done = time.monotonic()
    values = {
        "cold_import_time_s": imported - spawned_monotonic_s,
        "cold_load_time_s": loaded - begin,
        "cold_base_conversions": 1.0,
        "cold_first_token_time_s": first.first_token_time_s,
        "cold_completion_time_s": first.request_time_s,
        "cold_start_time_s": done - spawned_monotonic_s,
    }
    if waterfall is not None:
        prepared = {"cold_prepare_time_s": begin - imported, "cold_adapter_time_s": loaded - read}
        values |= prepared | waterfall.values(base_s=read - begin, first_token_s=first.first_token_time_s)
    return PartialRecord(
        values=values,
        samples={"cold_start_time_s": (values["cold_start_time_s"],)},
        tokens={"cold_completion": list(first.tokens)},
    )
