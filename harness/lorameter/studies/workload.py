"""A workload: model, data, batch size and sequence length.

Every variant of a study trains on the identical token stream, so everything that defines the stream belongs here. A
variant has its own workload only if the workload itself is compared (`lorameter.run.plan`).

Data are resolved by name: synthetic records, a file, a folder, or a hub data set.

    synthetic
    FILE                              .jsonl, .json, .csv, .parquet or .txt, each also with .gz appended
    FOLDER, FOLDER[SPLIT]             saved by `datasets` (save_to_disk), or with such files in it
    OWNER/NAME, OWNER/NAME:CONFIG     of the hub, either with [SPLIT] behind it

The default split is "train", or the only one. Names are resolved in many places, so no data file is opened here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lorameter.errors import UsageError, require, shorten
from lorameter.records import codec, fileio
from lorameter.studies import protocol

Layout = Literal["packed", "padded", "joined", "bucketed"]
Loss = Literal["all", "answer"]
LOSSES: dict[Loss, str] = {"all": "loss on all tokens", "answer": "loss on the answers alone"}
"""Descriptions of the losses."""
PromptFormat = Literal["answer-instruction", "write-instruction"]
Repair = Literal["", "quant_state"]

SYNTHETIC = "synthetic"
"""Name of the embedded data source: seeded instruction records, no download."""
OF_VARIANTS = (
    "model", "sequence_length", "batch_size", "layout", "loss", "prompt_format", "train_sequences", "prompt_tokens",
    "new_tokens", "request_batch", "adapters", "threads",
)  # fmt: skip
"""Fields for which variants of one study may have their own value: the same records in another form."""
OF_TOKENS = ("model", "prompt_format", "loss", "sequence_length", "layout")
"""Fields that determine the tokens in the loss (sequences of another length contain other records): losses that differ
in one of them are not compared."""
MIN_LENGTH = 8
"""Minimum tokens of a sequence."""
MAX_BATCH = 2**20
"""Maximum sequences of a step in the search for the largest batch that fits."""
_MINIMUM = {
    "sequence_length": MIN_LENGTH, "batch_size": 1, "train_sequences": 1, "held_out_records": 1,
    "held_out_sequences": 1, "data_seed": 0, "prompt_tokens": 1, "new_tokens": 2, "request_batch": 1, "adapters": 1,
    "open_ended_tokens": 0, "open_ended_prompt_tokens": 1, "threads": 1, "ranks": 1,
}  # fmt: skip


FAMILIES: tuple[tuple[str, ...], ...] = (
    ("instruction", "context", "response"),
    ("prompt", "completion"),
    ("messages",),
    ("text",),
)
"""The combinations of parts that form a record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataColumns:
    """The column of each part; None for a part whose column has the same name, or that is absent.

    Raises `UsageError` for parts that do not form a record.
    """

    instruction: str | None = None
    """The user's request."""
    context: str | None = None
    """Input of the instruction; the only optional part."""
    response: str | None = None
    """The answer to be learned."""
    prompt: str | None = None
    """The request, in a record with two parts."""
    completion: str | None = None
    """The answer to be learned, in a record with two parts."""
    messages: str | None = None
    """A list of messages: role and content, or from and value."""
    text: str | None = None
    """The whole record, if it has no parts."""

    def __post_init__(self) -> None:
        parts = ", ".join(f"{part} = {shorten(repr(column), 60)}" for part, column in self.parts.items())
        kinds = "; or ".join(", ".join(family) for family in FAMILIES)
        require(
            not self.parts or self.family,
            f"columns: {parts}: parts of different records. Name those of one: {kinds}.",
        )

    @property
    def parts(self) -> dict[str, str]:
        """The column of each part whose column is set."""
        return {part: column for part, column in dataclasses.asdict(self).items() if column is not None}

    @property
    def family(self) -> tuple[str, ...] | None:
        """The parts of the records that these columns form; None if no column is set, or they do not form records."""
        return next((family for family in FAMILIES if self.parts and self.parts.keys() <= set(family)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Model, data, batch and lengths of a training and its requests. Lengths are in tokens, sizes in sequences.

    Raises `UsageError` for a value that no model supports.
    """

    model: str = "tiny-llama"
    """Catalogue name, hub id, directory, GGUF file, or "random:" followed by any of these."""
    data: str = SYNTHETIC
    """"synthetic", a file, a folder, or a hub id such as databricks/databricks-dolly-15k; docs/data.md lists the
    supported formats, and how to name a configuration and a split."""
    columns: DataColumns = field(default=DataColumns())
    """Columns of the data whose names are not recognised automatically."""
    loss: Loss = "all"
    """"all" computes the loss over all tokens of a record but the first; "answer" only over the answer and the token
    that ends it, without the prompt; sequences without a token of an answer are left out."""
    prompt_format: PromptFormat = "answer-instruction"
    """Words around the instruction in records that are not chats."""
    sequence_length: int = 128
    """Tokens of a sequence."""
    batch_size: int = 4
    """Sequences of a step."""
    layout: Layout = "packed"
    """"packed" fills sequences with whole records, isolated from each other; "padded" is one record a sequence;
    "joined" fills sequences with records that attend to each other, as in pretraining, with plain causal attention and
    no mask; "bucketed" is "padded" with records of similar length in a batch, which is as long as its longest
    record."""
    train_sequences: int = 256
    """Sequences in one epoch; the stream starts again when they are used up."""
    held_out_records: int = 16
    """Records that are not used for training; prompts and the held-out loss use them."""
    held_out_sequences: int = 8
    """Maximum number of sequences for the held-out loss."""
    data_seed: int = 20
    """Seed for synthetic records, and for the choice of held-out records."""
    prompt_tokens: int = 32
    """Length of the inference prompt, cut from held-out records."""
    new_tokens: int = 32
    """Tokens generated per request, for each of its prompts; the end-of-sequence token is ignored so that every request
    has this length."""
    request_batch: int = 1
    """Prompts of a request, all different and of `prompt_tokens` each, that are answered together. Times are those of
    the whole batch, and output tokens a second count all its answers."""
    adapters: int = 1
    """Adapters on the base while requests are answered: the trained one, and others of the same size with random
    weights. With more than one, adapter switching is measured in addition to requests of the trained adapter and, with
    at least two prompts a request, batches whose prompts name different adapters (PEFT's `adapter_names`)."""
    open_ended_tokens: int = 0
    """Maximum tokens of a request until EOS; 0 makes no such requests. They have one prompt, whatever `request_batch`
    is: answers of different lengths would be padded to the longest."""
    open_ended_prompt_tokens: int = 128
    """Requests until EOS use whole prompts: held-out records with longer prompts are left out."""
    threads: int = 1
    """CPU threads of a trial, for each of its ranks. Two threads on two cores become very slow under contention, so use
    one unless the study is about threads."""
    ranks: int = 1
    """Processes that train together in one trial, each on its part of every batch: `batch_size` is the total."""
    strategy: Literal["", "ddp", "fsdp2"] = ""
    """How ranks train together: "ddp", each with the whole model, or "fsdp2", which shards it."""
    repair: Repair = ""
    """A workaround that the libraries need. "quant_state": 4-bit weights sharded by FSDP2 keep their quantisation state
    (`lorameter.trial.ranks.rank`); without it such a training is refused as wrong."""
    scaling: bool = True
    """Whether a single rank takes turns with the ranks of a trial, on the same batches, as the baseline of scaling
    efficiency and losses. It needs a device that holds the whole model."""

    def __post_init__(self) -> None:
        protocol.check_minimum("workload", self, _MINIMUM)
        for key, sequences in (("train", self.train_sequences), ("held_out", self.held_out_sequences)):
            tokens = sequences * self.sequence_length
            require(
                tokens <= protocol.MAX_TOKENS,
                f"workload: {key}_sequences = {sequences}, sequence_length = {self.sequence_length}: {tokens} tokens, "
                f"and {protocol.MAX_TOKENS} are prepared at most. Use fewer.",
            )
        self._check_ranks()
        require(self.model, "workload: model = '': no model named. `lorameter list models` shows the catalogue.")
        protocol.check_word("workload", "model", self.model)
        protocol.check_word("workload", "data", self.data)

    def _check_ranks(self) -> None:
        if self.ranks == 1:
            for key in ("strategy", "repair"):
                value = getattr(self, key)
                require(not value, f"workload: {key} = {value!r}: there is one rank. Set ranks, or leave it out.")
            return
        ranks = f"ranks = {self.ranks}"
        require(
            self.adapters == 1,
            f"workload: adapters = {self.adapters}, {ranks}: several adapters are measured in requests, and of several "
            "ranks training is measured and nothing else. Leave one of them out.",
        )
        require(self.strategy, f'workload: {ranks}: no strategy. Write strategy = "ddp" or "fsdp2".')
        require(
            self.batch_size % self.ranks == 0,
            f"workload: batch_size = {self.batch_size}, {ranks}: the batch is that of all ranks and does not divide "
            "among them. Use a multiple.",
        )
        require(
            not self.repair or self.strategy == "fsdp2",
            f'workload: repair = {self.repair!r}: it is for strategy = "fsdp2", and this is {self.strategy!r}. Leave '
            "it out.",
        )


def workload_variant_id(variant_id: str, own: Workload | None) -> str:
    """The id of a variant on its own workload; the variant's content id if it has none."""
    return variant_id if own is None else hashlib.sha256(f"{variant_id} {codec.dumps(own)}".encode()).hexdigest()[:12]


KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
PACKED = ".gz"
ENDINGS = tuple(f"{kind}{packed}" for kind in KINDS for packed in ("", PACKED))
REMEDY = (
    f"Give a file ({', '.join(KINDS)}, also with {PACKED}), a folder of such files or saved by datasets, "
    f"a hub id such as owner/name:config[split], or {SYNTHETIC!r}."
)
DEFAULT_SPLIT = "train"
_SPLIT_WORDS = ("train", "test", "validation", "valid", "val", "dev", "eval")
"""Words in a file name that name its split, as in `datasets`."""
_NO_DATA = ("dataset_info.json", "dataset_infos.json")
"""Files that `datasets` writes next to data."""
_SPLIT = re.compile(r"(?P<name>.+)\[(?P<split>[\w.-]+)\]")
_HUB = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<config>[^\[\]:/]+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """The source of a workload's records."""

    kind: Literal["synthetic", "file", "folder", "saved", "hub"]
    """"saved" is a folder saved by `datasets`, "folder" one with files of records."""
    name: str
    """Path, or hub id."""
    config: str = ""
    split: str = ""
    """Name of the split; "" if there is only one."""
    files: tuple[Path, ...] = ()
    """The data files in order; empty for a hub data set."""

    @property
    def label(self) -> str:
        """Its name, without the path of its folder."""
        name = self.name if self.kind in ("hub", "synthetic") else Path(os.path.abspath(self.name)).name  # noqa: PTH100 unresolved
        return f"{name}{f':{self.config}' if self.config else ''}{f'[{self.split}]' if self.split else ''}"


def resolve(data: str) -> DataSource:
    """Resolve the name of a data source. An existing file or folder takes precedence over a hub data set.

    Raises:
        UsageError: the data or the split does not exist, the file type is unknown, or the folder contains no data.
    """
    where = f"data {shorten(repr(data))}"
    if data == SYNTHETIC:
        return DataSource(kind="synthetic", name=data)
    name, split = data, ""
    if not fileio.is_there(data) and (found := _SPLIT.fullmatch(data)):
        name, split = found["name"], found["split"]
    if fileio.is_folder(name):
        return _resolve_folder(Path(name), split, where)
    if fileio.is_there(name):
        require(not split, f"{where}: a file has no splits. Leave [{split}] out.")
        require(fileio.is_file(name), f"{where}: it is not a regular file. {REMEDY}")  # a pipe would block
        require(
            name.endswith(ENDINGS),
            f"{where}: a file of no known kind: its name ends in none of {', '.join(ENDINGS)}. {REMEDY}",
        )
        return DataSource(kind="file", name=name, files=(Path(name),))
    hub = None if name.endswith(ENDINGS) or name.startswith((".", "/", "~")) else _HUB.fullmatch(name)
    if hub is None:
        raise UsageError(f"{where}: no such file or folder, and not an id of the hub. {REMEDY}")
    return DataSource(kind="hub", name=hub["name"], config=hub["config"] or "", split=split or DEFAULT_SPLIT)


def make_absolute(data: str) -> str:
    """The name of the same data with an absolute path."""
    found = _SPLIT.fullmatch(data)
    name, behind = (found["name"], f"[{found['split']}]") if found and not fileio.is_there(data) else (data, "")
    return f"{Path(name).absolute()}{behind}" if data != SYNTHETIC and fileio.is_there(name) else data


def _resolve_folder(path: Path, split: str, where: str) -> DataSource:
    try:
        names = sorted(entry.name for entry in os.scandir(path))
    except OSError as error:
        raise UsageError(f"{where}: cannot be read: {error.strerror}. {REMEDY}") from None
    files: dict[str, list[Path]] = {}
    """By split; "" for files without one."""
    saved = bool({"dataset_dict.json", "state.json"} & set(names))
    if saved:
        for file in sorted([*path.glob("*.arrow"), *path.glob("*/*.arrow")]):
            files.setdefault("" if file.parent == path else file.parent.name, []).append(file)
    else:
        data = [name for name in names if name.endswith(ENDINGS) and name not in _NO_DATA and (path / name).is_file()]
        for name in data:
            words = re.split(r"[^a-z]+", name.lower())
            for word in [one for one in _SPLIT_WORDS if one in words] or [""]:
                files.setdefault(word, []).append(path / name)
    require(files, f"{where}: no file in it is of a known kind ({', '.join(ENDINGS)}). {REMEDY}")
    known = sorted(filter(None, files))
    require(not split or split in files, f"{where}: no split {split!r}. It has {', '.join(known) or 'none'}.")
    chosen = split or (DEFAULT_SPLIT if DEFAULT_SPLIT in files else next(iter(files)))
    listed = ", ".join([*known, *(["others"] if "" in files else [])])
    require(
        split or chosen == DEFAULT_SPLIT or len(files) == 1,
        f"{where}: files of {listed} are in it. Name the split, as in FOLDER[{DEFAULT_SPLIT}], or a file.",
    )
    kinds = sorted({Path(file.name.removesuffix(PACKED)).suffix for file in files[chosen]})
    require(
        len(kinds) == 1,
        f"{where}: files of different kinds are in it: {', '.join(kinds)}. Name one file, or separate them.",
    )
    return DataSource(kind="saved" if saved else "folder", name=str(path), split=chosen, files=tuple(files[chosen]))
