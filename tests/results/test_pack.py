"""One file to send: it reads as the run does, and holds nothing of whose machine it was measured on."""

import getpass
import json
import re
import socket
import zipfile
from pathlib import Path

import msgspec
import pytest

from lorameter import cli
from lorameter.commands import prune_pack
from lorameter.commands.json_schema import PackedOf
from lorameter.errors import UsageError
from lorameter.records import packed, store
from lorameter.records.fileio import write_document
from lorameter.records.locks import alone
from lorameter.records.record import Failure, Notice
from lorameter.results import pack as packing
from lorameter.results.pack import PRIVATE, pack
from lorameter.results.rows import rows_of
from tests.constructed import RUNS

HOST, CARD = "rack7-node12", "GPU-8f9a1c2e-0b4d-4c11-9e7a-2f3b4c5d6e7f"


def content(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


@pytest.mark.parametrize("path", sorted(RUNS.iterdir()), ids=lambda path: path.name)
def test_a_packed_run_says_what_the_run_says(path, tmp_path):
    """Every row of every table, how the run stands, and how many lines were lost."""
    there, here = store.read_run(str(path), RUNS), store.read_run(str(pack(path.name, RUNS, tmp_path / "x.zip")), RUNS)
    before, after = rows_of(there), rows_of(here)
    assert {name: len(rows) for name, rows in after.items()} == {name: len(rows) for name, rows in before.items()}
    for name in ("samples", "estimates", "comparisons"):
        assert repr(after[name]) == repr(before[name]), name  # a loss that is NaN equals nothing
    assert (here.state, here.damaged_lines, len(here.disturbed)) == (
        there.state, there.damaged_lines, len(there.disturbed)
    )  # fmt: skip
    assert [record.checks and [check["status"] for check in record.checks] for record in here.records] == [
        record.checks and [check["status"] for check in record.checks] for record in there.records
    ]


@pytest.fixture
def private(write_run, monkeypatch, tmp_path):
    """A run that holds paths, a host, a user, addresses and texts of records."""
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.setattr(socket, "getfqdn", lambda: f"{HOST}.example.org")
    monkeypatch.setattr(getpass, "getuser", lambda: "ada.lovelace")
    trace = (
        f'Traceback (most recent call last):\n  File "/home/ada/secret-project/train.py", line 3, in <module>\n'
        f"    connect('10.20.30.40:29500')  # {HOST} of ada.lovelace\nOSError: ~/notes/x.txt and ../up/y.bin\n"
    )

    def change(record):
        tokens = {"answer_0": [5, 6, 7], "base_answer_0": [8], "completion": [9, 9], "real_tokens": 64}
        message = f"see http://{HOST}.internal:80/a/b?c=d and data/mine.jsonl"
        notice = Notice(code="x", message=message, remedy="12.4.5.8")
        record = record.replaced(tokens=tokens, notices=(notice,), site=f"{HOST}-gpu-0")
        if record.trial == "r1-nf4":
            failure = Failure(phase="train", kind="OSError", message="/srv/private/weights.bin is cut", traceback=trace)
            return record.replaced(status="crashed", failure=failure)
        return record

    path = write_run("mine", {"plain": [1.0, 1.1], "nf4": [1.0, 1.2]}, change=change)
    manifest = store.read_manifest(path)
    manifest.tokens.update(examples=[{"prompt": "Dear diary,", "reference": "I was"}], data="mine.jsonl, 4 records")
    manifest.study["workload"]["model"] = "/srv/private/llama"
    manifest.provenance["settings"] = {"gpu": {"uuid": CARD}}
    manifest.site_facts[f"{HOST}-gpu-0"] = store.SiteFacts(machine={"cpu_model": "Test CPU"}, fingerprint="f")
    manifest.provenance["packages"] = {"nvidia-cublas-cu12": "12.4.5.8"}
    write_document(path / "manifest.json", manifest)
    monkeypatch.chdir(tmp_path)
    return path


SECRETS = {
    "paths": ("/home/ada", "secret-project", "/srv/private", "~/notes", "../up", "data/mine"),
    "hosts": (HOST, CARD, "10.20.30.40", "ada.lovelace", "internal"),
    "texts": ("Dear diary", "answer_0", "base_answer_0", '"completion": ['),
}


def test_nothing_private_is_in_it(private):
    """No path, host, user, address or text; what is public stays, versions of four parts too."""
    found = "".join(content(pack("mine", private.parent)).values())
    for kind, words in SECRETS.items():
        assert not [word for word in words if word in found], kind
    assert re.findall(r"train\.py|weights\.bin|llama", found)
    assert '"nvidia-cublas-cu12": "12.4.5.8"' in found
    assert '"remedy": "12.4.5.8"' in found
    assert Path("mine.lorameter.zip").is_file()


NODES = ("gx07", "gx08.cluster.example", "lost-node")
PLANTED = (
    *NODES, "gx08", "cluster", "fe80::1c2a:ff", "2001:db8::8a2e", "10.20.30.40", "lovelace", "my models", "secret lab",
    "hunter2", "mine/own",
)  # fmt: skip


@pytest.fixture
def spread(write_run, monkeypatch, tmp_path):
    """A run that two nodes have measured and a third has lost, with a model in a folder whose path has a blank."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "own").mkdir(parents=True)
    folder = "/home/lovelace/secret lab/my models"
    sites = ("gx07-gpu-0", "gx08.cluster.example")
    trace = (
        f'File "{folder}/other/load.py", line 3\nOSError: {folder}/other/x.bin of file://{folder}/y and '
        "file:///home/lovelace/z, [fe80::1c2a:ff] and 2001:db8::8a2e, 10.20.30.40, gx08: no route; mine/own/cache\n"
    )

    def change(record):
        site = sites[record.replicate % 2]
        notice = Notice(code="x", message=f"site {site} is 9% slower", remedy=f"Look at logs/tokens-{site}.log")
        failure = Failure(phase="train", kind="OSError", message=f"{folder}/x is cut", traceback=trace)
        crashed = {"status": "crashed", "failure": failure} if record.trial == "r1-nf4" else {}
        return record.replaced(site=site, notices=(notice,), log=f"logs/base-{site}.log", **crashed)

    path = write_run("spread", {"plain": [1.0, 1.1], "nf4": [1.0, 1.2]}, change=change)
    manifest = store.read_manifest(path)
    manifest.study["workload"]["model"] = f"{folder}/llama"
    manifest.study["workload"]["data"] = "mine/own"
    manifest.tokens["data"] = "records of https://me:hunter2@host/x and password=hunter2"
    manifest.study["protocol"]["on"] = "slurm:nodelist=gx[07-08],exclude=lost-node,partition=p"
    facts = {site: store.SiteFacts(machine={"cpu_model": "Test CPU"}, fingerprint="f") for site in sites}
    lost = Notice(code="site-lost", message="site lost-node was lost: lost-node.cluster.example is gone", remedy="")
    written = msgspec.structs.replace(manifest, site_facts=facts, sites=sites, notices=(lost,))
    write_document(path / "manifest.json", written)
    return path


def test_no_node_and_no_path_of_a_spread_run_is_in_it(spread):
    """Not in its sites, in what it asks the scheduler for, in names of trials and logs, nor in any text; each node has
    a name of its own."""
    assert cli.main(["pack", str(spread), "--output", "run.zip"]) == 0
    found = "".join(content(Path("run.zip")).values())
    assert not [word for word in PLANTED if word in found]
    run = store.read_run("run.zip", spread.parent)
    assert {record.site for record in run.records} == {*run.manifest.sites} == {*run.manifest.site_facts}
    assert len(run.manifest.sites) == 2
    assert cli.main(["report", "run.zip"]) in (0, 4)


@pytest.mark.parametrize("kind", PRIVATE)
def test_what_is_asked_for_is_in_it_and_nothing_else(kind, private, tmp_path):
    """Each kind by itself."""
    found = "".join(content(pack("mine", private.parent, tmp_path / "x.zip", [kind])).values())
    for other, words in SECRETS.items():
        held = [word for word in words if word in found]
        assert held == (list(words) if other == kind else []), other


def test_every_command_reads_it(tmp_path, capsys, monkeypatch):
    """report, claims, compare, gate, export and sample say of the file what they say of the run."""
    pack("swept", RUNS, tmp_path / "swept.lorameter.zip", ["texts"])
    pack("sound", RUNS, tmp_path / "sound.lorameter.zip")
    pack("ab", RUNS, tmp_path / "ab.lorameter.zip")
    lines = [
        "report {swept}", "report {ab} --json", "claims {swept} --json", "compare {sound} {sound} --json",
        "gate {sound} {sound} --format json", "export {sound}", "export {sound} --format bencher",
        "sample {swept} lora_alpha=256",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for line in lines:
        answers = []
        for form in ("{0}.lorameter.zip", f"{RUNS}/{{0}}"):
            names = {name: form.format(name) for name in ("swept", "sound", "ab")}
            code = cli.main(line.format(**names).split())
            said = capsys.readouterr()
            answers.append(
                (code, re.sub(r"Run \w+ in .*|\S+\.zip|\"path\": \"[^\"]*\"", "", said.out), said.err.count("\n"))
            )
        assert answers[0] == answers[1], line
        assert answers[0][0] != 70


def test_the_command_says_what_is_not_in_the_file(private, capsys):
    """As text and as a document."""
    words = ["pack", "mine", "--runs-dir", str(private.parent), "--include", "texts"]
    assert cli.main(words) == 0
    assert "without paths, hosts, logs" in capsys.readouterr().out
    assert cli.main([*words, "--output", "other.zip", "--json"]) == 0
    said = msgspec.convert(json.loads(capsys.readouterr().out), PackedOf)
    assert (said.file, said.skipped) == ("other.zip", ["paths", "hosts", "logs"])


def test_a_run_under_way_and_a_place_that_is_taken_are_refused(private, tmp_path):
    """With what to do."""
    pack("mine", private.parent)
    with pytest.raises(UsageError, match="another --output"):
        pack("mine", private.parent)
    with pytest.raises(UsageError, match="packed already"):
        pack("mine.lorameter.zip", private.parent)
    with pytest.raises(UsageError, match="cannot be written"):
        pack("mine", private.parent, tmp_path / "no" / "such" / "x.zip")
    with pytest.raises(UsageError, match="not found"):
        pack("nothing", private.parent)
    manifest = store.read_manifest(private)
    write_document(private / "manifest.json", packing.codec.to_json(manifest) | {"status": "running"})
    with alone(private / store.TRIALS, ""), pytest.raises(UsageError, match="being measured"):
        pack("mine", private.parent, tmp_path / "y.zip")


@pytest.mark.parametrize("change", ["cut", "empty", "no manifest", "too large", "another file"])
def test_what_somebody_sent_may_be_anything(change, tmp_path, monkeypatch):
    """It is refused by its name, and nothing of it is written outside of a folder of our own."""
    path = pack("sound", RUNS, tmp_path / "x.zip")
    if change == "cut":
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 3] + data[-400:])
    elif change == "too large":
        monkeypatch.setattr(packed, "MOST_BYTES", 1000)
    elif change != "another file":
        with zipfile.ZipFile(path, "w") as archive:
            if change == "no manifest":
                archive.writestr("../manifest.json", "{}")
    else:
        path.write_text("no archive")
    with pytest.raises(UsageError):
        store.read_run(str(path), tmp_path)
    assert not list(tmp_path.parent.glob("manifest.json"))


def test_a_packed_run_is_not_gone_on_with(private, capsys):
    """There is no folder to write to."""
    pack("mine", private.parent)
    assert cli.main(["run", "--resume", "mine.lorameter.zip"]) == 2
    assert "packed" in capsys.readouterr().err


def test_the_words_of_the_command_are_those_of_the_packer():
    """The parser names them without loading it."""
    assert prune_pack.PRIVATE == PRIVATE
