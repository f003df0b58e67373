"""Tests of several ranks in a study: refusals before anything starts, and defaults."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest

from lorameter.errors import UsageError
from lorameter.run.feasibility import check_feasible
from lorameter.run.plan import make_plan
from lorameter.studies.study_file import load_study
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
    """The error has the key, its value and the remedy."""
    assert words in refusal(**changes)


def test_training_is_the_only_phase_of_a_study_of_ranks(tmp_path):
    """Its only phase is training, and any other phase is refused."""
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
    """The error comes before a model is loaded."""
    with pytest.raises(UsageError, match=words):
        check_feasible(of_ranks(small_study, **changes), machine)


def test_more_ranks_than_gpus_are_refused(small_study, machine, monkeypatch):
    """Two ranks on one GPU would disturb each other."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UsageError, match=r"ranks = 2: 1 GPU is available here"):
        check_feasible(of_ranks(small_study), dataclasses.replace(machine, device="cuda"))


@pytest.mark.parametrize(
    ("torch", "can"), [("2.11.0+cu130", False), ("2.12.0", True), ("2.13.0+cpu", True), ("3.0", True)]
)
def test_four_bits_need_a_torch_that_shards_integers(small_study, machine, torch, can, monkeypatch):
    """The error comes before a model is loaded and names the needed version; every torch version shards float
    weights."""
    monkeypatch.setattr("lorameter.run.feasibility.library_version", {"torch": torch}.get)
    check_feasible(of_ranks(small_study), machine)
    with (
        contextlib.nullcontext()
        if can
        else pytest.raises(UsageError, match=r"shards no integers.*torch 2\.12 or later")
    ):
        check_feasible(of_ranks(small_study, quantization="nf4"), machine)
