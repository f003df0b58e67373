"""Tests of `lorameter list`: the choices are listed even if some of them are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorameter.cli import main
from lorameter.models import catalogue

STEPS = {"plain": [0.1, 0.1], "nf4": [0.2, 0.2]}
DEEP = 100_000


def edited(text, **changes):
    return json.dumps(json.loads(text) | changes)


@pytest.mark.parametrize(("harm", "reason"), [
    (lambda text: "", "cannot be read: Expecting value"),
    (lambda text: "[1, 2]", "[1, 2]: a table is expected"),
    (lambda text: "{}", "schema None"),
    (lambda text: '{"schema": ' * DEEP, "nested too deeply"),
    (lambda text: text.replace('"seed": 0', '"seed": ' + "9" * 5000), "Exceeds the limit (4300 digits)"),
    (lambda text: edited(text, study={}), "name is missing"),
    (lambda text: edited(text, run="\ud800"), "surrogates not allowed"),
])  # fmt: skip
def test_a_damaged_manifest_hides_no_other_run(write_run, capsys, harm, reason):
    """The run is listed as damaged with the reason, and refused where a command names it."""
    intact, damaged = write_run("intact", STEPS), write_run("damaged", STEPS)
    manifest = damaged / "manifest.json"
    manifest.write_text(harm(manifest.read_text()))
    assert main(["list", "runs", "--runs-dir", str(intact.parent), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [(row["run"], row["status"]) for row in rows] == [("damaged", "damaged"), ("intact", "complete")]
    assert reason in rows[0]["title"]
    assert len(rows[0]["title"]) < 2000
    assert main(["report", "damaged", "--runs-dir", str(intact.parent)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [{"hidden_act": "nonsense"}, {"model_type": "nope"}],
    ids=str,
)
def test_a_configuration_of_an_impossible_model_is_refused(change, tmp_path, capsys):
    """The error names the model and the reason, whatever exception transformers raises."""
    config = json.loads((Path(catalogue.__file__).parent / "tiny-llama.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["list", "sizes", "training-step", "--model", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
