"""Peaks of a trial that takes turns are those of a solo trial: on a CPU a peak is that of a process."""

from __future__ import annotations

import dataclasses
import json

import pytest

from harness.errors import UsageError
from harness.models import catalogue
from harness.records import codec
from harness.run.contenders import Contender
from harness.run.executors.local import LocalExecutor
from harness.run.plan import make_plan
from harness.run.site import request_of, site_of
from harness.studies.request import BaseRequest, base_key
from harness.studies.variant import Variant

SMALL = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 8192,
    "max_position_embeddings": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
WITHIN = 0.03
"""Heaps of two processes that came to the same by other ways are not alike to the page."""
TRAINING = (("build", {}), ("verify", {}), ("warm_up", {}))
PEAKS = ("host_peak_train_bytes", "host_peak_generate_bytes")


def peaks_of(executor, request, commands):
    """What a process says that is asked these."""
    worker = executor.launch()
    memory = {}
    try:
        for word, arguments in (("prepare", {"request": codec.to_json(request)}), *commands):
            fragment = worker.ask(word, request.trial, 600, **arguments)
            assert fragment.status == "ok", fragment.failure
            memory |= fragment.memory
    finally:
        worker.close()
    return {name: memory[name] for name in PEAKS}


def check(model, tmp_path, small_study, variants, *, sequence_length):
    """Each variant alone, and as it is between its turns."""
    workload = dataclasses.replace(
        small_study.workload, model=model, sequence_length=sequence_length, batch_size=4, new_tokens=16
    )
    study = dataclasses.replace(small_study, workload=workload, variants=variants, reference=variants[0].name)
    executor = LocalExecutor()
    executor.start(tmp_path, 1)
    found = {}
    try:
        executor.hello()
        tokens = executor.prepare_tokens(workload)
        for variant in variants:
            base = executor.prepare_base(
                BaseRequest(workload=workload, variant=variant, device="cpu", threads=1, log_path="")
            )
            contender = Contender(variant=variant, workload=workload)
            plan = make_plan(study, contenders=[contender], interleaving="lockstep")
            folders = {("", base_key(variant, workload)): base.path}
            site = dataclasses.replace(site_of(workload, tokens, "cpu"), bases=folders)
            live, solo = (next(one for one in plan.slots if one.replicate == 1 and ("steps" in one.measures) is timed)
                          for timed in (True, False))  # fmt: skip
            place = executor.make_place(variant.name, variant.name)
            alone = peaks_of(
                executor, request_of(plan, solo, site, place),
                (*TRAINING, ("finish_training", {}), ("begin_generate", {}), ("end_generate", {})),
            )  # fmt: skip
            live = dataclasses.replace(live, measures=(*live.measures, "peaks"))
            beside = peaks_of(
                executor, request_of(plan, live, site, place, natural=True, warm_up_steps=1),
                (*TRAINING, *[("turn", {"steps": 1})] * 2, ("finish_training", {"steps": 4}),
                 ("begin_generate", {"brief": True}), ("request", {}), ("end_generate", {})),
            )  # fmt: skip
            found[variant.name] = alone, beside
    finally:
        executor.close()
    for name, (alone, beside) in found.items():
        for kind in PEAKS:
            assert beside[kind] == pytest.approx(alone[kind], rel=WITHIN), (name, kind, alone[kind], beside[kind])
    return found


@pytest.mark.selftest
def test_peaks_of_a_small_model(tmp_path, small_study):
    """Of random weights, so that it always runs."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    variants = (Variant(name="plain", r=8), Variant(name="dora", r=8, use_dora=True))
    check(f"random:{tmp_path}", tmp_path, small_study, variants, sequence_length=64)


@pytest.mark.selftest
def test_peaks_of_a_real_model(tmp_path, small_study):
    """Of smollm2-135m in 16 and in 4 bits, where it has been fetched."""
    try:
        catalogue.resolve("smollm2-135m")
    except UsageError as missing:
        pytest.skip(str(missing))
    variants = (Variant(name="plain", r=8), Variant(name="nf4-dora", r=8, use_dora=True, quantization="nf4"))
    check("smollm2-135m", tmp_path, small_study, variants, sequence_length=128)
