"""Tests of the forecast, which uses two timed layers, formulas and earlier runs, and names its basis."""

import dataclasses
import math

import pytest

from lorameter.run.forecast import forecast, measured_peaks, together_bytes
from lorameter.run.forecast_time import half_width
from lorameter.run.plan import make_plan


def test_the_time_on_another_machine_is_unknown(small_study, machine, tmp_path):
    """The time is unknown; memory and disk are still forecast."""
    expected = forecast(make_plan(small_study), dataclasses.replace(machine, device="cuda"), tmp_path)
    assert expected.time.time_s is None
    assert "not timed on other machines" in expected.time.basis
    assert expected.memory_bytes > 0 < expected.disk_bytes


def test_a_limit_gives_replicates_and_the_width_of_the_intervals(small_study, machine, tmp_path):
    """A shorter limit gives fewer replicates or skips other measurements, and gives wider intervals; the forecast never
    exceeds the limit."""

    def predict(minutes):
        protocol = dataclasses.replace(small_study.protocol, max_minutes=minutes, replicates=12)
        study = dataclasses.replace(small_study, protocol=protocol)
        return forecast(make_plan(study, interleaving="lockstep"), machine, tmp_path, object()).time

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


def test_half_widths_are_those_of_shared_scatter(small_study):
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
    assert long.time.time_s > 2 * short.time.time_s
    plain_cpu = dataclasses.replace(machine, avx512_bf16=False)  # 4-bit weights are not repacked on this CPU
    big = dataclasses.replace(small_study, workload=dataclasses.replace(small_study.workload, model="random:llama2-7b"))
    plain, nf4 = (
        forecast(make_plan(dataclasses.replace(big, variants=(v,), reference=v.name)), plain_cpu, tmp_path).memory_bytes
        for v in big.variants
    )
    assert nf4 < plain / 2


def test_live_processes_count_a_base_that_they_map_once(small_study, machine):
    """On a CPU a mapped base counts once, plus each process's casts; a GPU, or a process that rewrites the base, has a
    copy for each."""
    workload = dataclasses.replace(small_study.workload, model="random:llama2-7b")
    base = 6_738_415_616 * 2

    def together(variant, machine=machine):
        one, six = (together_bytes([variant] * count, workload, machine, None, forked=False) for count in (1, 6))
        return 6 * one - six

    plain, nf4 = small_study.variants
    assert together(plain) == 5 * base
    assert together(plain, dataclasses.replace(machine, device="cuda")) == 0
    assert together(dataclasses.replace(plain, init_lora_weights="olora")) == 0
    embeddings = 2 * (2 * 32_000 + 65) * 4096  # embeddings and norms
    assert together(nf4) - together(dataclasses.replace(nf4, prepare_for_kbit=True)) == 5 * embeddings
    half = dataclasses.replace(plain, dtype="float16")
    several = together_bytes([plain, half, plain], workload, machine, None, forked=False)
    singly = sum(together_bytes([variant], workload, machine, None, forked=False) for variant in (plain, half, plain))
    assert singly - several == base


def test_peaks_of_another_workload_are_not_this_one_s(small_study, machine, tmp_path, write_run):
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
