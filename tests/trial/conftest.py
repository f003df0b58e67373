"""Shared fixtures: one small model as llama.cpp would write it, and the same model converted."""

import numpy as np
import pytest

from harness.trial.data.tokenizers import _byte_characters

WORDS = ["<unk>", "<s>", "</s>", *_byte_characters(), "ta", "tab"]


@pytest.fixture(scope="session")
def words():
    """The vocabulary of `gguf_file`: token 1 begins and token 2 ends a text."""
    return WORDS


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory):
    """A small tied Llama with Q8_0 linear layers and a GPT-2 style tokenizer, as llama.cpp writes it."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(128)
    writer.add_feed_forward_length(192)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["t a", "ta b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(5)
    shapes = {"attn_q": (128, 128), "attn_k": (64, 128), "attn_v": (64, 128), "attn_output": (128, 128)}
    shapes |= {"ffn_gate": (192, 128), "ffn_up": (192, 128), "ffn_down": (128, 192)}
    writer.add_tensor("token_embd.weight", random.normal(0, 0.02, (len(WORDS), 128)).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(128, np.float32))
    for block in range(2):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{norm}.weight", np.ones(128, np.float32))
        for name, shape in shapes.items():
            weight = random.normal(0, 0.02, shape).astype(np.float32)
            packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"blk.{block}.{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def converted(gguf_file, tmp_path_factory):
    """The same model as a directory."""
    from harness.trial.building import base_model as models

    out = tmp_path_factory.mktemp("converted")
    models.convert_gguf(gguf_file, out)
    return out
