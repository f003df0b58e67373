"""docs/engines.md is executed: its refusals are printed, its studies are read, and its script is judged."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from lorameter.cli import main
from lorameter.studies.study_file import load_study

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "engines.md"
EXAMPLES = ROOT / "docs" / "examples"
QUICK = ("--replicates", "1", "--steps", "2", "--interleave", "lockstep", "--allow-disturbed", "--json")


def blocks(kind):
    """The text of each block of a kind."""
    return [part.split("\n```", 1)[0] for part in PAGE.read_text(encoding="utf-8").split(f"```{kind}\n")[1:]]


def typed():
    """Each command of a shell, as its words, without what is said of it."""
    lines = (line.partition(" #")[0] for block in blocks("sh") for line in block.splitlines())
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The present folder, with the examples that the page names."""
    for name in ("engine_flags.py", "unsloth.toml", "axolotl.toml"):
        assert f"(examples/{name})" in PAGE.read_text(encoding="utf-8")
        shutil.copy(EXAMPLES / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'harness'}:{ROOT}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "400")
    return tmp_path


def test_its_commands_print_what_stands_below_them(page, monkeypatch, capsys):
    """On a machine without a GPU, on which not all of a large model's variants fit side by side."""
    monkeypatch.setattr("lorameter.machine.provenance._torch_cuda", lambda: None)
    monkeypatch.setattr("lorameter.machine.provenance.free_bytes", lambda machine, environment=None: 16 << 30)
    lines = [line for block in blocks("console") for line in block.splitlines()]
    assert sum(line.startswith("$ ") for line in lines) == 4
    printed = ""
    for line in lines:
        if line.startswith("$ lorameter "):
            main([*shlex.split(line)[2:], "--runs-dir", "runs"])
            said = capsys.readouterr()
            printed = said.out + said.err
        else:
            assert line in printed


@pytest.mark.parametrize(("name", "title"), [("unsloth", "Unsloth"), ("axolotl", "Axolotl's LoRA kernels")])
def test_its_studies_of_other_trainers_are_read(page, name, title):
    """Two commands, promises with their pages, and a refusal where there is no GPU."""
    study = load_study(f"{name}.toml")
    assert study.of_scripts
    assert study.engine.obstacle("cpu").startswith(f"{title} runs on a GPU only")
    assert all("read 2026-" in claim.source for claim in study.claims)


@pytest.mark.selftest
def test_its_script_is_measured(page, capsys):
    """Real processes with a small llama: the engine was seen in one of them alone; one replicate gives no verdict."""
    words = next(words for words in typed() if "python engine_flags.py {--gradient_checkpointing}" in words)
    assert main([*words, "--runs-dir", "runs", *QUICK]) == 0
    run = json.loads(capsys.readouterr().out)
    assert run["trials"] == {"ok": 3}
    main(["claims", run["run"], "--runs-dir", "runs", "--json"])
    found = json.loads(capsys.readouterr().out)
    (shown,) = found["engine"]["proof"]
    assert (shown["path"], shown["found"], shown["with_engine"], shown["without"]) == (
        "checkpointing", "active", True, False,
    )  # fmt: skip
    for claim in found["claims"]:
        assert claim["verdict"] == "not judged"
        assert claim["parts"][0]["reason"].startswith(("1 replicate: ", "peak memory: 1 replicate "))
    assert found["engine"]["versions"]["torch"]
    assert found["engine"]["commands"]["checkpointed"] == "python engine_flags.py --gradient_checkpointing"
