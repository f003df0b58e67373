"""A workload: model, data, batch and sequence length — where variants meet.

Every variant of a study trains on the identical token stream, so whatever belongs to the stream belongs here. Only
where the workload itself is in question has a variant one of its own (`lorameter.run.plan`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from typing import Literal

from lorameter.errors import require, shorten
from lorameter.records import codec
from lorameter.studies import limits
from lorameter.studies.data_source import SYNTHETIC

Layout = Literal["packed", "padded", "joined", "bucketed"]
Loss = Literal["all", "answer"]
LOSSES: dict[Loss, str] = {"all": "loss on all tokens", "answer": "loss on the answers alone"}
"""In words."""
PromptFormat = Literal["answer-instruction", "write-instruction"]
Strategy = Literal["", "ddp", "fsdp2"]
Repair = Literal["", "quant_state"]

OF_VARIANTS = (
    "model", "sequence_length", "batch_size", "layout", "loss", "prompt_format", "train_sequences", "prompt_tokens",
    "new_tokens", "request_batch", "adapters", "threads",
)  # fmt: skip
"""Fields that variants of one study may have a value of their own for: the same records, in another form."""
OF_TOKENS = ("model", "prompt_format", "loss", "sequence_length", "layout")
"""Those that say over which tokens a loss is, so many sequences of another length holding others of the records: losses
that differ in one of them are not compared."""
LEAST_LENGTH = 8
"""Tokens of a sequence, at least."""
MOST_BATCH = 2**20
"""Sequences of a step, at most, when the largest batch that fits is searched for."""
_LEAST = {
    "sequence_length": LEAST_LENGTH, "batch_size": 1, "train_sequences": 1, "held_out_records": 1,
    "held_out_sequences": 1, "data_seed": 0, "prompt_tokens": 1, "new_tokens": 2, "request_batch": 1, "adapters": 1,
    "open_ended_tokens": 0, "open_ended_prompt_tokens": 1, "threads": 1, "ranks": 1,
}  # fmt: skip


FAMILIES: tuple[tuple[str, ...], ...] = (
    ("instruction", "context", "response"),
    ("prompt", "completion"),
    ("messages",),
    ("text",),
)
"""The combinations of parts that make a record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataColumns:
    """The column of each part; None for a part whose column has the same name, or that is absent.

    Raises `UsageError` for parts that make no record together.
    """

    instruction: str | None = None
    """The user's request."""
    context: str | None = None
    """Input of the instruction; the only optional part."""
    response: str | None = None
    """The answer to be learned."""
    prompt: str | None = None
    """The request, of a record of two parts."""
    completion: str | None = None
    """The answer to be learned, of a record of two parts."""
    messages: str | None = None
    """A list of messages: role and content, or from and value."""
    text: str | None = None
    """The whole record, where it has no parts."""

    def __post_init__(self) -> None:
        parts = ", ".join(f"{part} = {shorten(repr(name), 60)}" for part, name in self.given.items())
        kinds = "; or ".join(", ".join(family) for family in FAMILIES)
        why = f"columns: {parts}: parts of different records. Name those of one: {kinds}."
        require(not self.given or self.family, why)

    @property
    def given(self) -> dict[str, str]:
        """The parts that are named, with their columns."""
        parts = ((one.name, getattr(self, one.name)) for one in dataclasses.fields(self))
        return {part: name for part, name in parts if name is not None}

    @property
    def family(self) -> tuple[str, ...] | None:
        """The parts of the records that these columns make; None where none is named, or they make none."""
        given = set(self.given)
        return next((family for family in FAMILIES if given and given <= set(family)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Model, data, batch and lengths of a training and its requests. Lengths are in tokens, sizes in sequences.

    Raises `UsageError` for a value that no model could take.
    """

    model: str = "tiny-llama"
    """Catalogue name, hub id, directory, GGUF file, or "random:" followed by any of these."""
    data: str = SYNTHETIC
    """"synthetic", a file, a folder, or a hub id such as databricks/databricks-dolly-15k; docs/data.md lists what
    can be read, and how a configuration and a split are named."""
    columns: DataColumns = field(default=DataColumns())
    """Columns of the data that have other names than those that are recognised."""
    loss: Loss = "all"
    """"all" takes the loss over all tokens of a record but the first; "answer" over what the model is to answer, with
    the token that ends it, and nothing of the prompt; sequences without a token of an answer are left out."""
    prompt_format: PromptFormat = "answer-instruction"
    """Words around an instruction in records that are no chat."""
    sequence_length: int = 128
    """Tokens of a sequence."""
    batch_size: int = 4
    """Sequences of a step."""
    layout: Layout = "packed"
    """"packed" fills sequences with whole records one after the other, isolated; "padded" is one record a sequence;
    "joined" fills sequences with records that see each other, as in pretraining, so that attention is plainly causal
    and is given no mask; "bucketed" is "padded" with records of like length in a batch, which is as long as its
    longest."""
    train_sequences: int = 256
    """Sequences in one epoch; the stream starts again when they are used up."""
    held_out_records: int = 16
    """Records that are not trained on, of which prompts and the held-out loss are made."""
    held_out_sequences: int = 8
    """Sequences of the held-out loss, at most."""
    data_seed: int = 20
    """Seeds synthetic records, and which records are held out."""
    prompt_tokens: int = 32
    """Length of the inference prompt, cut from held-out records."""
    new_tokens: int = 32
    """Tokens generated per request, for each of its prompts; the end-of-sequence token is ignored so that every request
    has this length."""
    request_batch: int = 1
    """Prompts of a request, all different and of `prompt_tokens` each, that are answered together. Times are those of
    the whole batch, and output tokens a second count all of its answers."""
    adapters: int = 1
    """Adapters on the base while requests are answered: the trained one, and others of its size with random weights of
    their own. With more than one, switching is measured next to requests of the trained adapter and, from two prompts a
    request on, batches whose prompts name different adapters (PEFT's `adapter_names`)."""
    open_ended_tokens: int = 0
    """Most tokens of a request that ends where the model ends it; 0 makes no such requests. They are of one prompt,
    whatever `request_batch` is: answers that end at lengths of their own would be padded to the longest."""
    open_ended_prompt_tokens: int = 128
    """Such requests are put whole: held-out records with longer prompts are left out."""
    threads: int = 1
    """CPU threads of a trial, of each of its ranks. Two on two cores collapse under contention, so one unless the study
    is about threads."""
    ranks: int = 1
    """Processes that train together in one trial, each on its part of every batch: `batch_size` is that of all."""
    strategy: Strategy = ""
    """How ranks train together: "ddp", each with the whole model, or "fsdp2", which shards it."""
    repair: Repair = ""
    """Repairs in the libraries that it needs. "quant_state": 4-bit weights that FSDP2 has sharded keep their
    quantisation state (`lorameter.trial.ranks.rank`), without which they are refused as wrong."""
    scaling: bool = True
    """Whether one rank alone takes turns with the ranks of a trial, on the same batches: what scaling efficiency and
    losses are measured against. It needs a device that holds the whole model."""

    def __post_init__(self) -> None:
        limits.check_least("workload", self, _LEAST)
        for key, sequences in (("train", self.train_sequences), ("held_out", self.held_out_sequences)):
            tokens = sequences * self.sequence_length
            require(
                tokens <= limits.MOST_TOKENS,
                f"workload: {key}_sequences = {sequences}, sequence_length = {self.sequence_length}: {tokens} tokens, "
                f"and {limits.MOST_TOKENS} are prepared at most. Use fewer.",
            )
        self._check_ranks()
        require(self.model, "workload: model = '': no model named. `lorameter list models` shows the catalogue.")
        limits.check_word("workload", "model", self.model)
        limits.check_word("workload", "data", self.data)

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
        how = 'how they train together is not said. Write strategy = "ddp" or "fsdp2".'
        require(self.strategy, f"workload: {ranks}: {how}")
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


def identify(variant_id: str, own: Workload | None) -> str:
    """The id of a variant that is measured on a workload of its own; that of its content where it has none."""
    return variant_id if own is None else hashlib.sha256(f"{variant_id} {codec.dumps(own)}".encode()).hexdigest()[:12]
