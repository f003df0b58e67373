"""Measured peaks: above what any step reaches, and on a known GPU near the vendor's figure and not above it."""

from __future__ import annotations

import time

import pytest
import torch

from harness.errors import LorameterError
from harness.models import catalogue, shapes
from harness.models.costs.flops import computed_tokens, training_flops
from harness.models.costs.peaks import stated_peak
from harness.studies.variant import Variant
from harness.studies.workload import Workload
from harness.trial.building.base_model import load_base
from harness.trial.building.lora import attach
from harness.trial.profiling import peak
from harness.trial.profiling.peak import measured_bandwidth, measured_product

BOOST = 1.1
"""A GeForce card may clock above the boost that its figure is stated at; a data centre's card does not."""


def test_no_step_reaches_the_measured_peak():
    """A training step stays below the best product that was measured on this CPU, with equal threads and type."""
    torch.set_num_threads(1)
    variant, workload = Variant(r=4), Workload(batch_size=2, sequence_length=64)
    source = catalogue.resolve("tiny-llama")
    model = attach(load_base(source, variant, device="cpu", seed=0), variant).train()
    tokens = torch.randint(3, 120, (2, 64))
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        times.append(time.perf_counter() - begin)
    reached = training_flops(shapes.shape(source), variant, computed_tokens(variant, workload)).hardware / min(times)
    measured = measured_product("cpu", "bfloat16", tries=3)
    assert reached < measured.per_s, f"a step reached {reached:.3g} FLOP/s of {measured}"


def test_a_peak_says_how_it_was_measured(monkeypatch):
    """Threads, tries and sizes are in its source, and the process's own threads are as they were."""
    monkeypatch.setattr(peak, "CPU_SIZES", (64,))
    monkeypatch.setattr(peak, "CPU_COPY_BYTES", 2**20)
    before = torch.get_num_threads()
    product, memory = measured_product("cpu", "float32", threads=2, tries=2), measured_bandwidth("cpu", tries=2)
    assert torch.get_num_threads() == before
    assert (product.device, memory.device) == ("this CPU with 2 threads", "this CPU with 1 thread")
    assert product.source == "measured: best of 2 square products each of 64"
    assert memory.source == "measured: best of 2 copies and 2 sums of 1 MiB"
    assert product.per_s > 0
    assert memory.per_s > 0


@pytest.mark.parametrize("rate", ["tf32", "memory"])
def test_what_is_no_product_of_a_cpu(rate):
    """TF32 is a type of tensor cores, and memory none at all."""
    with pytest.raises(LorameterError, match=f"no product in {rate} on cpu"):
        measured_product("cpu", rate)


@pytest.mark.gpu
@pytest.mark.parametrize(("rate", "share"), [("bfloat16", 0.5), ("float16", 0.5), ("tf32", 0.5), ("float32", 0.6)])
def test_products_on_a_known_gpu(rate, share):
    """At least the stated share of the vendor's figure, and not more: a figure with sparsity would be twice as high."""
    stated = stated_peak(torch.cuda.get_device_name(), rate)
    if stated is None:
        pytest.skip(f"no figure for {rate} of {torch.cuda.get_device_name()}")
    limit = BOOST if "GeForce" in stated.device else 1.0
    if any(stated.device.endswith(name) for name in (" T4", " L4")):
        share = 0.3  # cards of 70 W throttle on products
    assert share <= measured_product("cuda", rate).per_s / stated.per_s <= limit


@pytest.mark.gpu
def test_copies_on_a_known_gpu():
    """At least 70 % of the vendor's bandwidth, and never more than it."""
    stated = stated_peak(torch.cuda.get_device_name(), "memory")
    if stated is None:
        pytest.skip(f"no figure for {torch.cuda.get_device_name()}")
    assert 0.7 <= measured_bandwidth("cuda").per_s / stated.per_s <= 1.0
