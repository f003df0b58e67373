"""A small model with random weights; of many words its head is most of what it costs."""

from __future__ import annotations

import json
from pathlib import Path


def write_model(folder: Path, hidden: int, words: int, *, blocks: int = 2) -> Path:
    """The folder of a Llama of so many blocks, for `random:FOLDER`."""
    heads = max(2, hidden // 64)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": 2 * hidden, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": heads, "vocab_size": words, "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    model = folder / "many-words"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model
