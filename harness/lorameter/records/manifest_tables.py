"""The tables of a manifest that have no fixed set of keys: the keys that readers rely on, with their types.

A manifest is checked against them when it is read, so that no reader has to expect another type.
"""

from __future__ import annotations

from typing import Any

import msgspec

from lorameter.records.record import Example


class _Git(msgspec.Struct, frozen=True):
    commit: str | None = None
    dirty: bool | None = None


class _Kernels(msgspec.Struct):
    switches: dict[str, str]


class _Provenance(msgspec.Struct, kw_only=True):
    """The parts of a provenance, or of the facts about a side, that have parts of their own."""

    libraries: dict[str, str | None] = {}
    packages: dict[str, str] = {}
    git: _Git = _Git()
    settings: dict[str, Any] = {}
    worker: dict[str, Any] = {}
    engine: dict[str, str | None] = {}
    kernels: _Kernels | None = None


class _SideFacts(msgspec.Struct):
    label: str
    worker: str | None
    slowdown_rows: int = 0
    facts: _Provenance | None = None


class _Tokens(msgspec.Struct, frozen=True):
    real_tokens: int = 0
    padded_tokens: int = 0
    without_loss: int = 0
    examples: tuple[Example, ...] = ()
    own: dict[str, _Tokens] = {}


class ManifestTables(msgspec.Struct):
    """The tables of a manifest without a fixed set of keys: what their readers rely on."""

    provenance: _Provenance
    tokens: _Tokens = _Tokens()
    sides: dict[str, _SideFacts] = {}
