"""Tests of the memory fit: a workload fits if the upper end of its range does, and the largest that fits is maximal.

Tests of the advice on memory: which study keys to change, ordered by how much each lowers the estimate.

Tests of the forecast, which uses two timed layers, formulas and earlier runs, and names its basis.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib

import pytest

from lorameter.errors import UsageError
from lorameter.models import catalogue, shapes
from lorameter.models.costs.peaks import find_gpu
from lorameter.run.forecast import forecast, half_width, live_group_bytes, measured_peaks, needed_bytes
from lorameter.run.memory_fit import Fitter, advise, on_gpu, on_machine
from lorameter.run.plan import Arm, make_plan
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import MAX_BATCH, Workload

GIB = 2**30
LORA = LoraVariant(name="lora", r=16)
QLORA = dataclasses.replace(LORA, name="qlora", quantization="nf4", gradient_checkpointing=True)
WIDE = Workload(batch_size=6, sequence_length=1024)


@pytest.fixture
def fitter(machine):
    """A function that makes a fitter of a model and a GPU, or of this machine with the given memory."""

    def make(model, gpu=None, memory_bytes=None):
        if gpu is None:
            device = on_machine(dataclasses.replace(machine, memory_bytes=memory_bytes or machine.memory_bytes), None)
        else:
            device = on_gpu(machine, find_gpu(gpu))
        shape = shapes.shape(catalogue.resolve(f"random:{model}"))
        return Fitter(device=device, shape=shape, process_bytes=None)

    return make


@pytest.mark.parametrize(("model", "gpu", "variant", "status"), [
    ("llama2-7b", "24GiB", LORA, "does-not-fit"), ("llama2-7b", "24GiB", QLORA, "fits"),
    ("llama2-7b", "RTX 4090", QLORA, "fits"), ("llama2-7b", "80GB", LORA, "may-not-fit"),
    ("llama2-7b", "H200", LORA, "fits"), ("llama2-70b", "H100", LORA, "does-not-fit"),
    ("llama2-70b", "H100", QLORA, "fits"), ("llama2-70b", "L40S", QLORA, "does-not-fit"),
    ("mistral-7b", "24GiB", LORA, "does-not-fit"), ("mistral-7b", "24GiB", QLORA, "fits"),
    ("qwen2.5-7b", "24GiB", LORA, "does-not-fit"), ("gemma-7b", "24GiB", LORA, "does-not-fit"),
])  # fmt: skip
def test_memory_fit_on_an_absent_gpu(fitter, model, gpu, variant, status):
    """For real shapes and six sequences of 1024 tokens, LoRA keeps all activations and checkpointed NF4 keeps few."""
    fit = fitter(model, gpu)
    assert fit.device.machine.device == "cuda"
    assert fit.status(fit.needs(variant, WIDE)) == status


@pytest.mark.parametrize("key", ["batch_size", "sequence_length"])
@pytest.mark.parametrize(("model", "gpu", "variant"), [
    ("llama2-7b", "24GiB", QLORA), ("llama2-7b", "H200", LORA), ("mistral-7b", "24GiB", QLORA),
    ("llama2-70b", "H100", QLORA), ("gemma-7b", "L40S", QLORA), ("smollm2-135m", None, LORA),
    ("tiny-llama", None, LORA),
])  # fmt: skip
def test_the_largest_size_fits_and_the_next_does_not(fitter, model, gpu, variant, key):
    """The size is limited by memory, the model or the study."""
    fit = fitter(model, gpu)
    workload = Workload(batch_size=2, sequence_length=512)
    found = fit.largest(variant, workload, key)

    def status(size):
        return fit.status(fit.needs(variant, dataclasses.replace(workload, **{key: size})))

    assert status(found.value) == "fits"
    if found.bound == "memory":
        assert status(found.value + 1) != "fits"
    else:
        assert found.value in (fit.shape.context, MAX_BATCH)


def test_only_free_memory_of_this_machine_counts(machine):
    """The free memory counts, up to the total; assumptions about GPUs are left out."""
    device = on_machine(machine, 3 * GIB)
    assert (device.usable_bytes, device.total_bytes, device.assumed) == (3 * GIB, machine.memory_bytes, ())
    assert on_machine(machine, 2**60).usable_bytes == machine.memory_bytes
    gpu = dataclasses.replace(machine, device="cuda", device_name="GPU", device_memory_bytes=24 * GIB)
    assert on_machine(gpu, None).usable_bytes == 24 * GIB
    with pytest.raises(UsageError, match=r"not known.*--gpu"):
        on_machine(dataclasses.replace(gpu, device_memory_bytes=None), None)


@pytest.fixture
def advice(machine):
    """A function that advises on a variant of a model on a GPU or on this machine."""

    def make(variant, workload=WIDE, *, model="llama2-7b", gpu="24GiB", **options):
        device = on_machine(machine, None) if gpu is None else on_gpu(machine, find_gpu(gpu))
        shape = shapes.shape(catalogue.resolve(f"random:{model}"))
        return advise(
            Fitter(device=device, shape=shape, process_bytes=None), variant, workload, **options
        )  # fmt: skip

    return make


def apply_lines(variant, workload, lines):
    """Return variant and workload with these study lines applied."""
    for key, value in tomllib.loads("\n".join(lines)).items():
        owner = workload if key == "batch_size" else variant
        changed = dataclasses.replace(owner, **{key: value})
        variant, workload = (variant, changed) if key == "batch_size" else (changed, workload)
    return variant, workload


CASES = [
    (LORA, "llama2-7b", "24GiB"), (LORA, "llama2-70b", "H100"), (LORA, "gemma-7b", "RTX 4090"),
    (LoraVariant(r=512, dtype="float32"), "mistral-7b", "24GiB"), (LoraVariant(r=64), "qwen2.5-7b", "T4"),
    (LoraVariant(quantization="nf4", prepare_for_kbit=True, autocast="bfloat16"), "llama2-13b", "24GiB"),
    (LoraVariant(quantization="int8", r=256), "llama2-13b", "A100 40GB"), (LORA, "llama2-7b", None),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "model", "gpu"), CASES)
def test_each_change_makes_a_variant_with_the_stated_estimate(advice, variant, model, gpu):
    """Each line is valid in a study, frees as much as the estimate falls, and the largest change is first."""
    found = advice(variant, model=model, gpu=gpu)
    assert found.options
    for option in found.options:
        alone = advice(*apply_lines(variant, WIDE, [option.writes]), model=model, gpu=gpu)
        assert alone.needs == option.needs
        assert alone.status == option.status
        assert option.freed_bytes == found.needs.expected_bytes - option.needs.expected_bytes > 0
        assert (option.table == "workload") is option.writes.startswith("batch_size")
    freed = [option.freed_bytes for option in found.options]
    assert freed == sorted(freed, reverse=True)


@pytest.mark.parametrize(("variant", "model", "gpu"), CASES)
def test_the_suggested_changes_are_needed_and_sufficient(advice, variant, model, gpu):
    """Every change of a suggested set is needed, and no single change is enough where several are suggested."""
    found = advice(variant, model=model, gpu=gpu)
    assert found.status != "fits"
    if found.turn is None:
        everything = apply_lines(variant, dataclasses.replace(WIDE, batch_size=1), [
            option.writes for option in found.options if option.table == "variant"
        ])  # fmt: skip
        assert advice(*everything, model=model, gpu=gpu).status != "fits"
        return
    assert advice(*apply_lines(variant, WIDE, found.turn), model=model, gpu=gpu).status == "fits"
    for dropped in found.turn:
        fewer = [line for line in found.turn if line != dropped]
        assert advice(*apply_lines(variant, WIDE, fewer), model=model, gpu=gpu).status != "fits"
    if len(found.turn) > 1:
        assert all(option.status != "fits" for option in found.options)


def test_several_ranks_are_refused(advice):
    """The memory of each rank of a sharded model is not estimated."""
    with pytest.raises(UsageError, match="ranks = 2"):
        advice(LORA, Workload(ranks=2, strategy="ddp", batch_size=4))


def test_the_time_on_another_machine_is_unknown(small_study, machine, tmp_path):
    """The time is unknown; memory and disk are still forecast."""
    expected = forecast(make_plan(small_study), dataclasses.replace(machine, device="cuda"), tmp_path)
    assert expected.time_s is None
    assert "not timed on other machines" in expected.basis
    assert expected.memory_bytes > 0 < expected.disk_bytes


def test_a_limit_gives_replicates_and_the_width_of_the_intervals(small_study, machine, tmp_path):
    """A shorter limit gives fewer replicates or skips other measurements, and gives wider intervals; the forecast never
    exceeds the limit."""

    def predict(minutes):
        protocol = dataclasses.replace(small_study.protocol, max_minutes=minutes, replicates=12)
        study = dataclasses.replace(small_study, protocol=protocol)
        return forecast(make_plan(study, interleaving="lockstep"), machine, tmp_path, object())

    ample, some, few, none = (predict(minutes) for minutes in (1000.0, 1.0, 0.6, 0.1))
    assert (ample.replicates, ample.skipped) == (12, ())
    assert 1 < few.replicates <= some.replicates < 12
    assert some.half_width > ample.half_width > 0
    assert set(few.skipped) >= set(some.skipped)
    assert some.time_s <= 60
    assert few.time_s <= 36
    assert "assumed scatter" in ample.noise
    assert ample.sought_width_s > 0
    assert (none.replicates, none.time_s) == (0, None)
    assert "not even one fits" in none.basis


def test_half_widths_use_a_pooled_scatter(small_study):
    """For a scatter of 2 %, 5 replicates, one variant and the control, the widths equal tabulated t and Dunnett
    values."""
    plan = make_plan(small_study)
    assert half_width(0.02, 1, plan) is None
    # Two comparisons share 4 + 3 degrees of freedom; t at 97.5 % is 2.365.
    assert math.log1p(half_width(0.02, 5, plan)) == pytest.approx(2.365 * 0.02 / math.sqrt(5), rel=1e-3)


def test_more_replicates_take_longer(small_study, machine, tmp_path):
    """The time scales with the trials, and quantisation lowers the memory."""
    longer = small_study.with_overrides(replicates=8)
    short, long = (
        forecast(make_plan(s, phases=("train", "generate")), machine, tmp_path, object()) for s in (small_study, longer)
    )
    assert long.time_s > 2 * short.time_s
    plain_cpu = dataclasses.replace(machine, avx512_bf16=False)  # 4-bit weights are not repacked on this CPU
    big = dataclasses.replace(small_study, workload=dataclasses.replace(small_study.workload, model="random:llama2-7b"))
    plain, nf4 = (
        forecast(make_plan(dataclasses.replace(big, variants=(v,), reference=v.name)), plain_cpu, tmp_path).memory_bytes
        for v in big.variants
    )
    assert nf4 < plain / 2


def test_a_base_mapped_by_live_processes_counts_once(small_study, machine):
    """On a CPU a mapped base counts once, plus each process's casts; a GPU, or a process that rewrites the base, has a
    copy for each."""
    workload = dataclasses.replace(small_study.workload, model="random:llama2-7b")
    base = 6_738_415_616 * 2

    def total(*variants, machine=machine):
        arms = [Arm(variant=variant, workload=workload) for variant in variants]
        return live_group_bytes(arms, needed_bytes(arms, machine, None), machine, forked=False)

    def bytes_saved_by_sharing(variant, machine=machine):
        return 6 * total(variant, machine=machine) - total(*[variant] * 6, machine=machine)

    plain, nf4 = small_study.variants
    assert bytes_saved_by_sharing(plain) == 5 * base
    assert bytes_saved_by_sharing(plain, dataclasses.replace(machine, device="cuda")) == 0
    assert bytes_saved_by_sharing(dataclasses.replace(plain, init_lora_weights="olora")) == 0
    embeddings = 2 * (2 * 32_000 + 65) * 4096  # embeddings and norms
    prepared = dataclasses.replace(nf4, prepare_for_kbit=True)
    assert bytes_saved_by_sharing(nf4) - bytes_saved_by_sharing(prepared) == 5 * embeddings
    half = dataclasses.replace(plain, name="half", dtype="float16")
    assert 2 * total(plain) + total(half) - total(plain, half, plain) == base


def test_peaks_of_another_workload_are_not_used(small_study, machine, tmp_path, write_run):
    """A peak of a variant with its own workload is not used for the study's workload."""
    same = dataclasses.replace(small_study.variants[0], name="larger")
    own = {"larger": dataclasses.replace(small_study.workload, batch_size=64)}
    study = dataclasses.replace(small_study, variants=(small_study.variants[0], same))

    def larger(record):
        return record.replaced(memory={"host_peak_train_bytes": 9 * 2**30}) if record.name == "larger" else record

    write_run("run", {"plain": [0.1], "larger": [0.2]}, study=study, own_workloads=own, change=larger)
    peaks = measured_peaks(small_study.workload, machine, tmp_path / "runs", "host_peak_train_bytes")
    assert peaks == {same.id: 2**20}
    peaks = measured_peaks(own["larger"], machine, tmp_path / "runs", "host_peak_train_bytes")
    assert peaks == {same.id: 9 * 2**30}
