"""Tests that infeasible settings are refused before a model is loaded."""

import dataclasses
import re
from pathlib import Path

import pytest

from lorameter.errors import UsageError
from lorameter.run.feasibility import check_feasible
from lorameter.studies.engine import Engine
from lorameter.studies.script_study import study_of_engine
from lorameter.studies.study_file import load_study


def with_variant(study, **changes):
    return dataclasses.replace(study, variants=(dataclasses.replace(study.variants[0], **changes),))


def with_workload(study, **changes):
    return dataclasses.replace(study, workload=dataclasses.replace(study.workload, **changes))


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_this_device_lacks_is_refused(small_study, machine, attention):
    """The error names study, variant, key, value and an alternative."""
    with pytest.raises(UsageError) as caught:
        check_feasible(with_variant(small_study, attention=attention), machine)
    for word in ("small", "'plain'", f"attention = '{attention}'", "CPU", "sdpa"):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["liger-kernel", "flash-attention"])
def test_an_engine_that_needs_a_gpu_is_refused_on_a_cpu(machine, name):
    """The error is one sentence, also for a script; a dry run gives a notice instead."""
    study = load_study(name)
    script = study_of_engine(study, "python train.py {--flag}", cwd=str(Path(__file__).parent))
    for one in (study, script):
        with pytest.raises(UsageError) as caught:
            check_feasible(one, machine)
        assert re.fullmatch(rf"study {name}: [^.]* runs on a GPU only [^.]*\.", str(caught.value))
    assert [one.code for one in check_feasible(study, machine, shown_only=True)] == ["needs-gpu"]


def test_a_width_that_blocks_do_not_divide_is_refused(small_study, machine, tmp_path):
    """The check applies only to CPUs with AVX512-BF16 and to 4-bit layers."""
    import json

    config = {
        "model_type": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 300,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    study = with_workload(with_variant(small_study, quantization="nf4"), model=f"random:{tmp_path}")
    with pytest.raises(UsageError, match="hidden_size is 96"):
        check_feasible(study, machine)
    check_feasible(study, dataclasses.replace(machine, avx512_bf16=False))
    check_feasible(with_variant(study, quantization="none"), machine)


@pytest.mark.parametrize("change", [{"sequence_length": 4096}, {"prompt_tokens": 2000, "new_tokens": 200}])
def test_more_tokens_than_the_context_are_refused(small_study, machine, change):
    """The context of tiny-llama is 2048 tokens."""
    with pytest.raises(UsageError, match="2048"):
        check_feasible(with_workload(small_study, **change), machine)


def test_a_missing_data_file_is_refused(small_study, machine):
    """The error comes before the worker starts."""
    with pytest.raises(UsageError, match="no such file"):
        check_feasible(with_workload(small_study, data="./nothing.jsonl"), machine)


def test_an_unknown_model_is_refused(small_study, machine):
    """The error lists the known names."""
    with pytest.raises(UsageError, match="tiny-llama"):
        check_feasible(with_workload(small_study, model="tiny-lama"), machine)


def test_unusual_settings_give_a_notice(small_study, machine):
    """A paged optimizer on a CPU and random weights give notices."""
    codes = {n.code for n in check_feasible(with_variant(small_study, r=300, optimizer="paged_adamw_32bit"), machine)}
    assert codes == {"paged-on-cpu", "random-weights"}
    assert {n.code for n in check_feasible(small_study, machine)} == {"random-weights"}


def test_an_unknown_path_in_a_proof_is_refused(small_study, machine):
    """An unknown path in a proof is refused with the known ones before the measurement."""
    engine = Engine(title="packing", variant="nf4", proof={"padding.shar": "less"})
    with pytest.raises(UsageError, match=r"padding.shar: no path of kernels_check.*padding.share"):
        check_feasible(dataclasses.replace(small_study, engine=engine), machine)


def test_a_request_of_many_prompts_that_cannot_fit_is_refused(small_study, machine):
    """The KV cache of a large request exceeds the memory; a run without requests is accepted."""
    study = with_workload(small_study, model="random:smollm2-135m", request_batch=4096, prompt_tokens=1024)
    with pytest.raises(UsageError, match=r"needs about .* Use a smaller request_batch"):
        check_feasible(study, machine)
    check_feasible(study, machine, phases=("train",))


@pytest.mark.parametrize(
    ("variant", "workload", "message"),
    [
        (
            {"use_dora": True},
            {"request_batch": 2},
            r"use_dora = True: with adapters = 4, PEFT does not mix .* = 1, which",
        ),
        ({"merge_adapter": True}, {}, "merge_adapter = True: with adapters = 4, a merged adapter can neither"),
        ({"bias": "lora_only"}, {}, 'bias = .lora_only.: with adapters = 4, PEFT has one .* Use bias = "none"'),
        ({"init_lora_weights": "olora"}, {}, "init_lora_weights = .olora.: with adapters = 4, it rewrites the base"),
    ],
)
def test_adapters_of_which_peft_has_one_at_a_time_are_refused(small_study, machine, variant, workload, message):
    """The error applies only to several adapters and comes before loading; DoRA adapters can be switched but not
    mixed."""
    one, *others = small_study.variants
    study = dataclasses.replace(small_study, variants=(dataclasses.replace(one, **variant), *others))
    with pytest.raises(UsageError, match=f"variant '{one.name}': {message}"):
        check_feasible(with_workload(study, adapters=4, **workload), machine)
    check_feasible(with_workload(study, **workload), machine)
    if "use_dora" in variant:
        check_feasible(with_workload(study, adapters=4), machine)
