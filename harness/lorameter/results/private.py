"""What a run says of whose machine it was measured on, and how it is left out of a text.

A host, a path or a user is recognised by what the run itself names (its sites, its model and data, folders), by what
this machine is called, and by its form: a URL, an address, what begins with `/`, `~` or `.`, what is quoted and begins
so, and what has folders and ends in the name of a file.
"""

from __future__ import annotations

import contextlib
import getpass
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from lorameter.models.catalogue import CATALOGUE, RANDOM_PREFIX
from lorameter.records import codec, fileio
from lorameter.records.store import TRIALS, Manifest
from lorameter.studies.data_source import SYNTHETIC

Replace = Callable[[str], str]
_TAIL = r"[^\s'\"<>|;,:)\]}]"
"""A character that a path resumes where it is not in quotes."""
_ROOTED = re.compile(r"~[\w-]*/|\.{0,2}/")
_NAMING = ("model", "data", "cwd", "path", "spec")
"""Fields of a manifest that may name a file or a folder, also with blanks in its name."""
_QUOTED = re.compile(r"""(?P<quote>["'`])(?P<path>(?:file://|~[\w-]*/|\.{0,2}/)(?:(?!(?P=quote)).)*)(?P=quote)""")
_FILE_URL = re.compile(rf"file://{_TAIL}*")
_PATH = re.compile(
    rf"""(?<![\w.:/~-])(?:~[\w-]*|\.{{1,2}})?/{_TAIL}+"""  # /home/me/x, ~/x, ../x
    r"""|(?<![\w./:-])(?:[\w.-]+/)+[\w-]+\.(?:jsonl?|csv|parquet|txt|gz|toml|py|safetensors|gguf|bin|pt|log)\b"""
)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#'\"]+[^\s'\"]*")
_ADDRESS = re.compile(r"(?<![\w.=])(?:\d{1,3}\.){3}\d{1,3}(?![\w.])")
"""Of a machine; one that is all of a text is a version of four parts."""
_ADDRESS_6 = re.compile(r"(?<![\w:.])(?=[\da-fA-F:]*:[\da-fA-F:]*:)[\da-fA-F:]+(?:(?:\d+\.){3}\d+)?(?:%\w+)?(?![\w:])")
_GPU = re.compile(r"(?:GPU|MIG)-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_NODES = re.compile(r"\b(nodelist|exclude)=(?:\[[^\]]*\]|[^,\[\s])+")
"""What a study asks SLURM for; several nodes may be written as one word."""
_SITES_SAID = re.compile(r"\bsites? ([\w.-]+(?:, [\w.-]+)*) (?:are|came|is|was)\b")
"""In notices, also those that have measured nothing."""
_OF_SITE = re.compile(r"-gpu(?:-\d+)+$")
_HERE = re.compile(r"(?:gpu|cpus)(?:-\d+)+|[\d+]+")
"""Sites of one machine, which have no names of hosts."""
_HOMES = ("/home", "/Users")


class _Line(msgspec.Struct):
    site: str = ""


def without_paths(manifest: Manifest, run: Path) -> Replace:
    """Replaces every path by the name at its end."""
    known = "|".join(map(re.escape, sorted(_known_paths(manifest, run), key=len, reverse=True)))
    of_run = re.compile(rf"(?:file://)?(?<![\w.~-])(?:{known})(?![\w.-])(?:/{_TAIL}*)?")

    def replace(text: str) -> str:
        text = of_run.sub(lambda found: _end_of(found[0]), text)
        if "/" not in text:
            return text
        text = _QUOTED.sub(lambda found: found["quote"] + _end_of(found["path"]) + found["quote"], text)
        return _PATH.sub(lambda found: _end_of(found[0]), _FILE_URL.sub(lambda found: _end_of(found[0]), text))

    return replace


def _end_of(path: str) -> str:
    folder, _, name = path.rstrip("/").rpartition("/")
    return "user" if folder.removeprefix("file://") in _HOMES else name or "/"


def _known_paths(manifest: Manifest, run: Path) -> set[str]:
    """Those that the run names, this folder, this user's, and the folders that these lie in."""
    named = {str(Path.home()), str(Path.cwd()), str(run.absolute())}
    named |= {path for path in _paths_in(codec.to_json(manifest)) if _ROOTED.match(path)}
    for workload in (manifest.study.get("workload"), *manifest.own_workloads.values()):
        if isinstance(workload, dict):
            named |= set(_relative(workload))
    named |= {str(folder) for path in named for folder in Path(path).parents if len(folder.parts) > 2}
    return {path for path in named if Path(path).name.strip(".~")}


def _paths_in(data: Any) -> Iterator[str]:
    """The values of fields that may name a file or a folder."""
    if isinstance(data, dict):
        for key, value in data.items():
            if key in _NAMING and isinstance(value, str):
                yield _bare(value)
            else:
                yield from _paths_in(value)
    elif isinstance(data, list):
        for item in data:
            yield from _paths_in(item)


def _relative(workload: dict[str, Any]) -> Iterator[str]:
    """A model or data by a path in this folder; `owner/name` is one where it is there, else an id of the hub."""
    for key, public in (("model", CATALOGUE), ("data", (SYNTHETIC,))):
        name = _bare(str(workload.get(key, "")))
        if "/" in name and name not in public and (name.count("/") > 1 or Path(name).exists()):
            yield name


def _bare(named: str) -> str:
    """A path without what a model or data may have before or behind it."""
    return named.removeprefix(RANDOM_PREFIX).removeprefix("file://").partition("[")[0].rstrip("/")


def without_hosts(manifest: Manifest, run: Path) -> Replace:
    """Replaces what sites and this machine, its GPU and its user are called, addresses, and where a URL leads."""
    here = {socket.gethostname(), socket.getfqdn().partition(".")[0], os.uname().nodename}
    words = dict.fromkeys(here, "host") | {_user(): "user"}
    words = {name: word for name, word in words.items() if len(name) > 2 and name not in ("localhost", "root")}
    of_here = _named(words, before=r"(?<![\w-])", after=r"(?:(?=-gpu-\d)|(?![\w-]))")  # a site is a GPU of a host
    hosts = sorted(_hosts(manifest, run))
    nodes = {host: f"node-{number}" for number, host in enumerate(hosts, 1)}
    nodes |= {host.partition(".")[0]: word for host, word in nodes.items() if not _ADDRESS.fullmatch(host)}
    of_sites = _named(nodes, before=r"(?<![A-Za-z0-9_])", after=r"(?:\.[A-Za-z][\w-]*)*(?![A-Za-z0-9_])")

    def replace(text: str) -> str:
        text = of_sites(_NODES.sub(r"\1=host", text))
        if text in words or _ADDRESS.fullmatch(text):  # a word of ours that a machine happens to be called by
            return text
        text = _ADDRESS.sub("address", _URL.sub(r"\1host", of_here(text)))
        return _GPU.sub("gpu", _ADDRESS_6.sub(_address, text))

    return replace


def _named(words: dict[str, str], *, before: str, after: str) -> Replace:
    """Replaces names by words; a longer name goes before one that it begins with."""
    if not words:
        return lambda text: text
    names = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    found_in = re.compile(f"{before}({names}){after}")
    return lambda text: found_in.sub(lambda found: words[found[1]], text)


def _address(found: re.Match[str]) -> str:
    with contextlib.suppress(ValueError):
        ipaddress.IPv6Address(found[0])
        return "address"
    return found[0]


def _hosts(manifest: Manifest, run: Path) -> set[str]:
    """Names of the machines that a run was spread over."""
    sites = {*manifest.sites, *manifest.site_facts}
    protocol = manifest.study.get("protocol")
    if isinstance(protocol, dict):
        sites |= set(map(str, protocol.get("sites") or ()))
    for notice in manifest.notices:
        sites |= {name for said in _SITES_SAID.findall(notice.message) for name in said.split(", ")}
    decoder = msgspec.json.Decoder(_Line)
    for line in fileio.journal_lines(run / TRIALS):
        with contextlib.suppress(msgspec.MsgspecError):  # a line that was cut short
            sites.add(decoder.decode(line).site)
    return {_OF_SITE.sub("", site) for site in sites if site and not _HERE.fullmatch(site)}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # of a number that no name belongs to
        return ""
