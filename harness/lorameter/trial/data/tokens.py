"""The token stream of a plan: prepared once, in its own process, identical for every variant.

`datasets` starts threads and loads pyarrow; neither the parent (which must stay light) nor the zygote (which must
fork with one thread) can afford that, so tokens are made here and handed on as a safetensors file that every trial
maps. The file's hash is part of each record: two trials met on the same data if and only if their hashes agree.

Packing fills rows of `sequence_length` with whole records one after the other. Isolation needs two things (see
docs/method.md): positions that start again at 0 with each record, so that the model builds a block-diagonal mask, and
the label −100 on each record's first token, so that the loss never asks one record to predict the next. Joined rows
are filled alike and isolate nothing; they are all that attention without a mask takes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorameter.errors import UsageError
from lorameter.models import catalogue, shapes
from lorameter.records.os_errors import naming
from lorameter.records.units import format_count
from lorameter.records.worker_info import Example, TokenSummary
from lorameter.studies.data_source import SYNTHETIC
from lorameter.studies.workload import PromptFormat, Workload
from lorameter.trial.data.chat import ChatTemplate, Conversation, Span
from lorameter.trial.data.records import AnyRecord, Record, read_records
from lorameter.trial.data.tokenizers import load_tokenizer

IGNORED = -100
"""The label that torch.nn.functional.cross_entropy leaves out."""
BUCKET_BATCHES = 20
"""Batches of a bucket; their BUCKET_FACTOR."""
WASTED = 10
"""So many sequences without a label are passed over for each that is wanted, and 1000 at least: synthetic records have
no end, and none of them may be short enough."""


def prepare(workload: Workload, folder: Path) -> TokenSummary:
    """Tokenise `workload` into `folder/tokens-HASH.safetensors`.

    Tensors: for each of `train` and `held_out`, `input_ids`, `position_ids`, `labels`, `attention_mask`, all int64 of
    shape (sequences, sequence_length); `prompts`, int64 of shape (prompts, prompt_tokens); where the workload has
    requests until EOS, `open_ended.input_ids`, int64 of shape (requests, longest), and `open_ended.length`.

    Raises:
        UsageError: data that cannot be read, or too little of it to fill a sequence or a prompt.
    """
    from safetensors.numpy import save_file

    source = catalogue.resolve(workload.model)
    tokenizer, substituted = load_tokenizer(source, vocab_size=shapes.shape(source).vocab_size)
    records, label = read_records(workload)
    held_out = list(itertools.islice(records, workload.held_out_records))
    tokens = Encoder(tokenizer, workload)

    train, passed_over = _sequences(records, tokens, workload, workload.train_sequences)
    if not train and not passed_over:
        raise UsageError(
            f"data {workload.data!r}: not enough records for one sequence of {workload.sequence_length} tokens and "
            f"{workload.held_out_records} held-out records. Use a shorter sequence_length or more data."
        )
    if workload.layout == "bucketed":
        train = _bucketed(train, workload.batch_size)
    test, _ = _sequences(iter(held_out), tokens, workload, workload.held_out_sequences, partial=True)
    for which, rows in (("training", train), ("held-out", test)):
        if not rows:
            raise UsageError(
                f"workload: sequence_length = {workload.sequence_length}, loss = {workload.loss!r}: no {which} "
                "sequence holds a token of an answer. Use a longer sequence_length, more held_out_records, or "
                'loss = "all".'
            )
    prompts = _prompts(held_out, tokens, workload)
    tensors = {f"train.{key}": value for key, value in _stack(train).items()}
    tensors |= {f"held_out.{key}": value for key, value in _stack(test).items()}
    tensors["prompts"] = prompts
    examples: tuple[Example, ...] = ()
    if workload.open_ended_tokens:
        examples, whole = _whole_prompts(held_out, tokens, workload)
        tensors |= {f"open_ended.{key}": value for key, value in whole.items()}

    digest = hash_tensors(tensors)
    path = folder / f"tokens-{digest[:16]}.safetensors"
    with naming(path):
        save_file(tensors, path)
    mask = tensors["train.attention_mask"]
    return TokenSummary(
        path=str(path),
        hash=digest,
        data=label,
        synthetic=workload.data == SYNTHETIC,
        tokenizer_substituted=substituted,
        train_sequences=len(train),
        real_tokens=int(mask.sum()),
        padded_tokens=int(mask.size - mask.sum()),
        records=tokens.records,
        loss_tokens=int((tensors["train.labels"] != IGNORED).sum()),
        without_loss=passed_over,
        examples=examples,
    )


def hash_tensors(tensors: dict[str, NDArray[np.int64]]) -> str:
    """SHA-256 over names, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].shape}{tensors[name].dtype}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


Row = dict[str, list[int]]


def _sequences(
    records: Iterator[AnyRecord], tokens: Encoder, workload: Workload, wanted: int, *, partial: bool = False
) -> tuple[list[Row], int]:
    """As many sequences as are wanted and can be had, and how many were passed over for having no label at all: the
    mean loss of a batch of such would be 0/0."""
    fill = _joined if workload.layout == "joined" else _packed
    rows = fill(records, tokens, workload.sequence_length, partial=partial)
    if workload.layout in ("padded", "bucketed"):
        rows = (_padded(*tokens.labelled(record), tokens.pad, workload.sequence_length) for record in records)
    taken: list[Row] = []
    passed_over = 0
    while len(taken) < wanted and passed_over < max(1000, WASTED * wanted):
        row = next(rows, None)
        if row is None:
            break
        if any(label != IGNORED for label in row["labels"]):
            taken.append(row)
        else:
            passed_over += 1
    return taken, passed_over


def _packed(records: Iterable[AnyRecord], tokens: Encoder, length: int, *, partial: bool) -> Iterator[Row]:
    row: Row = _empty()
    for record in records:
        ids, labels = tokens.labelled(record)
        while ids:
            room = length - len(row["input_ids"])
            piece, ids = ids[:room], ids[room:]
            learnt, labels = labels[:room], labels[room:]
            row["input_ids"] += piece
            row["position_ids"] += range(len(piece))
            row["labels"] += [IGNORED, *learnt[1:]]
            row["attention_mask"] += [1] * len(piece)
            if len(row["input_ids"]) == length:
                yield row
                row = _empty()
    if partial and row["input_ids"]:
        used = len(row["input_ids"])
        filled = _padded(row["input_ids"], row["labels"], tokens.pad, length)
        # The padding is one more isolated record without a loss, so that the row stays packed.
        filled["position_ids"] = row["position_ids"] + list(range(length - used))
        yield filled


def _joined(records: Iterable[AnyRecord], tokens: Encoder, length: int, *, partial: bool) -> Iterator[Row]:
    """What pads the last row comes after all else, where causal attention lets nothing see it."""
    ids, labels = list[int](), list[int]()
    for record in records:
        more, learnt = tokens.labelled(record)
        ids, labels = ids + more, labels + learnt
        while len(ids) >= length:
            yield _padded(ids, labels, tokens.pad, length)
            ids, labels = ids[length:], labels[length:]
    if partial and ids:
        yield _padded(ids, labels, tokens.pad, length)


def _bucketed(rows: list[Row], batch_size: int) -> list[Row]:
    """The rows in buckets of some batches, the longest of a bucket first, as PEFT's experiments do: a batch holds rows
    of like length, and the order of the data is kept on a larger scale."""
    size = BUCKET_BATCHES * batch_size
    buckets = (rows[start : start + size] for start in range(0, len(rows), size))
    return [row for bucket in buckets for row in sorted(bucket, key=lambda one: -sum(one["attention_mask"]))]


def _padded(ids: list[int], labels: list[int], pad: int, length: int) -> Row:
    ids, labels = ids[:length], labels[:length]
    gap = length - len(ids)
    return {
        "input_ids": ids + [pad] * gap,
        "position_ids": list(range(length)),
        "labels": [IGNORED, *labels[1:]] + [IGNORED] * gap,
        "attention_mask": [1] * len(ids) + [0] * gap,
    }


def _empty() -> Row:
    return {"input_ids": [], "position_ids": [], "labels": [], "attention_mask": []}


def _stack(rows: list[Row]) -> dict[str, NDArray[np.int64]]:
    return {key: np.array([row[key] for row in rows], dtype=np.int64) for key in rows[0]}


def _prompts(records: list[AnyRecord], tokens: Encoder, workload: Workload) -> NDArray[np.int64]:
    """Fixed-length prompts: the beginnings of held-out records that are long enough, else of all of them joined.

    A request of several has no prompt twice. Where there are fewer beginnings than it takes, what lies at even
    distances in the joined records comes after them; it overlaps, which no prompt knows of another.
    """
    length, batch = workload.prompt_tokens, workload.request_batch
    encoded = [tokens.whole(record) for record in records]
    prompts = [ids[:length] for ids in encoded if len(ids) >= length]
    joined = list(itertools.chain.from_iterable(encoded))
    if not prompts and len(joined) >= length:
        prompts = [joined[:length]]
    if not prompts:
        raise UsageError(
            f"workload: prompt_tokens = {length}: the held-out records hold {len(joined)} tokens. "
            "Use a shorter prompt_tokens or more held_out_records."
        )
    if batch > 1:
        prompts = _distinct(prompts, joined, length, batch)
    if len(prompts) < batch:
        raise UsageError(
            f"workload: request_batch = {batch}, prompt_tokens = {length}: the held-out records hold {len(joined)} "
            f"tokens, of which {format_count(len(prompts), 'different prompt')} could be cut. Use a smaller "
            "request_batch, a shorter prompt_tokens or more held_out_records."
        )
    return np.array(prompts, dtype=np.int64)


def _distinct(prompts: list[list[int]], joined: list[int], length: int, wanted: int) -> list[list[int]]:
    """Prompts that all differ: these, and where they are fewer than wanted as many pieces more as can be had."""
    found = dict.fromkeys(map(tuple, prompts))
    places = max(0, len(joined) - length) + 1
    for step in dict.fromkeys((max(1, places // wanted), 1)):  # far apart, or as near as need be
        for start in range(0, places, step):
            if len(found) >= wanted:
                break
            found.setdefault(tuple(joined[start : start + length]))
    return [list(prompt) for prompt in found]


WHOLE_PROMPTS = 32
"""As many whole prompts are kept; no protocol asks for more."""


def _whole_prompts(
    records: list[AnyRecord], tokens: Encoder, workload: Workload
) -> tuple[tuple[Example, ...], dict[str, NDArray[np.int64]]]:
    """Prompts of the first held-out records that are short enough, padded at the end, with their lengths."""
    encoded = [tokens.example(record) for record in records]
    chosen = [pair for pair in encoded if len(pair[0]) <= workload.open_ended_prompt_tokens][:WHOLE_PROMPTS]
    if not chosen:
        raise UsageError(
            f"workload: open_ended_prompt_tokens = {workload.open_ended_prompt_tokens}: the shortest prompt of the "
            f"held-out records has {min(len(ids) for ids, _ in encoded)} tokens. "
            "Raise it, or use more held_out_records."
        )
    lengths = np.array([len(ids) for ids, _ in chosen], dtype=np.int64)
    padded = np.array([ids + [tokens.pad] * (int(lengths.max()) - len(ids)) for ids, _ in chosen], dtype=np.int64)
    return tuple(example for _, example in chosen), {"input_ids": padded, "length": lengths}


# --- encoding ---------------------------------------------------------------------------------------------------------


class Encoder:
    """Records of one workload to tokens; counts the records used.

    Raises `UsageError` for a record that the chat template does not take, and if the answer's tokens cannot be located.
    """

    def __init__(self, tokenizer: Any, workload: Workload) -> None:
        if workload.loss == "answer" and not getattr(tokenizer, "is_fast", False):  # MistralCommonBackend has none
            raise UsageError(
                f"workload: loss = 'answer': the tokenizer of {workload.model} does not report which characters a "
                'token holds. Use loss = "all", or save a tokenizer.json next to it.'
            )
        self._tokenizer = tokenizer
        self._workload = workload
        self._template: ChatTemplate | None = None
        self.pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
        self.records = 0

    def labelled(self, record: AnyRecord) -> tuple[list[int], list[int]]:
        """The tokens of a record, and their labels."""
        self.records += 1
        if isinstance(record, Conversation):  # its template writes what begins and what ends it
            return self._encode(self._chat.text(record), self._answers(record))
        ids, labels = self._begun(*self._encode("".join(self._parts(record)), self._answers(record)))
        end = int(self._tokenizer.eos_token_id)
        return [*ids, end], [*labels, end]

    def whole(self, record: AnyRecord) -> list[int]:
        """The tokens of a record without what ends it."""
        if isinstance(record, Conversation):
            return self._encode(self._chat.text(record))[0]
        return self._begun(*self._encode("".join(self._parts(record))))[0]

    def example(self, record: AnyRecord) -> tuple[list[int], Example]:
        """The prompt alone, as ids, and its text with the reference."""
        prompt, target = self._chat.prompt(record) if isinstance(record, Conversation) else self._parts(record)
        encoded = self._encode(prompt)
        ids = encoded[0] if isinstance(record, Conversation) else self._begun(*encoded)[0]
        return ids, Example(prompt=prompt, reference=target)

    @property
    def _chat(self) -> ChatTemplate:
        if self._template is None:
            self._template = ChatTemplate(self._tokenizer, self._workload.model)
        return self._template

    def _parts(self, record: Record) -> tuple[str, str]:
        return prompt_and_target(record, self._workload.prompt_format)

    def _answers(self, record: AnyRecord) -> list[Span] | None:
        """The characters that the loss is taken over; None for all."""
        if self._workload.loss == "all":
            return None
        if isinstance(record, Conversation):
            return self._chat.answers(record, self._chat.text(record))
        prompt, target = self._parts(record)
        return [(len(prompt), len(prompt) + len(target))]

    def _encode(self, text: str, spans: list[Span] | None = None) -> tuple[list[int], list[int]]:
        """The ids of a text, and its labels: all of them, or those of tokens with a character of the spans."""
        if spans is None:
            ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids, list(ids)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        labelled = mark_tokens(encoded["offset_mapping"], spans)
        return ids, [token if marked else IGNORED for token, marked in zip(ids, labelled, strict=True)]

    def _begun(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """With the token that begins a text, where the tokenizer has one."""
        begin = self._tokenizer.bos_token_id
        return (ids, labels) if begin is None else ([int(begin), *ids], [IGNORED, *labels])


def mark_tokens(offsets: Iterable[Span], spans: list[Span]) -> list[bool]:
    """Whether each token holds a character of one of the spans; both are in order."""
    marked, left = [], [span for span in reversed(spans) if span[0] < span[1]]
    for begin, end in offsets:
        while left and begin >= left[-1][1]:
            left.pop()
        marked.append(bool(left) and end > left[-1][0])
    return marked


def prompt_and_target(record: Record, prompt_format: PromptFormat) -> tuple[str, str]:
    """The text given to the model and the text it learns to continue with."""
    if "text" in record:
        return "", record["text"]
    if "prompt" in record:
        return record["prompt"], record["completion"]
    if prompt_format == "write-instruction":
        prompt = (
            "### Task\nWrite the instruction that the input below answers.\n\n"
            f"### Input\n{record['response']}\n\n### Instruction\n"
        )
        return prompt, record["instruction"]
    context = f"### Context\n{record['context']}\n\n" if record.get("context") else ""
    return f"### Instruction\n{record['instruction']}\n\n{context}### Response\n", record["response"]
