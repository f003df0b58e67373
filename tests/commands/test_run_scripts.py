"""Tests of `lorameter run ENGINE --command`: accepted and refused arguments, and a whole run of two scripts.

Tests of `lorameter ab` of commands: accepted and refused arguments, and a whole run of two scripts through every
reader.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from lorameter.records import store

COMMAND = "python scripted.py {slow|plain}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compile", "--command", "python scripted.py plain"], "nothing differs"),
        (["compile", "--command", "python scripted.py {"], "braces that hold neither"),
        (["training-step", "--command", COMMAND], "it has no claim about an engine"),
        (["--command", COMMAND], "no study named"),
        (["compile", "--command", COMMAND, "--model", "tiny-llama"], "model = 'tiny-llama'"),
        (["compile", "--command", COMMAND, "--variant", "eager"], "--variant: both are needed"),
        (["compile", "--command", COMMAND, "--profile", "cpu"], "--profile cpu: a script has no profile"),
        (["compile", "--command", COMMAND, "--phase", "cold"], "training is measured"),
        (
            ["compile", "--command", COMMAND, "--steps", "3"],
            "2 steps are timed in a turn. Use a multiple of 2, 2 or more.",
        ),
        (["compile", "--command", "python other.py {--flag}"], "no file 'other.py'"),
        (["compile", "--command", COMMAND, "--cwd", "missing"], "no folder"),
        (["compile", "--command", COMMAND, "--cwd", "x" * 260], "no folder"),
        (["compile", "--command", "python " + "x" * 260 + " {--flag}"], "no file"),
        (["compile", "--steps", "4"], "--steps: it belongs to --command"),
        (["compile", "--cwd", "."], "--cwd: it belongs to --command"),
        (["liger-kernel", "--command", COMMAND], "Liger Kernel runs on a GPU only"),
        (["flash-attention"], "FlashAttention runs on a GPU only"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_started(scripted, words, said, monkeypatch):
    """The command exits with 2, the fault and the remedy, on a machine without a GPU."""
    monkeypatch.setattr("lorameter.machine.provenance._torch_cuda", lambda: None)
    code, out, err = scripted("run", *words)
    assert (code, out) == (2, "")
    assert said in err


def test_an_engine_of_the_workload_has_no_sides(scripted):
    """An A/B measures one variant on one workload on two sides, which cannot show such an engine."""
    for words in (("ab", "packing", "--base", sys.executable, "--candidate", sys.executable), ("calibrate", "packing")):
        code, _, err = scripted(*words)
        assert (code, "Measure it with `lorameter run packing`" in err) == (2, True)


def test_the_plan_of_a_gpu_study_is_shown_without_a_gpu(scripted, monkeypatch):
    """Its time and memory are unknown on this machine."""
    monkeypatch.setattr("lorameter.machine.provenance._torch_cuda", lambda: None)
    code, out, _ = scripted("run", "liger-kernel", "--command", COMMAND, "--dry-run")
    assert code == 0
    for words in ("plain-control", "needs-gpu", "time    unknown (it cannot be measured on this machine)"):
        assert words in out
    code, out, _ = scripted("run", "flash-attention", "--dry-run", "--json")
    assert (code, json.loads(out)["time_s"], json.loads(out)["memory_bytes"]) == (0, None, None)


def test_a_claim_about_two_scripts_is_not_judged_without_proof(scripted, tmp_path):
    """Two commands run in lockstep; a ratio is measured, but no claim is judged without proof that the engine ran."""
    words = ("--replicates", "1", "--steps", "4", "--interleave", "lockstep", "--allow-disturbed", "--json")
    code, out, _ = scripted("run", "compile", "--command", COMMAND, *words)
    run = json.loads(out)["run"]
    assert (code, json.loads(out)["trials"]) == (0, {"ok": 3})
    manifest = json.loads((tmp_path / "runs" / run / "manifest.json").read_text())
    assert [one["command"] for one in manifest["study"]["variants"]] == [
        "python scripted.py slow", "python scripted.py plain",
    ]  # fmt: skip
    assert manifest["interleaving"] == "lockstep"
    code, out, _ = scripted("claims", run, "--json")
    found = json.loads(out)
    assert (code, {one["verdict"] for one in found["claims"]}) == (0, {"not judged"})
    assert found["engine"]["commands"] == {"eager": "python scripted.py slow", "compiled": "python scripted.py plain"}
    (shown,) = found["engine"]["proof"]
    assert (shown["path"], shown["found"]) == ("compile", "unknown")
    code, out, _ = scripted("report", run)
    assert code == 0
    assert "compile does not show whether torch.compile ran" in " ".join(out.replace("│", " ").split())
    code, out, err = scripted("run", "--resume", run, "--steps", "8")
    assert (code, "--steps cannot be given" in err) == (2, True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_commands_that_another_user_may_have_written_are_resumed_only_with_trust(scripted):
    """The refusal names the owner and the remedy; a run that was begun with the umask 002 is its owner's alone."""
    umask = os.umask(0o002)
    words = ("--replicates", "1", "--steps", "4", "--interleave", "lockstep", "--allow-disturbed", "--json")
    path = Path(json.loads(scripted("run", "compile", "--command", COMMAND, *words)[1])["path"])
    os.umask(umask)

    def resume(*words):
        manifest = path / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"complete"', '"interrupted"'))
        (path / "trials.jsonl").write_text("")
        code, out, err = scripted("run", "--resume", path.name, "--json", *words)
        return code, out, " ".join(err.split())

    assert resume()[0] == 0
    (path / "manifest.json").chmod(0o664)
    code, out, err = resume()
    assert (code, out, "users other than root may write it" in err) == (2, "", True)
    os.chown(path / "manifest.json", 1, -1)
    code, out, err = resume()
    assert (code, out) == (2, "")
    assert "manifest.json, and it belongs to user daemon. Read them there, then resume it by lorameter run wi" in err
    assert resume("--trust")[0] == 0
    assert "--trust: it belongs to --resume" in scripted("run", "compile", "--trust")[2]


SCRIPT = Path(__file__).parents[1] / "run" / "scripted.py"
FAST, SLOW = "python scripted.py plain", "python scripted.py slow"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base-command", FAST], "--candidate-command COMMAND is missing"),
        (["--command", FAST], "--base SIDE is missing"),
        (["--command", FAST, "--base-command", FAST], "Give one of the two"),
        (["lora-or-qlora", "--command", FAST], "leave one of them out"),
        (["--base-command", FAST, "--candidate-command", SLOW, "--base", "HEAD"], "leave them out"),
        (["--base-command", FAST, "--candidate-command", SLOW, "--model", "tiny-llama"], "model = 'tiny-llama'"),
        (["--base-command", FAST, "--candidate-command", SLOW, "--phase", "cold"], "training is measured"),
        (["--base-command", FAST, "--candidate-command", SLOW, "--inject-rows", "8"], "--inject-rows"),
        (
            ["--base-command", FAST, "--candidate-command", SLOW, "--steps", "3"],
            "2 steps are timed in a turn. Use a multiple of 2, 2 or more.",
        ),
        (["--base-command", FAST, "--candidate-command", "python scripted.py 'x"], "Close the quote"),
        (["--base-command", FAST, "--candidate-command", "python other.py"], "no file 'other.py'"),
        (["--base-command", FAST, "--candidate-command", SLOW, "--cwd", "missing"], "no folder"),
        (["--base-command", FAST, "--candidate-command", "./" + "x" * 260], "no program"),
        (["lora-or-qlora", "--base", "HEAD", "--candidate", "HEAD", "--cwd", "."], "--cwd: it belongs to"),
    ],
)
def test_invalid_options_of_ab_are_refused_before_anything_is_started(scripted, words, said):
    """The command exits with 2 and names the option and the remedy."""
    code, out, err = scripted("ab", *words)
    assert (code, out) == (2, "")
    assert said in err


def test_one_command_on_two_sides(scripted, tmp_path):
    """Two revisions of a script need one command, and each process has its own files; where steps hold different token
    counts, a notice says so and the time is also judged for each real token."""
    import subprocess

    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)

    git("init", "-q")
    git("add", "scripted.py")
    git("commit", "-qm", "fast")
    text = SCRIPT.read_text()
    for before, after in (("else STEP_TIME_S,", "else 3e-3,"), ("real_tokens=200,", "real_tokens=150,")):
        assert text.count(before) == 1
        text = text.replace(before, after)
    Path("scripted.py").write_text(text)
    git("commit", "-qam", "slow")
    words = ("--base", "HEAD~1", "--candidate", "HEAD", "--replicates", "1", "--steps", "4", "--allow-disturbed")
    _, out, err = scripted("ab", "--command", FAST, *words, "--json")
    found = json.loads(out)
    ratios = {row["metric"]: row["ratio"] for row in found["comparisons"]}
    assert ratios["step_time_s"] == pytest.approx(3.0), err
    assert ratios["time_per_real_token_s"] == pytest.approx(3.0 * 200 / 150)
    (said,) = [notice["message"] for notice in found["notices"] if notice["code"] == "tokens-differ"]
    assert "200.0 real tokens in the base and 150.0 in the candidate" in said
    _, shown, _ = scripted("report", found["run"])
    assert "time per real token" in shown


def test_the_plan_warns_of_shared_output_folders(scripted):
    """The plan warns of an output folder outside the script's folder, before anything is started."""
    Path("separate.toml").write_text(
        '[[variant]]\nname = "plain"\ncommand = "python scripted.py plain --output_dir /elsewhere"\n'
        '[[variant]]\nname = "slow"\ncommand = "python scripted.py slow"\n'
    )
    code, out, err = scripted("run", "separate.toml", "--dry-run")
    assert code == 0
    assert "writes-outside" in out + err
    assert "/elsewhere is outside of its folder" in " ".join((out + err).split())
    assert not Path("runs").exists()


def test_a_candidate_that_fails_its_rehearsal_is_not_started_again(scripted, tmp_path):
    """Each trial of the candidate fails with the rehearsal's reason and log, and the base is measured; no file and no
    output holds a credential that the script prints or raises."""
    starts, secrets = tmp_path / "starts", ("hunter2", "0123abcd")
    (tmp_path / "broken.py").write_text(
        f"open({str(starts)!r}, 'a').write('started\\n')\n"
        f"print('password={secrets[0]} WANDB_API_KEY={5 * secrets[1]}')\n"
        f"raise ValueError('401 for https://me:{secrets[0]}@host/x?token={secrets[0]}')\n"
    )
    words = ("ab", "--base-command", FAST, "--candidate-command", "python broken.py", "--replicates", "1")
    code, out, err = scripted(*words, "--steps", "2", "--allow-disturbed", "--json")
    assert code == 4
    assert "rehearsal" in err
    run = store.read_run(json.loads(out)["run"], tmp_path / "runs")
    sides = {side: [record for record in run.records if record.side == side] for side in ("base", "candidate")}
    assert len(sides["candidate"]) == 1
    assert {record.status for record in sides["candidate"]} == {"crashed"}
    assert {record.log for record in sides["candidate"]} == {"logs/rehearsal-scripted-candidate.log"}
    assert {record.status for record in sides["base"]} == {"ok"}
    assert starts.read_text() == "started\n"
    files = {path.name: path.read_bytes().decode(errors="replace") for path in run.path.glob("**/*.*")}
    assert "password=*** WANDB_API_KEY=***" in files["rehearsal-scripted-candidate.log"]
    assert "401 for https://***@host" in files["trials.jsonl"]
    for secret in secrets:
        assert not [name for name, text in files.items() if secret in text], secret
        assert secret not in out + err
