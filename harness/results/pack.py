"""A run as one file to send: what was measured and under what, and nothing of whose machine it was.

Paths become the names at their end; names of hosts, users and cards, and addresses, become words; texts of records (the
examples of the data, and the answers of a model to them) are left out; all unless it is asked for. What remains is
every sample, every check, every verdict. Logs and tokens are never packed.

A path is told by its form: it begins with `/`, `~` or `.`, or has folders and ends in the name of a file. A run whose
model or data was named by a path is thus no more comparable to one that has that path in it.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, get_args

from harness.errors import UsageError
from harness.records import beside, codec, inputs, journal, store
from harness.records.document import write_document
from harness.records.evidence import EvidenceFile, LostEvidenceError
from harness.records.outputs import replacing
from harness.records.packed import SUFFIX, is_packed, write_packed
from harness.records.record import TrialRecord
from harness.records.refusals import say_unwritable
from harness.records.scratch import scratch_folder
from harness.records.store import MANIFEST, TRIALS, Manifest
from harness.records.trial_lines import TrialLines, line_of

Private = Literal["paths", "hosts", "texts"]
"""What is left out unless it is asked for."""
PRIVATE: tuple[Private, ...] = get_args(Private)
DAMAGED = '{"damaged\n'
"""Stands for a line that was damaged: it must stay one, or a run that has lost a trial would read as whole."""

_PATH = re.compile(
    r"""(?<![\w.:/~-])(?:~[\w-]*|\.{1,2})?/[^\s'"<>|;,:)\]}]+"""  # /home/me/x, ~/x, ../x
    r"""|(?<![\w./:-])(?:[\w.-]+/)+[\w-]+\.(?:jsonl?|csv|parquet|txt|gz|toml|py|safetensors|gguf|bin|pt|log)\b"""
)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#'\"]+[^\s'\"]*")
_ADDRESS = re.compile(r"(?<![\w.=])(?:\d{1,3}\.){3}\d{1,3}(?![\w.])")
"""Of a machine; one that is all of a text is a version of four parts."""
_CARD = re.compile(r"(?:GPU|MIG)-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_OF_TEXT = re.compile(r"(?:answer|untrained)_\d+|(?:cold_)?completion")


def pack(name: str, runs: Path, output: Path | None = None, include: Collection[Private] = ()) -> Path:
    """Write a run as one file, which every command reads in place of a run; the file.

    Args:
        name: a run id or a run directory.
        runs: where ids are looked for.
        output: the file; None for the run's name with `.lorameter.zip` in the folder one stands in.
        include: what else goes in.

    Raises:
        UsageError, InvalidRunError: no such run, one that is being measured, or a place that cannot be written.
    """
    path = Path(name) if inputs.is_file(Path(name) / MANIFEST) else runs / name
    if is_packed(Path(name)) or is_packed(path):
        raise UsageError(f"run {name!r}: it is packed already. Send that file.")
    if not inputs.is_file(path / MANIFEST):
        store.read_run(name, runs)  # says that there is none, and which there are
    manifest = store.read_manifest(path)
    if store.is_live(path, manifest):
        raise UsageError(f"run {manifest.run}: it is being measured. Wait for its end, and pack it then.")
    target = output or Path(f"{manifest.run}{SUFFIX}")
    if os.path.lexists(target):
        raise UsageError(f"{target}: there is a file of that name. Remove it, or give another --output.")
    clean = _cleaner(path, include)
    with scratch_folder() as folder:
        _write_manifest(folder, manifest, clean, texts="texts" in include)
        _write_records(folder, path, manifest, clean, texts="texts" in include)
        with say_unwritable(str(target), "Give another --output."), replacing(target, anew=True) as draft:
            write_packed(draft, folder)
    return target


def _write_manifest(folder: Path, manifest: Manifest, clean: Callable[[Any], Any], *, texts: bool) -> None:
    data = codec.to_json(manifest)
    if not texts:
        for tokens in (data["tokens"], *data["tokens"].get("own", {}).values()):
            if "examples" in tokens:
                tokens["examples"] = []
    cleaned = clean(data)
    if "site_facts" in cleaned:  # by names, which records have as well
        cleaned["site_facts"] = {clean(site): told for site, told in cleaned["site_facts"].items()}
    write_document(folder / MANIFEST, cleaned)


def _write_records(folder: Path, path: Path, manifest: Manifest, clean: Callable[[Any], Any], *, texts: bool) -> None:
    """Every line, earlier attempts included; the checks anew, since their names are hashes of what they say."""
    read = TrialLines(EvidenceFile(path), path / MANIFEST, f"{path.name}, {TRIALS}")
    evidence = EvidenceFile(folder)
    with (folder / TRIALS).open("w", encoding="utf-8", errors="replace") as file:
        for line in journal.lines(path / TRIALS):
            try:
                record = read.read(line)
            except (codec.NotJsonError, LostEvidenceError):
                file.write(DAMAGED)
                continue
            cleaned = _cleaned(record, clean, texts=texts)
            file.write(line_of(cleaned, evidence.add(cleaned.checks)))
    for record in beside.read(path):
        beside.append(folder, _cleaned(record, clean, texts=texts))


def _cleaned(record: TrialRecord, clean: Callable[[Any], Any], *, texts: bool) -> TrialRecord:
    data = codec.to_json(record)
    if not texts:
        data["tokens"] = {key: value for key, value in data["tokens"].items() if not _OF_TEXT.fullmatch(key)}
    return codec.from_json(TrialRecord, clean(data), f"trial {record.trial}")


def _cleaner(run: Path, include: Collection[Private]) -> Callable[[Any], Any]:
    """What to do to plain data before it is sent."""
    steps: list[Callable[[str], str]] = []
    if "hosts" not in include:
        steps.append(_without_hosts())
    if "paths" not in include:
        steps.append(_without_paths)

    def clean(data: Any) -> Any:
        if isinstance(data, str):
            for step in steps:
                data = step(data)
            return data
        if isinstance(data, dict):
            return {key: value if key == "log" else clean(value) for key, value in data.items()}
        return [clean(item) for item in data] if isinstance(data, list) else data

    return clean


def _without_paths(text: str) -> str:
    """The text with every path replaced by the name at its end."""
    return _PATH.sub(lambda found: found[0].rstrip("/").rsplit("/", 1)[-1] or "/", text) if "/" in text else text


def _without_hosts() -> Callable[[str], str]:
    """Replaces what this machine, its card and its user are called, addresses, and where a URL leads."""
    hosts = {socket.gethostname(), socket.getfqdn().partition(".")[0], os.uname().nodename}
    words = dict.fromkeys(hosts, "host") | {_user(): "user"}
    words = {name: word for name, word in words.items() if len(name) > 2 and name not in ("localhost", "root")}
    longest_first = sorted(words, key=len, reverse=True)
    ends = r"(?:(?=-card-\d)|(?![\w-]))"  # a site is a card of a host
    known = re.compile("|".join(rf"(?<![\w-]){re.escape(name)}{ends}" for name in longest_first))

    def replace(text: str) -> str:
        if text in words or _ADDRESS.fullmatch(text):  # a word of ours that a machine happens to be called by
            return text
        if words:
            text = known.sub(lambda found: words[found[0]], text)
        return _CARD.sub("card", _ADDRESS.sub("address", _URL.sub(r"\1host", text)))

    return replace


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # of a number that no name belongs to
        return ""
