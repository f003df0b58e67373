"""Records to token ids, and to labels: which of the tokens the loss is taken over.

The ids are the same whichever that are. Text is encoded whole, so a token can hold the end of a prompt and the
beginning of its answer; it counts as the answer's, since the model has to say it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorameter.errors import UsageError
from lorameter.records.worker_info import Example
from lorameter.studies.workload import PromptFormat, Workload
from lorameter.trial.data.chat import ChatTemplate, Conversation, Span
from lorameter.trial.data.synthetic import Record

AnyRecord = Record | Conversation
IGNORED = -100
"""The label that torch.nn.functional.cross_entropy leaves out."""


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
