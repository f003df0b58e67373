"""Executes the pages: commands print the lines below them, studies can be loaded, and all commands are known.

Tests that docs/json.md shows the contract's document of each command, shortened.

Tests that docs/reference.md is generated from the code, is current, and explains every key of every file.

Executes docs/results.ipynb, whose outputs must follow from a committed run, and the tracker example of
docs/results.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbclient
import nbformat
import pytest

from lorameter.cli import main
from lorameter.commands.parser import build_parser
from lorameter.commands.reference import field_docstrings, write_reference
from lorameter.studies.claim import Claim, ClaimPart, Engine
from lorameter.studies.protocol import Protocol
from lorameter.studies.study_file import load_study
from lorameter.studies.variant import LoraVariant, PeftVariant, ScriptVariant
from lorameter.studies.workload import DataColumns, Workload
from lorameter.verdicts.gate import LimitRule, Policy
from tests.constructed import RUNS

ROOT = Path(__file__).parents[2]
PAGES = tuple(
    ROOT / "docs" / f"{name}.md"
    for name in (
        "tutorial",
        "measure-my-model",
        "compare-versions",
        "read-a-verdict",
        "when-not-to-trust",
        "parity",
        "data",
        "troubleshooting",
    )
)
FILE = re.compile(r"^`(?P<name>[\w.-]+)`:\n\n```\w+\n(?P<content>.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?P<path>[\w./-]+)\)")
PARSED_PAGES = ("concepts", "checks", "study", "engines", "machines", "own-script", "own-script-ab")
WITHOUT_OUTPUT = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in PARSED_PAGES))
"""Pages whose commands are parsed and not run."""
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page, kind):
    """Return the text of each block of a kind."""
    return [part.split("\n```", 1)[0] for part in page.read_text(encoding="utf-8").split(f"```{kind}\n")[1:]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the constructed runs that the pages name."""
    runs = tmp_path / ".lorameter" / "runs"
    shutil.copytree(RUNS, runs)
    for study in (ROOT / "docs" / "examples").glob("*.toml"):
        shutil.copy(study, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("LORAMETER_RUNS", raising=False)
    return tmp_path


@each_page
def test_commands_print_the_lines_below_them(page, folder, capsys):
    """Each line of the page is, in order, in the output of the command above it."""
    for found in FILE.finditer(page.read_text(encoding="utf-8")):
        (folder / found["name"]).write_text(found["content"], encoding="utf-8")
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    assert lines
    printed = ""
    for line in lines:
        if line.startswith("$ lorameter "):
            assert main(shlex.split(line)[2:]) != 70
            output = capsys.readouterr()
            printed = " ".join((output.out + output.err).split())
        else:
            assert " ".join(line.split()) in printed, line


@pytest.mark.parametrize("name", ["machines", "own-script-ab"])
def test_every_study_can_be_loaded(name, tmp_path):
    """Each TOML block of a page can be loaded; a single table is completed by a variant."""
    for text in blocks(ROOT / "docs" / f"{name}.md", "toml"):
        path = tmp_path / "study.toml"
        path.write_text(text if "[[variant]]" in text else f'{text}\n[[variant]]\nname = "plain"\n', encoding="utf-8")
        load_study(str(path))


every_page = pytest.mark.parametrize("page", [*PAGES, *WITHOUT_OUTPUT], ids=lambda page: page.stem)


@every_page
def test_every_command_is_known(page):
    """The parser accepts every line of a shell block."""
    for line in (line for block in blocks(page, "sh") for line in block.splitlines()):
        program, *words = shlex.split(line, comments=True)
        assert program in ("lorameter", "pip", "pytest")
        if program == "lorameter":
            build_parser().parse_args(words)


@every_page
def test_links_lead_to_pages(page):
    """Each relative link is a file of the project."""
    for found in LINK.finditer(page.read_text(encoding="utf-8")):
        assert (page.parent / found["path"]).exists(), found["path"]


def test_messages_of_the_troubleshooting_are_those_of_the_program():
    """Each quoted fragment is in a source file."""
    page = PAGES[-1].read_text(encoding="utf-8")
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for package in ("harness", "kernels_check")
        for path in (ROOT / package).rglob("*.py")
    )
    joined = re.sub(r'"\n\s+f?"', "", sources).lower()
    for cell in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE):
        for words in re.findall("`([^`]+)`", cell):
            assert words.lower() in joined, words


PAGE = ROOT / "docs" / "json.md"
EXPECTED = ROOT / "tests" / "contract" / "expected" / "json"
DOCUMENTS = {
    "report", "run", "run-dry-run", "compare", "gate", "ab", "claims", "history", "estimate-gpu", "list-runs", "prune",
    "sample", "pack", "doctor", "accept", "profile", "parity",
}  # fmt: skip
EXTENDED = {"gate": "compare", "ab": "gate"}
"""Documents that extend another one, whose keys are not shown again."""
MAX_CHARACTERS = 60


def shorten(value: Any) -> Any:
    """Shorten to the first element of each list, the beginning of each long text, and four digits of each number."""
    if isinstance(value, dict):
        return {key: shorten(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shorten(value[0])] if value else []
    if isinstance(value, str) and len(value) > MAX_CHARACTERS:
        return f"{value[: MAX_CHARACTERS - 1]}…"
    return float(f"{value:.4g}") if isinstance(value, float) else value


def make_example(found: re.Match[str]) -> str:
    """Return the example for a block of the page."""
    name = found["name"]
    known = read(EXTENDED[name]) if name in EXTENDED else {}
    document = {key: shorten(value) for key, value in read(name).items() if key not in known}
    return f"```json {name}\n{json.dumps(document, indent=1, ensure_ascii=False)}\n```\n"


def read(name: str) -> dict[str, Any]:
    """Return the document that the contract expects."""
    document = json.loads((EXPECTED / f"{name}.json").read_text(encoding="utf-8"))
    return document.get("document", document)


def test_every_example_is_current():
    """`LORAMETER_CONTRACT=write pytest tests/docs/test_pages.py` updates them."""
    page, block = PAGE.read_text(encoding="utf-8"), re.compile(r"```json (?P<name>[\w-]+)\n.*?```\n", re.DOTALL)
    assert {found["name"] for found in block.finditer(page)} == DOCUMENTS
    current = block.sub(make_example, page)
    if os.environ.get("LORAMETER_CONTRACT") == "write":
        PAGE.write_text(current, encoding="utf-8")
    else:
        assert current == page


PAGE_REFERENCE = Path(__file__).parents[2] / "docs" / "reference.md"
CLASSES = (
    *(Claim, ClaimPart, DataColumns, Engine, LimitRule, Policy, Protocol, Workload),
    *(LoraVariant, PeftVariant, ScriptVariant),
)


@pytest.fixture(scope="module")
def page():
    """The reference as generated now."""
    return write_reference()


def test_the_page_is_current(capsys):
    """The page equals the output of the command; `lorameter list keys > docs/reference.md` updates it."""
    assert main(["list", "keys"]) == 0
    assert PAGE_REFERENCE.read_text(encoding="utf-8") == capsys.readouterr().out


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_key_is_documented_on_the_page(page, cls):
    """Each key has its name and a sentence, except the name of a variant."""
    meanings = field_docstrings(cls)
    for field in dataclasses.fields(cls):
        assert f"| `{field.name}` |" in page
        assert meanings.get(field.name) or field.name == "name", f"{cls.__name__}.{field.name} has no meaning"


PAGE_RESULTS = Path(__file__).parents[2] / "docs" / "results.ipynb"


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """The stored notebook, and the notebook as executed in a new kernel with the code of this checkout."""
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join(
            [str(PAGE_RESULTS.parents[1] / "harness"), str(PAGE_RESULTS.parents[1]), os.environ.get("PYTHONPATH", "")]
        ),
    )
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    stored = nbformat.read(PAGE_RESULTS, as_version=4)
    fresh = nbformat.read(PAGE_RESULTS, as_version=4)
    nbclient.NotebookClient(
        fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(PAGE_RESULTS.parent)}}
    ).execute()
    return stored, fresh


def test_the_notebook_holds_the_output_of_its_cells(notebooks):
    """Every cell runs, and its output is the stored one; LORAMETER_CONTRACT=write updates it."""
    stored, fresh = notebooks
    nbformat.validate(fresh)
    if os.environ.get("LORAMETER_CONTRACT") == "write":
        for cell in fresh.cells:
            cell.metadata.pop("execution", None)  # the times of day
        nbformat.write(fresh, PAGE_RESULTS)
        return
    cells = [cell for cell in fresh.cells if cell.cell_type == "code"]
    assert len(cells) >= 6
    assert all(read_output(cell) for cell in cells)
    assert [read_output(cell) for cell in cells] == [
        read_output(cell) for cell in stored.cells if cell.cell_type == "code"
    ]


def test_a_run_is_sent_to_a_tracker(monkeypatch):
    """The example sends settings and metrics of each variant as a run to a fake MLflow client."""
    sent = []
    client = SimpleNamespace(
        start_run=lambda run_name: sent.append([run_name]) or contextlib.nullcontext(),
        log_params=lambda settings: sent[-1].append(settings),
        log_metrics=lambda metrics: sent[-1].append(metrics),
    )
    monkeypatch.setitem(sys.modules, "mlflow", client)
    page = (PAGE_RESULTS.parent / "results.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "mlflow" in code]
    exec(code.replace('"RUN"', repr(str(RUNS / "sound"))), {})
    assert [name for name, *_ in sent] == ["sound lora-r16", "sound qlora-nf4-r16", "sound qlora-nf4-r64-a256"]
    for _, settings, metrics in sent:
        assert settings["valid"]
        assert settings["r"] in (16, 64)
        assert metrics["step_time_s"] > 0
        assert not [value for value in metrics.values() if type(value) is not float]


def read_output(cell) -> list[str]:
    """Return what a cell shows as text, without pandas' table layout."""
    shown = [output["data"]["text/plain"] for output in cell.outputs if "data" in output]
    return [" ".join(text.split()) for text in shown]
