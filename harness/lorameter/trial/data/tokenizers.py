"""A model's tokenizer, or bytes where the weights are random and no tokenizer can be had.

The tokenising process pays for its own start in every run and needs no model, so nothing here loads peft,
bitsandbytes or accelerate, nor `lorameter.trial.building.base_model`, which does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import transformers

from lorameter.errors import impossible, said_by
from lorameter.models import catalogue, shapes
from lorameter.models.catalogue import ModelSource

BYTE_TOKENS = 256
BYTE_VOCABULARY = BYTE_TOKENS + 3
"""The bytes, then begin, end and padding."""
BYTE_CHAT = (
    "{{ bos_token }}{% for message in messages %}### {{ message.role | capitalize }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant\n{% endif %}"
)
"""How conversations are written in bytes."""


def load_tokenizer(source: ModelSource, *, vocab_size: int) -> tuple[transformers.PreTrainedTokenizerBase, bool]:
    """The model's tokenizer, and whether bytes had to stand in for it.

    Bytes stand in only where the weights are random and the real tokenizer cannot be had: then no text means
    anything to the model, and only the number of tokens matters. Padding is some valid id, often that of EOS, so
    mask by length.

    Raises:
        UsageError: a real model's tokenizer cannot be had, or has more tokens than the model.
    """
    if source.tokenizer == "byte":
        return _byte_tokenizer(source, vocab_size), False
    try:
        tokenizer = _tokenizer_of_files(source)
        _try_out(tokenizer)
    except Exception as error:  # which exception depends on the key of its files that the libraries could not take
        if source.random:
            return _byte_tokenizer(source, vocab_size), True
        if source.kind == "hub":
            raise catalogue.hub_failure(source, error) from None
        raise impossible(
            "models",
            "model",
            source.label,
            f"its tokenizer cannot be loaded ({said_by(error)})",
            "Save one next to the weights.",
        ) from None
    if tokenizer.vocab_size > vocab_size:
        raise impossible(
            "models",
            "model",
            source.label,
            f"its tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}",
            "Put the tokenizer that the model was trained with next to its weights.",
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocab_size:  # Llama-2's <pad> is beyond its table
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, False


def _try_out(tokenizer: Any) -> None:
    """Raises whatever a tokenizer of damaged files ends in, or ValueError: it is asked for all that is needed of it."""
    ids = [*tokenizer("A b.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids += [one for one in (tokenizer.bos_token_id, tokenizer.pad_token_id) if one is not None]
    if not all(type(one) is int for one in ids):
        raise ValueError("its tokens are no numbers")


def gguf_tokenizer(path: Path) -> transformers.PreTrainedTokenizerBase:
    """The file's tokenizer with the file's special tokens: transformers 5.17 takes BOS for EOS and drops PAD."""
    values = shapes.gguf_of(path).values  # first: what is no such file keeps the library busy without end
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = values.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(int(token)))
    return tokenizer


def _tokenizer_of_files(source: ModelSource) -> transformers.PreTrainedTokenizerBase:
    if source.kind == "gguf":
        return gguf_tokenizer(Path(source.location))
    if source.kind == "config":
        raise OSError("a packaged configuration has no tokenizer")
    offline = source.kind != "hub" or not catalogue.hub_has(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.location, local_files_only=offline)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of some families without files
        raise OSError("no vocabulary is there")
    return tokenizer


def _byte_tokenizer(source: ModelSource, vocab_size: int) -> transformers.PreTrainedTokenizerBase:
    """Ids 0 to 255 are the bytes of UTF-8; 256, 257 and 258 are begin, end and padding, and never added unasked."""
    if vocab_size < BYTE_VOCABULARY:
        raise impossible(
            "models",
            "model",
            source.label,
            f"its vocabulary of {vocab_size} cannot hold the {BYTE_VOCABULARY} tokens of the byte tokenizer",
            f"Use a model with at least {BYTE_VOCABULARY} tokens.",
        )
    model = tokenizers.models.BPE(vocab={char: byte for byte, char in enumerate(_byte_characters())}, merges=[])
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


def _byte_characters() -> list[str]:
    """The printable character of each byte in GPT-2's byte-level alphabet (Radford et al. 2019)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(BYTE_TOKENS, 2 * BYTE_TOKENS))
    return [chr(byte if byte in printable else next(others)) for byte in range(BYTE_TOKENS)]
