"""Executes docs/results.ipynb, whose outputs must follow from a committed run, and the tracker example of
docs/results.md."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import nbclient
import nbformat
import pytest

from tests.constructed import RUNS

PAGE = Path(__file__).parents[2] / "docs" / "results.ipynb"


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """The stored notebook, and the notebook as executed in a new kernel with the code of this checkout."""
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join([str(PAGE.parents[1] / "harness"), str(PAGE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    )
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    kept = nbformat.read(PAGE, as_version=4)
    fresh = nbformat.read(PAGE, as_version=4)
    nbclient.NotebookClient(
        fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(PAGE.parent)}}
    ).execute()
    return kept, fresh


def test_the_notebook_holds_the_output_of_its_cells(executed):
    """Every cell runs, and its output is the stored one; LORAMETER_CONTRACT=write updates it."""
    kept, fresh = executed
    nbformat.validate(fresh)
    if os.environ.get("LORAMETER_CONTRACT") == "write":
        for cell in fresh.cells:
            cell.metadata.pop("execution", None)  # the times of day
        nbformat.write(fresh, PAGE)
        return
    cells = [cell for cell in fresh.cells if cell.cell_type == "code"]
    assert len(cells) >= 6
    assert all(text_of(cell) for cell in cells)
    assert [text_of(cell) for cell in cells] == [text_of(cell) for cell in kept.cells if cell.cell_type == "code"]


def test_a_run_is_sent_to_a_tracker(monkeypatch):
    """The example sends settings and metrics of each variant as a run to a fake MLflow client."""
    given = []
    client = SimpleNamespace(
        start_run=lambda run_name: given.append([run_name]) or contextlib.nullcontext(),
        log_params=lambda settings: given[-1].append(settings),
        log_metrics=lambda metrics: given[-1].append(metrics),
    )
    monkeypatch.setitem(sys.modules, "mlflow", client)
    page = (PAGE.parent / "results.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "mlflow" in code]
    exec(code.replace('"RUN"', repr(str(RUNS / "sound"))), {})
    assert [name for name, *_ in given] == ["sound lora-r16", "sound qlora-nf4-r16", "sound qlora-nf4-r64-a256"]
    for _, settings, metrics in given:
        assert settings["valid"]
        assert settings["r"] in (16, 64)
        assert metrics["step_time_s"] > 0
        assert not [value for value in metrics.values() if type(value) is not float]


def text_of(cell) -> list[str]:
    """Return what a cell shows as text, without pandas' table layout."""
    shown = [output["data"]["text/plain"] for output in cell.outputs if "data" in output]
    return [" ".join(text.split()) for text in shown]
