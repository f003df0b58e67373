"""Several ranks in a study: what is refused before anything starts, and what need not be said."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest

from lorameter.errors import UsageError
from lorameter.machine.gpus import VisibleCard
from lorameter.machine.reading import Reading, missing
from lorameter.run.build_plan import build_plan
from lorameter.run.feasibility import check_feasible, processes_on_device
from lorameter.run.interleaving import choose_interleaving
from lorameter.run.plan import make_plan
from lorameter.studies.study_file import load_study
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload

DDP = {"ranks": 2, "strategy": "ddp"}
FSDP2 = {"ranks": 2, "strategy": "fsdp2"}


def refusal(**changes):
    with pytest.raises(UsageError) as raised:
        Workload(**changes)
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": 2}, 'Write strategy = "ddp" or "fsdp2"'),
        ({"strategy": "ddp"}, "there is one rank"),
        ({**DDP, "batch_size": 3}, "batch_size = 3, ranks = 2: the batch is that of all ranks"),
        ({**DDP, "repair": "quant_state"}, 'it is for strategy = "fsdp2"'),
        ({"ranks": 0}, "ranks"),
    ],
)
def test_a_workload_that_ranks_cannot_share_is_refused(changes, words):
    """With the key, its value and the remedy."""
    assert words in refusal(**changes)


def test_a_study_of_ranks_trains_and_need_not_say_so(tmp_path):
    """Its phases are training alone, and asking for another is refused."""
    path = tmp_path / "two.toml"
    path.write_text('[workload]\nranks = 2\nstrategy = "ddp"\n[[variant]]\nname = "plain"\n')
    study = load_study(str(path))
    assert study.protocol.phases == ("train",)
    assert {measure for slot in make_plan(study, phases=("train",)).slots for measure in slot.measures} == {
        "steps", "peaks",
    }  # fmt: skip
    with pytest.raises(UsageError, match="training is measured and nothing else"):
        make_plan(study, phases=("train", "generate"))


def of_ranks(study, **changes):
    variants = tuple(dataclasses.replace(one, **changes) for one in study.variants[:1])
    workload = dataclasses.replace(study.workload, **FSDP2)
    protocol = dataclasses.replace(study.protocol, phases=("train",))
    return dataclasses.replace(study, workload=workload, protocol=protocol, variants=variants)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization": "int8"}, "FSDP2 does not shard the weights of LLM.int8"),
        ({"optimizer": "paged_adamw_32bit"}, "take no sharded parameters"),
        ({"compile": True}, "ranks are measured without it"),
        ({"init_lora_weights": "olora"}, "it rewrites the base"),
    ],
)
def test_a_variant_that_ranks_cannot_train_is_refused(small_study, machine, changes, words):
    """Before a model is loaded."""
    with pytest.raises(UsageError, match=words):
        check_feasible(of_ranks(small_study, **changes), machine)


def test_more_ranks_than_cards_are_refused(small_study, machine, monkeypatch):
    """Two ranks on one GPU would measure each other."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UsageError, match=r"ranks = 2: 1 GPU is to be had here"):
        check_feasible(of_ranks(small_study), dataclasses.replace(machine, device="cuda"))


@pytest.mark.parametrize(
    ("boards", "shared"),
    [
        (("one", "two"), None),
        (("one", "one"), "MIG-0 and MIG-1"),
        (("one", "one", "two"), "MIG-0 and MIG-1"),
        (("one", "two", "two"), None),
        ((None, None), None),
    ],
)
def test_ranks_on_parts_of_one_card_are_refused(small_study, machine, monkeypatch, boards, shared):
    """The first of the visible ones are theirs, whatever others there are; what is not told is not guessed."""
    cards = tuple(
        VisibleCard(
            entry=f"MIG-{n}", name=Reading(value="1g.10gb"), power_limit_w=missing("not told"),
            board=missing("not told") if board is None else Reading(value=board),
        )
        for n, board in enumerate(boards)
    )  # fmt: skip
    monkeypatch.setattr("lorameter.run.feasibility.visible_cards", lambda: Reading(value=cards))
    there = dataclasses.replace(machine, device="cuda")
    with (
        pytest.raises(UsageError, match=f"ranks = 2: {shared} are parts of one GPU")
        if shared
        else contextlib.nullcontext()
    ):
        check_feasible(of_ranks(small_study), there)
    study = of_ranks(small_study)  # whose sites name the GPUs: they are judged where those are known
    protocol = dataclasses.replace(study.protocol, sites=("2+3",))
    check_feasible(dataclasses.replace(study, protocol=protocol), there)


@pytest.mark.parametrize(
    ("torch", "can"), [("2.11.0+cu130", False), ("2.12.0", True), ("2.13.0+cpu", True), ("3.0", True)]
)
def test_four_bits_need_a_torch_that_shards_integers(small_study, machine, torch, can, monkeypatch):
    """Refused before a model is loaded, with what would do; float weights are sharded by every torch."""
    monkeypatch.setattr("lorameter.run.feasibility.library_version", {"torch": torch}.get)
    check_feasible(of_ranks(small_study), machine)
    with (
        contextlib.nullcontext()
        if can
        else pytest.raises(UsageError, match=r"shards no integers.*torch 2\.12 or later")
    ):
        check_feasible(of_ranks(small_study, quantization="nf4"), machine)


def test_four_bits_under_fsdp2_are_said_to_be_checked_or_mended(small_study, machine, monkeypatch):
    """A notice before the run, which names the repair or says that it is in force."""
    monkeypatch.setattr("lorameter.run.feasibility.library_version", {"torch": "2.13.0"}.get)
    study = of_ranks(small_study, quantization="nf4")
    codes = {notice.code: notice.remedy for notice in check_feasible(study, machine)}
    assert 'repair = "quant_state"' in codes["ranks-fsdp2-4bit"]
    mended = dataclasses.replace(study, workload=dataclasses.replace(study.workload, repair="quant_state"))
    assert "bitsandbytes-fsdp2-patched" in {notice.code for notice in check_feasible(mended, machine)}


def test_ranks_share_no_base_with_other_trials(small_study, machine):
    """Adapters of one base have one process, and a rank is a process of its own."""
    variants = (LoraVariant(name="a", r=4), LoraVariant(name="b", r=8))
    level, why = choose_interleaving(variants, together_bytes=1, free_bytes=100, ranks=2)
    assert (level, why.split(",")[0]) == ("lockstep", "a trial has 2 ranks")
    workload = dataclasses.replace(small_study.workload, **DDP)
    study = dataclasses.replace(small_study, workload=workload)
    plan, _ = build_plan(study, machine, free_bytes=2**40, phases=("train",))
    assert plan.interleaving == "lockstep"


def test_memory_counts_every_process_on_a_device():
    """On a CPU all ranks and the one beside them; on a GPU one rank, and the one beside them on the first."""
    workload = Workload(**DDP)
    assert [processes_on_device(workload, device) for device in ("cpu", "cuda")] == [3, 2]
    assert processes_on_device(dataclasses.replace(workload, scaling=False), "cpu") == 2
    assert processes_on_device(Workload(), "cpu") == 1
