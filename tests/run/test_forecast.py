"""The forecast rests on an earlier run or on this machine, and says on which."""

import dataclasses

import pytest

from harness.machine.provenance import free_bytes, library_version, probe_machine
from harness.machine.reading import Reading, missing
from harness.machine.system import memory_bytes
from harness.models import catalogue, shapes
from harness.models.costs.lora import adapter_parameters
from harness.models.costs.memory import birth_bytes, estimate_memory, passing_bytes
from harness.records import codec, store
from harness.records.metrics import BIRTH
from harness.run.forecast import forecast, measured_peaks, process_bytes, together_bytes
from harness.run.plan import make_plan
from harness.studies.variant import Variant


@pytest.mark.parametrize(
    ("model", "variant", "count"),
    [
        # Hand-derived: 32 layers; q and v are 4096 × 4096, so 2 × 64 × 8192 a layer.
        ("random:llama2-7b", Variant(r=64, target_modules=()), 32 * 2 * 64 * 8192),
        # all-linear adds k, o (8192 each) and gate, up, down (4096 + 11008 each).
        ("random:llama2-7b", Variant(r=16), 32 * 16 * (4 * 8192 + 3 * 15104)),
        # 4 layers; q, o 256 + 256 and k, v 256 + 128 each, gate, up, down 256 + 704 each. PEFT counts the same, 299008.
        ("tiny-llama", Variant(r=16), 4 * 16 * (2 * 512 + 2 * 384 + 3 * 960)),
    ],
)
def test_adapter_parameters_are_exact(model, variant, count):
    """r (in + out) for each targeted layer."""
    assert adapter_parameters(variant, shapes.shape(catalogue.resolve(model))) == count


def test_a_gpu_without_history_is_not_guessed(small_study, machine, tmp_path):
    """Unknown is an answer; memory and disk are still given."""
    expected = forecast(make_plan(small_study), dataclasses.replace(machine, device="cuda"), tmp_path)
    assert expected.time_s is None
    assert "no earlier run" in expected.basis
    assert expected.memory_bytes > 0 < expected.disk_bytes


def test_a_limit_is_what_a_run_takes_at_most(small_study, machine, tmp_path):
    """It is said what all that is planned would take without it; a run that ends before is no longer for it."""
    whole = forecast(make_plan(small_study), machine, tmp_path)
    limited = dataclasses.replace(small_study.protocol, max_minutes=whole.time_s / 120)
    found = forecast(make_plan(dataclasses.replace(small_study, protocol=limited)), machine, tmp_path)
    assert found.time_s == pytest.approx(whole.time_s / 2, rel=0.2)
    assert found.basis.startswith("the limit of")
    assert "all that is planned would take" in found.basis
    ample = dataclasses.replace(small_study.protocol, max_minutes=1000)
    assert "limit" not in forecast(make_plan(dataclasses.replace(small_study, protocol=ample)), machine, tmp_path).basis
    card = dataclasses.replace(machine, device="cuda")
    assert forecast(make_plan(dataclasses.replace(small_study, protocol=ample)), card, tmp_path).time_s == 60_000


def test_more_replicates_take_longer(small_study, machine, tmp_path):
    """The time scales with the trials, and quantisation lowers the memory."""
    longer = small_study.with_overrides(replicates=8)
    short, long = (
        forecast(make_plan(s, phases=("train", "generate")), machine, tmp_path) for s in (small_study, longer)
    )
    assert long.time_s > 2 * short.time_s
    plain_cpu = dataclasses.replace(machine, avx512_bf16=False)  # where 4-bit weights are not repacked
    big = dataclasses.replace(small_study, workload=dataclasses.replace(small_study.workload, model="random:llama2-7b"))
    plain, nf4 = (
        forecast(make_plan(dataclasses.replace(big, variants=(v,), reference=v.name)), plain_cpu, tmp_path).memory_bytes
        for v in big.variants
    )
    assert nf4 < plain / 2


def test_a_plan_counts_the_process_of_what_torch_is_built_for(small_study, machine, tmp_path):
    """A build for CUDA takes more of the host, also where there is no card."""
    plan = make_plan(small_study)
    plain, built = (
        forecast(plan, dataclasses.replace(machine, cuda=cuda), tmp_path).memory_bytes for cuda in (None, "13.0")
    )
    assert (built - plain) % (birth_bytes("13.0") - birth_bytes(None)) == 0 < built - plain


def test_a_plan_and_its_level_speak_of_the_same_memory(small_study, machine, tmp_path, write_run):
    """Both go by the peaks of an earlier run where it measured a variant, and by the estimate of the others."""
    write_run("run", {"plain": [0.1]}, peak=3 * 2**30)
    machine, runs = dataclasses.replace(machine, device_name="Test CPU"), tmp_path / "runs"
    plan = make_plan(small_study, interleaving="lockstep")
    members = [contender.variant for contender in plan.contenders]
    expected = forecast(plan, machine, runs).memory_bytes
    assert expected == together_bytes(members, small_study.workload, machine, runs) > 6 * 2**30


def test_live_processes_count_a_base_that_they_map_once(small_study, machine):
    """On a CPU, without what each casts for itself; a GPU has a copy for each, as has a process that rewrites it."""
    workload = dataclasses.replace(small_study.workload, model="random:llama2-7b")
    base = 6_738_415_616 * 2

    def together(variant, machine=machine):
        one, six = (together_bytes([variant] * count, workload, machine, None) for count in (1, 6))
        return 6 * one - six

    plain, nf4 = small_study.variants
    assert together(plain) == 5 * base
    assert together(plain, dataclasses.replace(machine, device="cuda")) == 0
    assert together(dataclasses.replace(plain, init_lora_weights="olora")) == 0
    embeddings = 2 * (2 * 32_000 + 65) * 4096  # and the norms
    cast, shape = dataclasses.replace(nf4, prepare_for_kbit=True), shapes.shape(catalogue.resolve(workload.model))
    assert together(nf4) - together(cast) == 5 * embeddings
    assert together(cast) == 5 * sum(
        estimate_memory(cast, workload, shape).kinds[kind] for kind in ("linear_weights", "quantization_state")
    )
    half = dataclasses.replace(plain, dtype="float16")
    several = together_bytes([plain, half, plain], workload, machine, None)
    apart = sum(together_bytes([variant], workload, machine, None) for variant in (plain, half, plain))
    assert apart - several == base


def test_logits_count_for_as_many_as_compute_at_once(small_study, machine):
    """Of live processes on a CPU: their blocks are so large that malloc gives them back; smaller ones it may keep, and
    where requests take as much as a step nothing of it is free for others."""
    plain = small_study.variants[0]
    large = dataclasses.replace(small_study.workload, model="random:llama2-7b", batch_size=4, sequence_length=128)

    def saved(workload, machine):
        one, two, six = (together_bytes([plain] * count, workload, machine, None) for count in (1, 2, 6))
        return 6 * one - six - 5 * (2 * one - two)  # what is mapped once is saved for each but the first as well

    each = 3 * 4 * 4 * 128 * 32_000
    assert saved(large, machine) == 4 * each
    assert saved(large, dataclasses.replace(machine, cpus=3)) == 3 * each
    assert saved(large, dataclasses.replace(machine, device="cuda")) == 0
    assert saved(dataclasses.replace(large, batch_size=1), machine) == 0
    assert saved(dataclasses.replace(large, request_batch=64, prompt_tokens=4096), machine) == 0


def test_logits_that_are_no_part_of_a_peak_are_not_taken_off_it(small_study):
    """Of a step that recomputes its blocks the highest moment may come after them."""
    workload = dataclasses.replace(small_study.workload, batch_size=64, sequence_length=4096)
    shape = shapes.shape(catalogue.resolve("random:llama2-7b"))
    plain = small_study.variants[0]
    again = dataclasses.replace(plain, gradient_checkpointing=True)
    assert "logits" not in estimate_memory(again, workload, shape).kinds
    assert passing_bytes(again, workload, shape) == 0 < passing_bytes(plain, workload, shape)


def test_what_is_free_is_what_a_container_leaves(machine, monkeypatch):
    """The machine's own free memory is of no use to a process that is killed at its limit."""
    monkeypatch.setattr("harness.machine.provenance.memory_available_bytes", lambda: Reading(value=2**30))
    assert free_bytes(machine) == 2**30
    monkeypatch.setattr(
        "harness.machine.provenance.memory_available_bytes", lambda: missing("there is no /proc/meminfo")
    )
    assert free_bytes(machine) is None


def test_the_memory_of_a_machine_is_what_this_process_may_have(monkeypatch):
    """A study that a container's limit has no room for is refused by the same number."""
    assert 0 < probe_machine().memory_bytes == memory_bytes().value
    monkeypatch.setattr("harness.machine.provenance.memory_bytes", lambda: Reading(value=2**30))
    assert probe_machine().memory_bytes == 2**30


def test_peaks_of_another_workload_are_not_this_one_s(small_study, machine, tmp_path, write_run):
    """What an earlier run measured of a variant on a workload of its own is that workload's, and not the study's."""
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


def test_an_earlier_run_says_how_long(small_study, machine, tmp_path, write_run):
    """What its trials took is measured; the pause of one that was gone on with is not what measuring takes."""

    def later(record):
        return record.replaced(started_unix_s=1000.0 * record.replicate + record.position)

    plan, runs = make_plan(small_study, phases=("train",)), tmp_path / "runs"
    write_run("run", {"plain": [0.1, 0.1], "nf4": [0.2, 0.2]}, change=later)
    found = forecast(plan, machine, runs)
    assert found.basis == "replicates of run run"
    path = runs / "run" / "manifest.json"
    again = store.Resumption(unix_s=1.0, harness=None, commit=None)
    path.write_text(codec.dumps(dataclasses.replace(store.read_manifest(path.parent), resumed=(again,))))
    assert forecast(plan, machine, runs) == found
    assert found.time_s < 100


def test_a_process_begins_with_what_the_latest_run_with_these_libraries_measured(write_run, tmp_path, machine):
    """The largest of its trials; of other libraries or another machine it says nothing, and then torch's build does."""
    here = {name: library_version(name) for name in ("torch", "transformers")}

    def begun_with(size):
        return lambda record: dataclasses.replace(record, memory={**record.memory, BIRTH: size})

    for cuda in (None, "13.0"):
        built = dataclasses.replace(machine, cuda=cuda)
        assert process_bytes(built, tmp_path / "runs") == birth_bytes(cuda)
    write_run("20260101", {"plain": [0.1, 0.1]}, facts={"libraries": here}, change=begun_with(300))
    assert process_bytes(machine, tmp_path / "runs") == 300
    write_run("20260102", {"plain": [0.1]}, facts={"libraries": here | {"torch": "0.1"}}, change=begun_with(400))
    write_run("20260103", {"plain": [0.1]}, facts={"device_name": "Other"}, change=begun_with(500))
    write_run("20260104", {"plain": [0.1]}, facts={"libraries": here})
    assert process_bytes(machine, tmp_path / "runs") == 300
