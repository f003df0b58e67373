"""Tests of the example scripts as users run them: wrapped, with a meter in two lines, and two of them taking turns.

Executes docs/engines.md: its refusals are printed, its studies are read, and its script is judged.

Tests that the scripts of docs/own-script.md print the lines below them.

Tests that the numbers in docs/own-script-ab.md are those of the code.

Tests that the code of docs/own_step.md prints the lines on the page.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorameter.cli import main
from lorameter.commands.table import COMMANDS
from lorameter.models.catalogue import cache_dir
from lorameter.records import store
from lorameter.run.workers import script_sandbox
from lorameter.studies.protocol import STEPS_PER_TURN
from lorameter.studies.study_file import load_study
from lorameter.verdicts import same_training

ROOT = Path(__file__).parents[2]


EXAMPLES = ROOT / "docs" / "examples"
METER_LINES = {
    "trainer_lora.py": ("eval_dataset=rows[:8])", "eval_dataset=rows[:8], callbacks=[Meter()])"),
    "accelerate_loop.py": ("in loader:", "in Meter(model).steps(loader, accumulation=2):"),
    "torch_loop.py": ("in loader:", "in Meter(model).steps(loader):"),
}
"""The line of each script that changes for a meter, before and after; the other new line is the import."""


def start(*words, folder):
    """Run Python with these arguments in a folder, offline and with one thread."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'harness'}:{ROOT}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=900)


def read_only_run(folder):
    (path,) = store.list_runs(folder)
    return store.read_run(str(path), path.parent)


def write_with_meter(name, folder):
    """Write the example with a meter."""
    text, (line, metered) = (EXAMPLES / name).read_text(encoding="utf-8"), METER_LINES[name]
    assert text.count(line) == 1
    (folder / name).write_text(text.replace(line, metered).replace("import torch\n", IMPORT, 1))
    return folder / name


IMPORT = "import torch\nfrom lorameter.attach import Meter\n"


@pytest.fixture
def sft_words(dolly):
    """The arguments of the TRL example; skips where a requirement is missing."""
    model = cache_dir() / "models" / "smollm2-135m"
    if not model.is_dir() or importlib.util.find_spec("trl") is None:
        pytest.skip("needs trl, and the model in the cache: lorameter model fetch smollm2-135m")
    return ["--model", str(model), "--data", str(dolly)]


@pytest.fixture
def wrap(tmp_path):
    """A function that wraps an example in a new process, and returns the finished process and the run."""

    def run(name, *words, require=()):
        command = ["-m", "lorameter.cli", "wrap", "--no-report", "--runs-dir", str(tmp_path / "runs")]
        command += ["--require", *require] if require else []
        done = start(*command, "--", sys.executable, str(EXAMPLES / name), *words, folder=tmp_path)
        return done, read_only_run(tmp_path / "runs")

    return run


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "tokens", "minimum"),
    [("trainer_lora.py", 256, 8), ("accelerate_loop.py", 256, 5), ("torch_loop.py", 132, 20)],
)
def test_an_example_is_measured_wrapped_and_with_a_meter_in_two_lines(wrap, tmp_path, name, tokens, minimum):
    """For a Trainer with accumulation, evaluation and saving, an Accelerate loop and a plain loop, both ways record the
    same steps and losses."""
    done, run = wrap(name)
    assert done.returncode == 0, done.stderr
    (record,) = run.records
    assert record.status == "ok", record.failure
    samples = record.samples
    assert len(samples["step_time_s"]) >= minimum
    every = zip(samples["turn_tokens"], samples["turn_padded_tokens"], strict=True)
    assert {real + padding for real, padding in every} == {tokens}
    assert len(samples["timed_loss"]) == len(samples["backward_time_s"]) == len(samples["step_time_s"])
    assert ("host_peak_evaluate_bytes" in record.memory) is (name == "trainer_lora.py")
    assert record.checks

    done = start(write_with_meter(name, tmp_path), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Training" in done.stdout
    (metered,) = read_only_run(tmp_path / ".lorameter" / "runs").records
    assert metered.status == "ok", metered.failure
    first = 0 if name == "trainer_lora.py" else 1  # an observed optimizer begins its training at the first update

    def losses_of(record):
        names = ("first_loss", "warmup_loss", "timed_loss")
        return [loss for name in names for loss in record.samples.get(name, ())]

    metered_losses, wrapped_losses = losses_of(metered), losses_of(record)
    assert len(metered_losses) >= len(wrapped_losses) - 1
    assert metered_losses[first : first + 4] == pytest.approx(wrapped_losses[:4], rel=1e-6)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "base", "candidate", "differ"),
    [
        ("trainer_lora.py", "--r 4", "--r 16", {"trains-other-parameters"}),
        ("accelerate_loop.py", "", "", set()),
        ("torch_loop.py", "--width 64", "--width 256", {"trains-other-parameters"}),
    ],
)
def test_two_commands_of_an_example_take_turns(tmp_path, name, base, candidate, differ):
    """They run in lockstep to the end of their steps; differences are notices."""
    shutil.copy(EXAMPLES / name, tmp_path)
    commands = [f"python {name} --steps 400 {options}".strip() for options in (base, candidate)]
    done = start(
        "-m", "lorameter.cli", "ab", "--base-command", commands[0], "--candidate-command", commands[1], "--replicates",
        "2", "--steps", "4", "--allow-disturbed", "--runs-dir", "runs", "--json", folder=tmp_path,
    )  # fmt: skip
    found = json.loads(done.stdout)
    statuses = [record.status for record in read_only_run(tmp_path / "runs").records]
    assert (found["interleaving"], statuses) == ("lockstep", ["ok"] * 6), done.stderr
    (row,) = [one for one in found["comparisons"] if one["metric"] == "step_time_s"]
    assert row["low"] < row["ratio"] < row["high"]
    codes = {notice["code"] for notice in found["notices"]}
    assert codes & {"trains-other-parameters", "tokens-differ", "batch-differs", "loss-dtype-differs"} == differ
    assert differ or found["losses"][name.removesuffix(".py")]["found"] == "agree"  # the same script is bit-equal
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "runs"])


@pytest.mark.faults
@pytest.mark.network_model
def test_qlora_and_lora_of_trl_take_turns(sft_words, tmp_path):
    """With the same records and a 4-bit and a 16-bit base, the checks prove both, and the losses of the same tokens are
    compared with an interval."""
    shutil.copy(EXAMPLES / "sft_qlora.py", tmp_path)
    command = shlex.join(["python", "sft_qlora.py", *sft_words, "--steps", "400"])
    done = start(
        "-m", "lorameter.cli", "ab", "--base-command", command, "--candidate-command", f"{command} --bits 16",
        "--replicates", "2", "--steps", "4", "--allow-disturbed", "--runs-dir", "runs", "--json", folder=tmp_path,
    )  # fmt: skip
    found = json.loads(done.stdout)
    records = read_only_run(tmp_path / "runs").records
    assert (found["interleaving"], [one.status for one in records]) == ("lockstep", ["ok"] * 6), done.stderr
    seen = {(one.side, check["path"]): (check["status"], check["observed"]) for one in records for check in one.checks}
    assert seen["base", "base.bits"] == ("active", 4)
    assert seen["candidate", "base.bits"] == ("active", 16)
    assert seen["base", "base.quant_type"] == ("active", "nf4")
    assert {seen[side, "peft.attached"] for side in ("base", "candidate")} == {("active", True)}
    losses = {
        side: [one.samples["timed_loss"] for one in records if one.side == side] for side in ("base", "candidate")
    }
    assert all(0 < loss < 20 for side in losses.values() for trial in side for loss in trial)
    reason = found["losses"]["sft_qlora"]["reason"]
    assert "different tokens" not in reason
    assert re.search(r"in the first step, and over \d+ steps [\d.]+ \[[\d.]+, [\d.]+\] of the first", reason), reason
    assert "tokens-differ" not in {notice["code"] for notice in found["notices"]}


def read_blocks(page, kind):
    """Return the text of each block of a kind on a page of docs/."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [part.split("\n```", 1)[0] for part in text.split(f"```{kind}\n")[1:]]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The current folder, with the examples that the page names."""
    for name in ("engine_flags.py", "unsloth.toml", "axolotl.toml"):
        assert f"(examples/{name})" in (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
        shutil.copy(EXAMPLES / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'harness'}:{ROOT}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "400")
    return tmp_path


def test_commands_of_the_engines_page_print_the_lines_below_them(page, monkeypatch, capsys):
    """The commands run as on a machine without a GPU, where not all variants of a large model fit concurrently."""
    monkeypatch.setattr("lorameter.machine.provenance._torch_cuda", lambda: None)
    monkeypatch.setattr("lorameter.machine.provenance.free_bytes", lambda machine, environment=None: 16 << 30)
    lines = [line for block in read_blocks("engines.md", "console") for line in block.splitlines()]
    assert sum(line.startswith("$ ") for line in lines) == 4
    printed = ""
    for line in lines:
        if line.startswith("$ lorameter "):
            main([*shlex.split(line)[2:], "--runs-dir", "runs"])
            output = capsys.readouterr()
            printed = output.out + output.err
        else:
            assert line in printed


@pytest.mark.parametrize(("name", "title"), [("unsloth", "Unsloth"), ("axolotl", "Axolotl's LoRA kernels")])
def test_studies_of_the_engines_page_are_read(page, name, title):
    """Each study has two commands and sourced claims, and is refused without a GPU."""
    study = load_study(f"{name}.toml")
    assert study.of_scripts
    assert study.obstacle("cpu").startswith(f"{title} runs on a GPU only")
    assert all("read 2026-" in claim.source for claim in study.claims)


@pytest.mark.selftest
@pytest.mark.parametrize("place", [0, 1], ids=["trainer", "loop"])
def test_a_script_of_the_own_script_page_prints_its_output(tmp_path, place):
    """The script also leaves a run; tests/contract/test_measured.py measures such a loop quickly."""
    (tmp_path / "train.py").write_text(read_blocks("own-script.md", "python")[place])
    done = start("train.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = [line.strip() for line in done.stdout.splitlines()]
    expected = read_blocks("own-script.md", "text")[place].splitlines()
    assert not [line for line in expected if line not in printed], (done.stdout, done.stderr)
    assert list((tmp_path / ".lorameter" / "runs").glob("*/manifest.json"))


AB_PAGE = (ROOT / "docs" / "own-script-ab.md").read_text(encoding="utf-8")


def read_section(title):
    """Return the text below a title."""
    return AB_PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_ab_page_states_the_numbers_of_the_code():
    """The page states the steps of a turn and of a process, the copied size, and the limits of a difference."""
    assert STEPS_PER_TURN == 2
    (arguments,) = (command.arguments for command in COMMANDS if command.name == "ab")
    (steps,) = (options["help"] for (name, *_), options in arguments if name == "--steps")
    assert f"process ({steps.rpartition('default ')[2]})" in AB_PAGE
    assert f"Files above {script_sandbox.LARGE_BYTES >> 20} MiB" in AB_PAGE
    assert f"more than {script_sandbox.MAX_BYTES >> 30} GiB" in AB_PAGE
    agreement = read_section("Do both scripts train the same?")
    assert f"differ by more than {same_training.TOLERANCE:.0%}".replace("%", " %") in agreement
    assert f"lies within {same_training.MARGIN:.0%}".replace("%", " %") in agreement


STEP_PAGE = ROOT / "docs" / "own_step.md"
SEPARATOR = "-- the next block --"


def read_step_blocks():
    """Return each code block with the lines that it prints, if there are any."""
    found = []
    for kind, block in re.findall(
        r"^```(python|text)\n(.*?)^```$", STEP_PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        if kind == "python":
            found.append((block, []))
        else:
            found[-1][1].extend(block.splitlines())
    return found


@pytest.mark.selftest
def test_the_own_step_page_prints_its_output(tmp_path):
    """All code runs in one separate process, since Accelerate keeps a state for each process."""
    shown = read_step_blocks()
    assert sum(bool(printed) for _, printed in shown) >= 4
    script = f"\nprint({SEPARATOR!r})\n".join(code for code, _ in shown)
    done = start("-c", script, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = [part.strip().splitlines() for part in done.stdout.split(SEPARATOR)]
    for (code, expected), lines in zip(shown, printed, strict=True):
        assert not [line for line in expected if line not in lines], (code, lines)


@pytest.mark.selftest
def test_the_script_of_several_ranks_prints_its_output(tmp_path):
    """The script runs under torchrun as on the page: the check at the end finds a fault that the first check cannot
    see."""
    page = STEP_PAGE.read_text(encoding="utf-8")
    assert "(examples/ddp.py)" in page
    (expected,) = re.findall(r"^```console\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    shutil.copy(ROOT / "docs" / "examples" / "ddp.py", tmp_path)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ddp.py")
    done = start(*launcher, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("ranks.")] == expected.splitlines()
