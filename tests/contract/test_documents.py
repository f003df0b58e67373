"""Tests of `--json`: one document on standard output, floats with ten digits, and the exit code."""

import subprocess

import pytest

from tests.contract.doors import COMMANDS
from tests.contract.expected import check_document, check_shape, parse

READ_ONLY = {
    "report": "report base",
    "report-crashed": "report failed --runs-dir derived",
    "report-phase": "report base --phase train --variant qlora --metric step_time_s",
    "compare": "compare base candidate",
    "compare-regressed": "compare steady slower --runs-dir derived",
    "compare-improved": "compare steady faster --runs-dir derived",
    "compare-not-comparable": "compare steady elsewhere --runs-dir derived",
    "compare-metric": "compare base candidate --metric held_out_loss --metric '*peak*'",
    "gate": "gate base candidate",
    "gate-policy": "gate steady slower --policy strict.toml --runs-dir derived",
    "claims": "claims base",
    "sample": "sample base qlora",
    "history": "history",
    "list-runs": "list runs",
    "list-runs-derived": "list runs --runs-dir derived",
    "list-studies": "list studies",
    "list-models": "list models",
    "list-variants": "list variants study.toml",
    "list-sizes": "list sizes study.toml",
    "prune": "prune --keep 1 --dry-run",
    "run-resume": "run --resume base",
    "estimate-gpu": "estimate lora-or-qlora:lora-r16 --model llama2-7b --gpu 24GiB --max-batch",
}
"""Commands on stored runs and built-in names, which write nothing."""
MACHINE_DEPENDENT = {
    "doctor": "doctor",
    "estimate": "estimate study.toml:qlora",
    "run-dry-run": "run study.toml --dry-run",
}
"""Commands of which only keys and types are compared, since sizes and times depend on the machine."""


def read_document(outcome):
    """Return the only document on standard output, which has a schema number."""
    assert outcome.out, outcome.err
    document = parse(outcome.out)
    assert isinstance(document["schema"], int)
    return document


@pytest.mark.parametrize("name", READ_ONLY)
def test_a_document_has_the_expected_values(name, lorameter):
    """Values and exit code are the expected ones."""
    outcome = lorameter(f"{READ_ONLY[name]} --json")
    found = {"command": READ_ONLY[name], "exit_code": outcome.code, "document": read_document(outcome)}
    check_document(f"json/{name}", found)


@pytest.mark.parametrize("name", MACHINE_DEPENDENT)
def test_a_document_about_the_machine_has_the_expected_keys(name, lorameter):
    """Keys and types are the expected ones."""
    outcome = lorameter(f"{MACHINE_DEPENDENT[name]} --json")
    assert outcome.code in ((0, 4) if name == "doctor" else (0,))  # 4: unfit
    document = read_document(outcome)
    for phase in ("train", "generate") if name == "estimate" else ():
        assert sum(document[phase].pop("kinds").values()) == document[phase]["total_bytes"]  # CPU-specific
    if name == "estimate":
        document["notices"] = []  # a CPU may emulate the dtype of the study
    check_shape(f"json/{name}", document)


def test_an_export_has_all_tables(lorameter):
    """The document has all tables of a run, with one object for each row."""
    document = read_document(lorameter("export base --json"))
    check_shape("json/export", document)
    assert {row["run"] for row in document["trials"]} == {"base"}


def test_accepting_a_run_prints_it(lorameter, own_folder):
    """The document has the accepted run and the baseline that it replaces."""
    first = read_document(lorameter("accept base --json"))
    assert (first["accepted"]["run"], first["replaced"]) == ("base", None)
    second = read_document(lorameter("accept candidate --json"))
    assert (second["accepted"]["run"], second["replaced"]["run"]) == ("candidate", "base")
    check_shape("json/accept", second)


def test_a_suite_is_written_once(lorameter, own_folder):
    """`init` prints the written files and refuses a folder that has one of them."""
    document = read_document(lorameter("init suite --json"))
    assert sorted(document["files"]) == sorted(path.name for path in (own_folder / "suite").iterdir())
    assert document["folder"] == "suite"
    (own_folder / "suite" / "conftest.py").write_text("# mine\n", encoding="utf-8")
    assert lorameter("init suite").code == 2
    assert (own_folder / "suite" / "conftest.py").read_text(encoding="utf-8") == "# mine\n"


def test_pruning_prints_the_removed_run(lorameter, own_folder):
    """The removed run's folder does not exist any more."""
    assert lorameter("accept base --json").code == 0
    document = read_document(lorameter("prune --keep 1 --json"))
    check_shape("json/prune-removed", document)
    left = sorted(path.name for path in (own_folder / "runs").iterdir() if path.is_dir())
    assert left == sorted({"base", "candidate"} - {row["run"] for row in document["removed"]})


def test_a_packed_run_is_read_like_a_run(lorameter, own_folder):
    """`pack` prints the file, which `report` accepts in place of a run."""
    document = read_document(lorameter("pack base --json"))
    check_shape("json/pack", document)
    assert document["file"].endswith("base.lorameter.zip")
    shown = read_document(lorameter(f"report {document['file']} --json"))
    whole = read_document(lorameter("report base --json"))
    assert shown["tables"] == whole["tables"]


def test_a_dry_bisection_lists_its_commits(lorameter, own_folder):
    """The dry run lists the commits between both ends in the current repository."""
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", "init", "--quiet"], check=True)
    for name in ("one", "two", "three"):
        subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", name], check=True)
    document = read_document(lorameter("bisect study.toml --good HEAD~2 --bad HEAD --dry-run --json"))
    check_shape("json/bisect-dry-run", document)
    assert len(document["candidates"]) == 3


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_completion_script_has_all_commands(shell, lorameter):
    """The completion script has all commands, as text and in a document."""
    document = read_document(lorameter(f"completion {shell} --json"))
    assert sorted(document) == ["schema", "script", "shell"]
    assert [name for name in COMMANDS if name.split()[0] not in document["script"]] == []
    assert lorameter(f"completion {shell}").out.strip() == document["script"].strip()
