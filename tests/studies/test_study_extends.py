"""Tests that a study which extends another with one line is that study with this line, for every machine profile."""

import tomllib

import pytest

from lorameter.studies.study_file import builtin_studies, load_study

ORIGINAL = "llama2-lora-parameters"
SAME_SWEEP = {"lora-parameters-other-size": "llama2-13b", "lora-parameters-other-model": "mistral-7b"}


def write(tmp_path, text, base=ORIGINAL):
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "{base}"\n{text}')
    return str(path)


@pytest.mark.parametrize(("name", "model"), SAME_SWEEP.items())
def test_a_profile_does_not_replace_the_studys_model(name, model):
    """On any machine the study uses its own model, with random weights where the profile says so."""
    for profile in tomllib.loads(builtin_studies()[ORIGINAL].read_text())["profile"]:
        study = load_study(name, profile=profile)
        assert study.workload.model == (f"random:{model}" if profile == "random" else model)
        assert not any("SmolLM2" in note for note in study.notes)
    assert load_study(ORIGINAL, profile="random").workload.model == "random:llama2-7b"
    assert load_study(ORIGINAL, device="cpu").workload.model == "smollm2-135m"


def test_other_keys_of_an_inherited_profile_still_apply(tmp_path):
    """Only keys of the extending study override an inherited profile."""
    study = load_study(write(tmp_path, "[workload]\nbatch_size = 2\n[controls]\ntf32 = false\n"), device="cpu")
    assert study.workload.batch_size == 2
    assert (study.workload.model, study.workload.sequence_length) == ("smollm2-135m", 128)
    assert {(variant.optimizer, variant.attention, variant.tf32) for variant in study.variants} == {
        ("adamw", "sdpa", False)
    }


def test_its_own_profile_takes_precedence_over_its_own_key(tmp_path):
    """A profile of the extending study applies to its machine."""
    text = '[workload]\nmodel = "mistral-7b"\n[profile.cpu.workload]\nmodel = "tiny-llama"\n'
    assert load_study(write(tmp_path, text), device="cpu").workload.model == "tiny-llama"
    assert load_study(write(tmp_path, text), profile="a100").workload.model == "mistral-7b"
