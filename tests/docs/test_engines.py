"""Executes docs/engines.md: its refusals are printed, its studies are read, and its script is judged."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from lorameter.cli import main
from lorameter.studies.study_file import load_study

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "engines.md"
EXAMPLES = ROOT / "docs" / "examples"


def blocks(kind):
    """Return the text of each block of a kind."""
    return [part.split("\n```", 1)[0] for part in PAGE.read_text(encoding="utf-8").split(f"```{kind}\n")[1:]]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The current folder, with the examples that the page names."""
    for name in ("engine_flags.py", "unsloth.toml", "axolotl.toml"):
        assert f"(examples/{name})" in PAGE.read_text(encoding="utf-8")
        shutil.copy(EXAMPLES / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'harness'}:{ROOT}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "400")
    return tmp_path


def test_its_commands_print_the_lines_below_them(page, monkeypatch, capsys):
    """The commands run as on a machine without a GPU, where not all variants of a large model fit concurrently."""
    monkeypatch.setattr("lorameter.machine.provenance._torch_cuda", lambda: None)
    monkeypatch.setattr("lorameter.machine.provenance.free_bytes", lambda machine, environment=None: 16 << 30)
    lines = [line for block in blocks("console") for line in block.splitlines()]
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
def test_its_studies_of_other_trainers_are_read(page, name, title):
    """Each study has two commands and sourced claims, and is refused without a GPU."""
    study = load_study(f"{name}.toml")
    assert study.of_scripts
    assert study.engine.obstacle("cpu").startswith(f"{title} runs on a GPU only")
    assert all("read 2026-" in claim.source for claim in study.claims)
