"""Finds out what the installed PEFT supports for a variant's method, by trying it, and caches the result on disk.

A separate process attaches the method to a tiny model, trains it for two steps and tries the operations of a run
(`lorameter.trial.building.method_probe`). So no facts about methods are hard-coded, and the calling process never loads
torch. Results are stored with the versions for which they are valid.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from lorameter.errors import InvalidRunError, LorameterError, require
from lorameter.models import catalogue
from lorameter.records import codec, fileio
from lorameter.studies.variant import ADAMW, PAGED, LoraVariant, Variant

LIBRARIES = ("peft", "torch", "transformers", "bitsandbytes", "lorameter")
PROBE = "lorameter.trial.building.method_probe"


class MethodFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The operations that a method supports. A value is None if it could not be tried, for example because the tiny
    model is too small."""

    refused: str | None = None
    """Why it cannot be used with such a model: key, value, the reason (mostly PEFT's message), and a remedy."""
    keeps_base: bool | None = None
    """Whether the base weights are unchanged after attaching the adapter and a training step."""
    several: bool | None = None
    """Whether a second adapter of the same configuration can be added."""
    mixes: bool | None = None
    """Whether rows of one batch can name different adapters."""
    merges: bool | None = None
    """Whether it can be merged into the base."""
    reloads: bool | None = None
    """Whether a saved adapter, loaded again on the base, gives the same answers."""


LORA = MethodFacts(keeps_base=True, several=True, mixes=True, merges=True, reloads=True)
"""The facts about LoRA in its short form; fields that are exceptions are checked separately."""


PROBE_LIMIT_S = 60.0
"""Maximum seconds in which a method is tried."""


def method_facts(variants: Sequence[Variant]) -> dict[str, MethodFacts]:
    """The facts about each variant's method, by the variant's name; unknown methods are probed now. LoRA in its short
    form with a short-named optimizer needs no probe.

    Raises:
        InvalidRunError: the probing process ends without an answer.
    """
    short = [one for one in variants if isinstance(one, LoraVariant) and one.optimizer in (*ADAMW, *PAGED)]
    found = {one.name: LORA for one in short if not one.optimizer_args}
    paths = {variant.name: _cache_path(variant) for variant in variants if variant.name not in found}
    found |= {name: facts for name, path in paths.items() if (facts := _read(path)) is not None}
    missing = [variant for variant in variants if variant.name not in found]
    for variant, facts in zip(missing, _probe(missing) if missing else (), strict=True):
        found[variant.name] = facts
        paths[variant.name].parent.mkdir(parents=True, exist_ok=True)
        fileio.write_document(paths[variant.name], facts)
    return found


def check_methods(where: str, variants: Sequence[Variant]) -> None:
    """Raise `UsageError` for a variant that PEFT or its optimizer refuses for every model."""
    for name, facts in method_facts(variants).items():
        require(not facts.refused, f"{where}: variant {name!r}: {facts.refused}")


def _cache_path(variant: Variant) -> Path:
    content = codec.dumps({"variant": variant.id, "versions": {name: _version(name) for name in LIBRARIES}})
    name = hashlib.sha256(content.encode()).hexdigest()[:16]
    return catalogue.cache_dir() / "methods" / f"peft-{_version('peft')}-{name}.json"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _read(path: Path) -> MethodFacts | None:
    try:
        return codec.from_json(MethodFacts, fileio.read_json(path), "facts of a method")
    except (OSError, ValueError, LorameterError):  # missing, or from another lorameter
        return None


def _probe(variants: Sequence[Variant]) -> tuple[MethodFacts, ...]:
    try:
        done = subprocess.run(
            [sys.executable, "-m", PROBE],
            input=json.dumps(codec.to_json(list(variants))),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            cwd=Path(__file__).parents[2],
            timeout=PROBE_LIMIT_S * len(variants),
        )
        return codec.from_json(
            tuple[MethodFacts, ...], json.loads(done.stdout.rpartition("\n\n")[2]), "facts of methods"
        )
    except subprocess.TimeoutExpired as expired:
        last = f"no answer within {expired.timeout:g} s. Use smaller values in peft."
    except (ValueError, LorameterError):
        last = (done.stderr.strip() or "no output").splitlines()[-1]
    raise InvalidRunError(f"the methods of PEFT could not be tried: {PROBE} ended with {last}")
