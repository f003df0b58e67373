"""Reads a model's dimensions from its config.json or GGUF header.

Plans, feasibility and forecasts need only a model's widths and depth, and run in processes that must start fast: this
module parses headers and JSON and never imports torch. Families use different names for the same dimension, and omit
dimensions that follow from others; this module resolves both.
"""

from __future__ import annotations

import functools
import importlib.util
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorameter.errors import UsageError, impossible, shorten
from lorameter.models.catalogue import ModelSource, config_file
from lorameter.models.families import FAMILIES, Family, Layers
from lorameter.records import fileio


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
    tied: bool | None
    """Whether the output head is the input embedding; None if unknown."""
    architecture: str
    """The model type in transformers and GGUF ("llama")."""


def shape(source: ModelSource) -> ModelShape:
    """The model's dimensions, from its config.json or its GGUF header.

    Raises:
        UsageError: the file cannot be loaded or read, or does not describe a decoder-only model.
    """
    if source.kind == "gguf":
        return _gguf_shape(source)
    return shape_of_config(read_config(source), source.label)


def shape_of_config(config: Mapping[str, Any], label: str) -> ModelShape:
    """The dimensions in a configuration, such as that of a loaded model; `label` names it in errors.

    Raises:
        UsageError: it does not describe a decoder-only model.
    """
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) and text else config
    architecture = str(config.get("model_type", "unknown"))
    tied: bool | None = None
    if "tie_word_embeddings" in config:
        tied = bool(config["tie_word_embeddings"])
    elif architecture in FAMILIES:
        tied = FAMILIES[architecture].tied
    values = {key: _first(config, names) for key, names in _SYNONYMS.items()}
    return _complete(values, tied=tied, architecture=architecture, label=label)


def read_config(source: ModelSource) -> dict[str, Any]:
    """The content of a model's config.json. Raises `UsageError` if it cannot be loaded or read."""
    path = config_file(source)
    try:
        config = fileio.read_json(path, fileio.CONFIG_BYTES)
    except fileio.NotReadableError as error:
        raise impossible("catalogue", "model", source.label, f"{path} cannot be read ({error})", "Repair it.") from None
    if not isinstance(config, dict):
        raise impossible("catalogue", "model", source.label, f"{path} holds no table", "Repair it.")
    return config


LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
"""Keys of the number of decoder layers in config.json."""
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "layers": LAYER_KEYS,
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "n_ctx"),
}
"""Keys of each dimension in config.json: current ones first, then GPT-2's, then OPT's."""

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
"""Keys of each dimension in GGUF, each after "ARCHITECTURE." (gguf specification, section "LLM")."""


_CONFIG_TYPES = {"gemma3": "gemma3_text"}
"""Model types in transformers for GGUF names, if they differ."""


def _gguf_shape(source: ModelSource) -> ModelShape:
    header = gguf_of(Path(source.location))
    architecture = str(header.values.get("general.architecture", "unknown"))
    prefix = f"{architecture}."
    architecture = _CONFIG_TYPES.get(architecture, architecture)
    own = {name.removeprefix(prefix): value for name, value in header.values.items() if name.startswith(prefix)}
    values = {key: _first(own, names) for key, names in _GGUF_KEYS.items()}
    if values["vocab_size"] is None:
        values["vocab_size"] = next(iter(header.tensors.get("token_embd.weight", ())[-1:]), None)
    tied = "output.weight" not in header.tensors
    return _complete(values, tied=tied, architecture=architecture, label=source.label)


def _first(mapping: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((value for name in names if type(value := mapping.get(name)) is int), None)


def _complete(values: dict[str, int | None], *, tied: bool | None, architecture: str, label: str) -> ModelShape:
    """Add dimensions that a configuration may omit because they follow from others."""
    hidden, heads = values["hidden_size"], values["heads"]
    if hidden and heads:
        values["kv_heads"] = values["kv_heads"] or heads
        values["head_dim"] = values["head_dim"] or hidden // heads
        values["intermediate_size"] = values["intermediate_size"] or 4 * hidden  # GPT-2's default
    known = {key: value for key, value in values.items() if value is not None and value >= 1}
    if missing := sorted(values.keys() - known.keys()):
        why = f"its configuration (model type {shorten(architecture, 60)!r}) gives no {', '.join(missing)}"
        raise impossible("catalogue", "model", label, why, "Use a decoder-only language model.")
    return ModelShape(**known, tied=tied, architecture=architecture)


def gguf_of(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        UsageError: the package gguf is missing, or the file is not a GGUF file.
    """
    if importlib.util.find_spec("gguf") is None:
        raise impossible(
            "catalogue", "model", str(path), "reading it needs the package gguf", "pip install 'lorameter[gguf]'"
        )
    try:
        state = path.stat()
        return _read_header(path, state.st_size, state.st_mtime_ns)
    except (OSError, fileio.NotReadableError) as error:
        why = f"not a readable GGUF file ({shorten(str(error))})"
        raise impossible("catalogue", "model", str(path), why, "Download it again.") from None


class UnknownLayersError(UsageError):
    """Raised for a number that depends on unknown layers."""


def family_of(shape: ModelShape) -> Family:
    """The family of the model's type. Raises `UnknownLayersError` if it is unknown."""
    if unknown := unknown_layers(shape):
        raise UnknownLayersError(unknown)
    return FAMILIES[shape.architecture]


def unknown_layers(shape: ModelShape) -> str | None:
    """Why the model's layers are unknown, and the remedy; None if they are known."""
    if shape.architecture in FAMILIES:
        return None
    return (
        f"the linear layers of model type {shorten(shape.architecture, 60)!r} are not known, only those of "
        f"{', '.join(sorted(FAMILIES))}; add an entry for it to harness/lorameter/models/families.py"
    )


def linear_layers(shape: ModelShape) -> Layers:
    """The linear layers of one block, by their names in target_modules. Raises as `family_of` does."""
    return family_of(shape).layers(shape)


def linear_widths(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Input and output widths of these layers. Raises as `family_of` does."""
    return {name: (layer.inputs, layer.outputs) for name, layer in linear_layers(shape).items()}


# --- GGUF files -------------------------------------------------------------------------------------------------------


Value = int | float | bool | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Metadata of a GGUF file."""

    values: Mapping[str, Value]
    """Values by name, without lists."""
    tensors: Mapping[str, tuple[int, ...]]
    """Dimensions of each tensor by name, the fastest-varying dimension first."""


@functools.lru_cache(maxsize=8)
def _read_header(path: Path, size: int, mtime_ns: int) -> Header:
    """The header of a complete file with this size and modification time, read with the gguf library; cached, since a
    forecast needs the shape hundreds of times.

    Its `GGUFReader` makes a numpy array of every item of every list: 7.5 s of CPU time for a vocabulary of 151,000
    tokens, in every dry run. A plan needs a dozen numbers, so lists are skipped.

    Raises:
        NotReadableError: it is not a GGUF file of a known version, or is truncated.
        OSError: the file does not exist, or cannot be opened.
    """
    with fileio.open_plain(path) as file:
        try:
            reader = _make_reader(file)
        except (ValueError, IndexError, KeyError, struct.error) as error:  # raised by numpy if the file is truncated
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise fileio.NotReadableError(f"it is no GGUF file, or truncated: {why}") from None
    fields = {name: field for name, field in reader.fields.items() if field.parts and not name.startswith("GGUF.")}
    values = {name: field.contents() for name, field in fields.items() if field.data}
    return Header(values=values, tensors={one.name: tuple(map(int, one.shape)) for one in reader.tensors})


def _make_reader(file: Any) -> Any:
    import gguf

    kinds = gguf.GGUFValueType

    class Reader(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            return self._skip(memoryview(self.data), orig_offs) - orig_offs, [], [], [kinds.ARRAY]

        def _skip(self, content: memoryview, offset: int) -> int:
            """The end of the list that begins at this offset."""
            kind, count = struct.unpack_from("<IQ", content, offset)
            offset += 12
            if kind not in (kinds.STRING, kinds.ARRAY):
                return offset + int(count) * int(self.gguf_scalar_to_np[kinds(kind)]().itemsize)
            for _ in range(count):
                length = struct.unpack_from("<Q", content, offset)
                offset = self._skip(content, offset) if kind == kinds.ARRAY else offset + 8 + int(length[0])
            return offset

    return Reader(file)
