"""Prepares the token file of a plan once, in a separate process, for all variants.

`datasets` starts threads and loads pyarrow, so it can run neither in the parent (which must start fast) nor in the
zygote (which must fork with one thread). So a separate process writes the tokens to a safetensors file that every trial
maps. The file's hash is part of each record: two trials used the same data if and only if their hashes agree.

Packing fills rows of `sequence_length` with whole records one after the other. Isolation requires (see docs/method.md)
positions that restart at 0 with each record, so that the model builds a block-diagonal mask, and the label −100 on each
record's first token, so that no record predicts the next. Joined rows are filled in the same way without isolation, for
attention without a mask.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from numpy.typing import NDArray
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lorameter.errors import format_error, refused_value, require
from lorameter.models import catalogue, shapes
from lorameter.models.catalogue import ModelSource
from lorameter.records.record import Example, TokenSummary
from lorameter.records.units import format_count
from lorameter.studies.workload import SYNTHETIC, PromptFormat, Workload
from lorameter.trial.data.chat import ChatTemplate, Conversation, Span
from lorameter.trial.data.records import AnyRecord, Record, read_records

IGNORED = -100
"""The label that torch.nn.functional.cross_entropy ignores."""
BUCKET_BATCHES = 20
"""Number of batches in a bucket, equal to BUCKET_FACTOR in PEFT's experiments."""
MAX_SKIPPED = 10
"""Maximum number of sequences without a label that are skipped for each requested one (at least 1000 in total):
synthetic records are endless, and all of them may be too long."""


def prepare(workload: Workload, folder: Path) -> TokenSummary:
    """Tokenise `workload` into `folder/tokens-HASH.safetensors`.

    Tensors: for each of `train` and `held_out`, `input_ids`, `position_ids`, `labels`, `attention_mask`, all int64 of
    shape (sequences, sequence_length); `prompts`, int64 of shape (prompts, prompt_tokens); where the workload has
    requests until EOS, `open_ended.input_ids`, int64 of shape (requests, longest), and `open_ended.length`.

    Raises:
        UsageError: the data cannot be read, or is too short to fill a sequence or a prompt.
    """
    from safetensors.numpy import save_file

    source = catalogue.resolve(workload.model)
    tokenizer, substituted = load_tokenizer(source, vocab_size=shapes.shape(source).vocab_size)
    records, label = read_records(workload)
    held_out = list(itertools.islice(records, workload.held_out_records))
    tokens = Encoder(tokenizer, workload)

    train, skipped = _sequences(records, tokens, workload, workload.train_sequences)
    require(
        train or skipped,
        f"data {workload.data!r}: not enough records for one sequence of {workload.sequence_length} tokens and "
        f"{workload.held_out_records} held-out records. Use a shorter sequence_length or more data.",
    )
    if workload.layout == "bucketed":
        train = _bucketed(train, workload.batch_size)
    test, _ = _sequences(iter(held_out), tokens, workload, workload.held_out_sequences, partial=True)
    for which, rows in (("training", train), ("held-out", test)):
        require(
            rows,
            f"workload: sequence_length = {workload.sequence_length}, loss = {workload.loss!r}: no {which} sequence "
            'holds a token of an answer. Use a longer sequence_length, more held_out_records, or loss = "all".',
        )
    tensors = {**_stack("train", train), **_stack("held_out", test), "prompts": _prompts(held_out, tokens, workload)}
    examples: tuple[Example, ...] = ()
    if workload.open_ended_tokens:
        examples, whole = _whole_prompts(held_out, tokens, workload)
        tensors |= {f"open_ended.{key}": value for key, value in whole.items()}

    hashed = hashlib.sha256()
    for name in sorted(tensors):
        hashed.update(f"{name}{tensors[name].shape}{tensors[name].dtype}".encode())
        hashed.update(tensors[name].tobytes())
    digest = hashed.hexdigest()
    path = folder / f"tokens-{digest[:16]}.safetensors"
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
        without_loss=skipped,
        examples=examples,
    )


Row = dict[str, list[int]]


def _sequences(
    records: Iterator[AnyRecord], tokens: Encoder, workload: Workload, wanted: int, *, partial: bool = False
) -> tuple[list[Row], int]:
    """Up to `wanted` sequences, and the number of sequences skipped because they have no label: the mean loss of a
    batch of such sequences would be 0/0."""
    sequences: list[Row] = []
    skipped = 0
    for row in _rows(records, tokens, workload, partial=partial):
        if any(label != IGNORED for label in row["labels"]):
            sequences.append(row)
        else:
            skipped += 1
        if len(sequences) == wanted or skipped == max(1000, MAX_SKIPPED * wanted):
            break
    return sequences, skipped


def _rows(records: Iterable[AnyRecord], tokens: Encoder, workload: Workload, *, partial: bool) -> Iterator[Row]:
    """Rows of `sequence_length`: one record each, or filled with records; with `partial`, the last row may be
    padded."""
    length, packed = workload.sequence_length, workload.layout == "packed"
    row: Row = {"input_ids": [], "position_ids": [], "labels": []}
    for record in records:
        ids, labels = tokens.labelled(record)
        if workload.layout in ("padded", "bucketed"):
            positions = list(range(length))[: len(ids)]
            one = {"input_ids": ids[:length], "position_ids": positions, "labels": [IGNORED, *labels[1:length]]}
            yield _padded(one, tokens.pad, length, packed=False)
            continue
        while ids:
            used = len(row["input_ids"])
            room = length - used
            begins = packed or not used  # an isolated record, or a row, begins
            row["input_ids"] += ids[:room]
            row["position_ids"] += range(len(ids[:room])) if packed else range(used, used + len(ids[:room]))
            row["labels"] += [IGNORED, *labels[1:room]] if begins else labels[:room]
            ids, labels = ids[room:], labels[room:]
            if len(row["input_ids"]) == length:
                yield _padded(row, tokens.pad, length, packed=packed)
                row = {"input_ids": [], "position_ids": [], "labels": []}
    if partial and row["input_ids"]:
        yield _padded(row, tokens.pad, length, packed=packed)


def _padded(row: Row, pad: int, length: int, *, packed: bool) -> Row:
    """The row with padding at its end, to which no token attends. In a packed row the padding is another isolated
    record without a loss."""
    used = len(row["input_ids"])
    gap = length - used
    return {
        "input_ids": row["input_ids"] + [pad] * gap,
        "position_ids": row["position_ids"] + list(range(gap) if packed else range(used, length)),
        "labels": row["labels"] + [IGNORED] * gap,
        "attention_mask": [1] * used + [0] * gap,
    }


def _bucketed(rows: list[Row], batch_size: int) -> list[Row]:
    """The rows in buckets of several batches, the longest of a bucket first, as in PEFT's experiments: a batch has rows
    of similar length, and the buckets keep the order of the data."""
    size = BUCKET_BATCHES * batch_size
    buckets = (rows[start : start + size] for start in range(0, len(rows), size))
    return [row for bucket in buckets for row in sorted(bucket, key=lambda row: -sum(row["attention_mask"]))]


def _stack(split: str, rows: list[Row]) -> dict[str, NDArray[np.int64]]:
    return {f"{split}.{key}": np.array([row[key] for row in rows], dtype=np.int64) for key in rows[0]}


def _prompts(records: list[AnyRecord], tokens: Encoder, workload: Workload) -> NDArray[np.int64]:
    """Fixed-length prompts: the beginnings of held-out records that are long enough, else of all records joined.

    The prompts of a request are all different. If there are too few beginnings, evenly spaced pieces of the joined
    records are added, which may overlap.
    """
    length, batch = workload.prompt_tokens, workload.request_batch
    encoded = [tokens.encode(record)[0] for record in records]
    prompts = [ids[:length] for ids in encoded if len(ids) >= length]
    joined = list(itertools.chain.from_iterable(encoded))
    if not prompts and len(joined) >= length:
        prompts = [joined[:length]]
    if batch > 1:
        prompts = _distinct(prompts, joined, length, batch)
    require(
        len(prompts) >= batch,
        f"workload: request_batch = {batch}, prompt_tokens = {length}: the held-out records hold {len(joined)} tokens, "
        f"of which {format_count(len(prompts), 'different prompt')} could be cut. Use a smaller request_batch, a "
        "shorter prompt_tokens or more held_out_records.",
    )
    return np.array(prompts, dtype=np.int64)


def _distinct(prompts: list[list[int]], joined: list[int], length: int, wanted: int) -> list[list[int]]:
    """Distinct prompts: the given ones, and further pieces of the joined records, up to `wanted`."""
    distinct = dict.fromkeys(map(tuple, prompts))
    places = len(joined) - length + 1
    # At large distances, then at every position.
    for start in itertools.chain(range(0, places, max(1, places // wanted)), range(places)):
        if len(distinct) < wanted:
            distinct.setdefault(tuple(joined[start : start + length]))
    return [list(prompt) for prompt in distinct]


WHOLE_PROMPTS = 32
"""Maximum number of whole prompts in a token file; no protocol has more requests until EOS."""


def _whole_prompts(
    records: list[AnyRecord], tokens: Encoder, workload: Workload
) -> tuple[tuple[Example, ...], dict[str, NDArray[np.int64]]]:
    """Prompts of the first held-out records that are short enough, padded at the end, with their lengths."""
    encoded = [tokens.example(record) for record in records]
    chosen = [pair for pair in encoded if len(pair[0]) <= workload.open_ended_prompt_tokens][:WHOLE_PROMPTS]
    require(
        chosen,
        f"workload: open_ended_prompt_tokens = {workload.open_ended_prompt_tokens}: the shortest prompt of the "
        f"held-out records has {min(len(ids) for ids, _ in encoded)} tokens. Raise it, or use more held_out_records.",
    )
    lengths = np.array([len(ids) for ids, _ in chosen], dtype=np.int64)
    padded = np.array([ids + [tokens.pad] * (int(lengths.max()) - len(ids)) for ids, _ in chosen], dtype=np.int64)
    return tuple(example for _, example in chosen), {"input_ids": padded, "length": lengths}


# --- encoding ---------------------------------------------------------------------------------------------------------


class Encoder:
    """Encodes the records of one workload; counts the records used.

    Raises `UsageError` for a record that the chat template does not accept, and if the answer's tokens cannot be
    located.
    """

    def __init__(self, tokenizer: Any, workload: Workload) -> None:
        require(
            workload.loss == "all" or getattr(tokenizer, "is_fast", False),  # MistralCommonBackend is not fast
            f"workload: loss = 'answer': the tokenizer of {workload.model} does not report which characters a token "
            'holds. Use loss = "all", or save a tokenizer.json next to it.',
        )
        self._tokenizer = tokenizer
        self._workload = workload
        self.pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
        self.records = 0

    def labelled(self, record: AnyRecord) -> tuple[list[int], list[int]]:
        """The tokens of a record, and their labels."""
        self.records += 1
        ids, labels = self.encode(record)
        if isinstance(record, Conversation):  # the chat template writes begin and end tokens
            return ids, labels
        end = int(self._tokenizer.eos_token_id)
        return [*ids, end], [*labels, end]

    def example(self, record: AnyRecord) -> tuple[list[int], Example]:
        """The token ids of the prompt, and the texts of prompt and reference answer."""
        if isinstance(record, Conversation):
            prompt, target = self._chat.prompt(record)
        else:
            prompt, target = prompt_and_target(record, self._workload.prompt_format)
        ids, _ = self._tokenize(prompt, None, begins=not isinstance(record, Conversation))
        return ids, Example(prompt=prompt, reference=target)

    @functools.cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer, self._workload.model)

    def encode(self, record: AnyRecord) -> tuple[list[int], list[int]]:
        """The tokens of a record without its end token, and their labels."""
        answers = self._workload.loss == "answer"
        if isinstance(record, Conversation):
            text = self._chat.text(record)
            return self._tokenize(text, self._chat.answers(record, text) if answers else None, begins=False)
        prompt, target = prompt_and_target(record, self._workload.prompt_format)
        span = (len(prompt), len(prompt) + len(target))
        return self._tokenize(prompt + target, [span] if answers else None, begins=True)

    def _tokenize(self, text: str, spans: list[Span] | None, *, begins: bool) -> tuple[list[int], list[int]]:
        """The token ids of a text, and its labels: all of them, or those of tokens that overlap the spans. If the text
        `begins` a record, the tokenizer's BOS token precedes it."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=spans is not None)
        ids: list[int] = encoded["input_ids"]
        labels = list(ids)
        if spans is not None:
            marked = mark_tokens(encoded["offset_mapping"], spans)
            labels = [token if is_marked else IGNORED for token, is_marked in zip(ids, marked, strict=True)]
        begin = self._tokenizer.bos_token_id
        return (ids, labels) if begin is None or not begins else ([int(begin), *ids], [IGNORED, *labels])


def mark_tokens(offsets: Iterable[Span], spans: list[Span]) -> list[bool]:
    """Whether each token overlaps one of the spans; both are sorted."""
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


# --- tokenizers -------------------------------------------------------------------------------------------------------
# The tokenising process starts in every run and needs no model, so this module must not import peft, bitsandbytes,
# accelerate or `lorameter.trial.building.base_model`.


BYTE_VOCABULARY = 256 + 3
"""The bytes, plus begin, end and padding."""
BYTE_CHAT = (
    "{{ bos_token }}{% for message in messages %}### {{ message.role | capitalize }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant\n{% endif %}"
)
"""The chat template of the byte tokenizer."""


def load_tokenizer(source: ModelSource, *, vocab_size: int) -> tuple[transformers.PreTrainedTokenizerBase, bool]:
    """The model's tokenizer, and whether the byte tokenizer replaces it.

    The byte tokenizer is used only if the weights are random and the real tokenizer cannot be loaded: then only the
    number of tokens matters. The padding id is some valid id, often that of EOS, so mask by length.

    Raises:
        UsageError: a real model's tokenizer cannot be loaded, or has more tokens than the model.
    """
    if source.tokenizer == "byte":
        return _byte_tokenizer(source, vocab_size), False
    try:
        tokenizer = _tokenizer_of_files(source)
    except Exception as error:  # the exception's type depends on the fault in the files
        if source.random:
            return _byte_tokenizer(source, vocab_size), True
        if source.kind == "hub":
            raise catalogue.hub_failure(source, error) from None
        raise refused_value(
            "models",
            "model",
            source.label,
            f"its tokenizer cannot be loaded ({format_error(error)})",
            "Save one next to the weights.",
        ) from None
    if tokenizer.vocab_size > vocab_size:
        raise refused_value(
            "models",
            "model",
            source.label,
            f"its tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}",
            "Put the tokenizer that the model was trained with next to its weights.",
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocab_size:  # Llama-2's <pad> exceeds its vocabulary
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, False


def _tokenizer_of_files(source: ModelSource) -> transformers.PreTrainedTokenizerBase:
    if source.kind == "config":
        raise OSError("a packaged configuration has no tokenizer")
    offline = source.kind != "hub" or not catalogue.hub_answers(source.location)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.location, local_files_only=offline)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers returns it for some families without files
        raise OSError("no vocabulary found")
    # Every function that is used is called here: damaged files can raise any exception.
    ids = [*tokenizer("A b.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids += [token for token in (tokenizer.bos_token_id, tokenizer.pad_token_id) if token is not None]
    if not all(type(token) is int for token in ids):
        raise ValueError("its token ids are not numbers")
    return tokenizer


def _byte_tokenizer(source: ModelSource, vocab_size: int) -> transformers.PreTrainedTokenizerBase:
    """A tokenizer whose ids 0 to 255 are UTF-8 bytes; 256, 257 and 258 are begin, end and padding, which are never
    added."""
    if vocab_size < BYTE_VOCABULARY:
        raise refused_value(
            "models",
            "model",
            source.label,
            f"its vocabulary of {vocab_size} cannot hold the {BYTE_VOCABULARY} tokens of the byte tokenizer",
            f"Use a model with at least {BYTE_VOCABULARY} tokens.",
        )
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=BYTE_CHAT,
    )
