"""Live processes on one 16-bit base take it once, and beside it what each of them owns at its peak; measured in PSS.

The kernel keeps a peak of the resident set and none of PSS. What a process had more at its peak than it has now is its
own: the base's pages, and those of the zygote, stay where they are.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.models import bases, catalogue
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
"""46 MB in 16 bits. The head is tied, or rows of the embedding that no token names would be in nobody's memory."""
VARIANTS = (
    Variant(name="one", r=2), Variant(name="checkpointed", r=2, gradient_checkpointing=True),
    Variant(name="unfused", r=2, optimizer="adamw"), Variant(name="eager", r=2, attention="eager"),
    Variant(name="dora", r=2, use_dora=True), Variant(name="accumulating", r=2, gradient_accumulation=2),
)  # fmt: skip
SLACK = 0.05
"""Heaps of two processes that did the same are not alike to the page."""


def memory_of(pid):
    """Bytes of PSS of a process at its peak, of its mapping of a base among them, and of what of that is no page of the
    file any more."""
    status = dict(re.findall(r"(VmHWM|VmRSS):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()))
    total = 1024 * (int(status["VmHWM"]) - int(status["VmRSS"]))
    of_base = copied = 0
    base = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            base = rest.endswith(bases.TENSORS)
        elif found := re.fullmatch(r"(Pss|Anonymous): +(\d+) kB", line):
            size = 1024 * int(found[2])
            if found[1] == "Pss":
                total += size
                of_base += size * base
            else:
                copied += size * base
    return total, of_base, copied


def live(executor, study, variants, tokens, base):
    """Processes of variants that have built and taken their steps, all at once; closed by the caller."""
    contenders = [Contender(variant=variant, workload=study.workload) for variant in variants]
    plan = make_plan(study, contenders=contenders, phases=("train",), interleaving="lockstep")
    site = site_of(study.workload, tokens, "cpu")
    folders = {("", base_key(variant, study.workload)): base for variant in variants}
    site = dataclasses.replace(site, bases=folders)
    workers = []
    for slot in plan.groups[0].slots:
        worker = executor.launch()
        workers.append(worker)
        request = request_of(plan, slot, site, executor.make_place(slot.trial, slot.trial))
        for word, arguments in (
            ("prepare", {"request": codec.to_json(request)}),
            ("build", {}),
            ("turn", {"steps": 2}),
        ):
            fragment = worker.ask(word, slot.trial, 300, **arguments)
            assert fragment.status == "ok", fragment.failure
            if word == "build":
                assert fragment.values["base_conversions"] == (0.0 if base else 1.0)
    return workers


def taken(executor, workers):
    """Bytes of all processes together at their peaks, the zygote's among them; the base's part of them; what is copied
    of it."""
    found = [memory_of(worker.pid) for worker in workers]
    zygote = memory_of(executor._zygote.pid)[0]
    return sum(one[0] for one in found) + zygote, sum(one[1] for one in found), sum(one[2] for one in found)


def check(model, tmp_path, small_study):
    """Six live variants, and each of them alone."""
    workload = dataclasses.replace(small_study.workload, model=model)
    study = dataclasses.replace(
        small_study, workload=workload, variants=VARIANTS, reference="one",
        protocol=dataclasses.replace(small_study.protocol, replicates=1),
    )  # fmt: skip
    executor = LocalExecutor()
    executor.start(tmp_path, 1)
    try:
        executor.hello()
        tokens = executor.prepare_tokens(workload)
        base = executor.prepare_base(
            BaseRequest(workload=workload, variant=VARIANTS[0], device="cpu", threads=1, log_path="")
        )
        nobody = memory_of(executor._zygote.pid)[0]
        owned = 0
        for variant in VARIANTS:
            workers = live(executor, study, (variant,), tokens, base.path)
            total, of_base, copied = taken(executor, workers)
            assert copied == 0
            assert of_base <= base.bytes + 2**16
            owned += total - nobody - of_base
            workers[0].close()
        workers = live(executor, study, VARIANTS, tokens, base.path)
        total, of_base, copied = taken(executor, workers)
        for worker in workers:
            worker.close()
    finally:
        executor.close()
    assert copied == 0
    assert 0.9 * base.bytes <= of_base <= base.bytes + 2**16  # what no step has touched is in nobody's memory
    assert total - nobody <= base.bytes + (1 + SLACK) * owned
    assert len(VARIANTS) * base.bytes > base.bytes + SLACK * owned  # a base for each would not have passed


def test_six_variants_of_a_small_model_take_its_base_once(tmp_path, small_study):
    """Of random weights, so that it always runs."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    check(f"random:{tmp_path}", tmp_path, small_study)


@pytest.mark.selftest
def test_six_variants_of_a_real_model_take_its_base_once(tmp_path, small_study):
    """Of smollm2-135m, where it has been fetched."""
    try:
        catalogue.resolve("smollm2-135m")
    except UsageError as missing:
        pytest.skip(str(missing))
    check("smollm2-135m", tmp_path, small_study)
