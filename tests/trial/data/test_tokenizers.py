"""Tests of tokenizers: the model's own, or UTF-8 bytes for random weights without a tokenizer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorameter.errors import UsageError
from lorameter.models import catalogue
from lorameter.trial.data.tokens import load_tokenizer


def test_the_tokenising_process_loads_no_model_library():
    """The tokenising process does not import the libraries of a model."""
    code = (
        "import sys, lorameter.trial.data.tokens\n"
        "loaded = {'peft', 'bitsandbytes', 'accelerate', 'lorameter.trial.building.base_model'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    root = Path(catalogue.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_the_byte_tokenizer_encodes_utf8():
    """Ids are the UTF-8 bytes of the text without additions, and decoding restores the text."""
    tokenizer, substituted = load_tokenizer(catalogue.resolve("tiny-llama"), vocab_size=320)
    text = "né  日本\n\t'x' " + "".join(map(chr, range(1, 300)))
    ids = tokenizer(text).input_ids
    assert (ids, substituted) == (list(text.encode()), False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)


def test_bytes_replace_the_tokenizer_of_a_random_model_alone(monkeypatch, tmp_path):
    """A random model whose tokenizer cannot be loaded gets the byte tokenizer, which is reported; for real weights this
    is an error."""
    monkeypatch.setattr(catalogue, "hub_answers", lambda file: False)
    tokenizer, substituted = load_tokenizer(catalogue.resolve("random:someone/absent-model"), vocab_size=32000)
    assert (tokenizer("a").input_ids, substituted) == ([97], True)
    with pytest.raises(UsageError, match="hub cannot be reached"):
        load_tokenizer(catalogue.resolve("someone/absent-model"), vocab_size=32000)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 320}))
    with pytest.raises(UsageError, match="tokenizer cannot be loaded"):
        load_tokenizer(catalogue.resolve(str(tmp_path)), vocab_size=320)


def test_vocabularies_must_fit(converted, words):
    """A tokenizer with more tokens than the model is refused, both the model's own and the byte tokenizer."""
    with pytest.raises(UsageError, match=f"has {len(words)} tokens and the model 100"):
        load_tokenizer(catalogue.resolve(str(converted)), vocab_size=100)
    with pytest.raises(UsageError, match="cannot hold the 259 tokens"):
        load_tokenizer(catalogue.resolve("tiny-llama"), vocab_size=258)
