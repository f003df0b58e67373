"""Tests of the errors for mistakes in a study file: they suggest the right key and report a missing file as such."""

from __future__ import annotations

import pytest

from lorameter.cli import main

ONE = "[[variant]]\nname = 'b'\n"
IN_PEFT = 'a method of PEFT is named in peft. Write peft = { peft_type = "IA3" }.'


@pytest.fixture
def answer(tmp_path, capsys):
    """A function that returns exit code and message of a dry run of a study file."""

    def ask(text):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        code = main(["run", str(path), "--dry-run", "--runs-dir", str(tmp_path / "runs")])
        return code, capsys.readouterr().err.strip()

    return ask


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"[controls]\nlr = 1e-4\n{ONE}", "[controls]: lr = 0.0001: unknown key. Did you mean learning_rate?"),
        (f"[controls]\nlora_r = 8\n{ONE}", "[controls]: lora_r = 8: unknown key. Did you mean r?"),
        (f"{ONE}rank = 8", "variant 'b': rank = 8: unknown key. Did you mean r?"),
        (f"[controls]\nalpha = 8\n{ONE}", "Did you mean lora_alpha?"),
        (f"[controls]\nload_in_4bit = true\n{ONE}", "load_in_4bit = True: unknown key. Did you mean quantization"),
        (f"[controls]\nbatch_size = 8\n{ONE}", "batch_size = 8: unknown key here. batch_size is a key of [workload]."),
        (f"{ONE}batch_size = 8", "unknown key here. batch_size is a key of [workload]."),
        (f"[workload]\nlr = 1e-4\n{ONE}", "unknown key here. learning_rate is a key of [controls] and [[variant]]."),
        (f"[protocol]\nmax_length = 64\n{ONE}", "unknown key here. sequence_length is a key of [workload]."),
        (f"seed = 1\n{ONE}", "mine.toml: seed = 1: unknown key here. seed is a key of [protocol]."),
        (f"[controls]\npeft_type = 'VERA'\n{ONE}", f"peft_type = 'VERA': {IN_PEFT}"),
        (f"[controls]\nuse_vera = true\n{ONE}", f"use_vera = True: {IN_PEFT}"),
        ("[axes]\nlr = [1e-4, 2e-4]", "[axes]: lr = [0.0001, 0.0002]: unknown key. Did you mean learning_rate?"),
        ("[sweeps]\nrank = [8, 16]", "[sweeps]: rank = [8, 16]: unknown key. Did you mean r?"),
        ("[axes]\nworkload.batchsize = [1, 2]", "workload.batchsize = [1, 2]: unknown key. Did you mean batch_size?"),
        (
            "[axes]\nworkload.ranks = [1, 2]",
            "workload.ranks = [1, 2]: equal for all variants. Write one value in [workload].",
        ),
        (f"[profile.a.controls]\nlr = 1\n{ONE}", "[profile.a.controls]: lr = 1: unknown key. Did you mean"),
        (f"[controls]\nxyzzy = 8\n{ONE}", "[controls]: xyzzy = 8: unknown key. `lorameter list keys` prints all keys."),
        (f"xyzzy = 8\n{ONE}", "mine.toml: xyzzy = 8: unknown key. `lorameter list keys` prints all keys."),
        (f"{ONE}r = -1", "mine.toml, variant 'b': r = -1: too small. Use 1 or more"),
        (f"[protocol]\nreplicates = 0\n{ONE}", "mine.toml, [protocol]: replicates = 0: too small"),
    ],
)
def test_an_unknown_key_is_refused_with_the_closest_one(answer, text, said):
    """The error is one line, without a list of all keys and without repeating the place."""
    code, found = answer(text)
    assert code == 2
    assert said in found
    assert len(found) < 250
    assert found.count("variant 'b'") <= 1


@pytest.mark.parametrize("name", ["./missing.toml", "missing.toml", "folder/missing", "."])
def test_a_missing_study_file_is_reported_as_missing(tmp_path, monkeypatch, capsys, name):
    """The error says that the file is missing, and lists no built-in studies."""
    monkeypatch.chdir(tmp_path)
    assert main(["run", name, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert f"study {name!r}: file not found" in said
    assert "training-step" not in said


def test_a_target_that_no_module_has_is_refused(answer):
    """PEFT would refuse the target in every trial; it accepts modules other than linear layers."""
    code, said = answer(f"[controls]\ntarget_modules = ['nothing']\n{ONE}")
    assert code == 2
    assert "target_modules = ['nothing']: the model tiny-llama has no such module" in said
    assert "q_proj" in said
    assert answer(f"[controls]\ntarget_modules = ['self_attn.q_proj', 'lm_head', 'embed_tokens']\n{ONE}")[0] == 0
