"""Families of transformers, each built as small as its configuration allows, with an input that it takes.

What is small is told by the names of a configuration's numbers, in its parts as well; nothing is listed by family. A
family that cannot be built like this, or is not small then, is left out with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PARAMETERS = 5_000_000
"""More than this is not small."""
ROWS, LENGTH, IMAGE, FRAMES = 2, 8, 32, 64
NUMBERS = (
    (32, """hidden_size d_model n_embd dim embed_dim hidden_dim embedding_size n_embed projection_dim d_embed emb_dim
        word_embed_proj_dim decoder_hidden_size encoder_hidden_size output_hidden_size out_hidden_size"""),
    (48, """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner d_inner ffn_hidden_size mlp_dim
        dim_ff feed_forward_size shared_expert_intermediate_size moe_intermediate_size"""),
    (2, """num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers depth
        num_blocks encoder_num_hidden_layers decoder_num_hidden_layers num_attention_heads num_heads n_head n_heads
        num_kv_heads encoder_attention_heads decoder_attention_heads num_key_value_heads decoder_num_attention_heads
        encoder_num_attention_heads num_experts_per_tok num_encoder_layers n_group topk_group n_shared_experts
        moe_topk num_selected_experts num_conv_pos_embedding_groups"""),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (16, """head_dim d_kv kv_channels attention_head_size kv_lora_rank q_lora_rank qk_nope_head_dim v_head_dim
        rotary_dim num_conv_pos_embeddings d_state state_size"""),
    (8, "qk_rope_head_dim patch_size"),
    (IMAGE, "image_size img_size"),
    (99, "vocab_size text_vocab_size"),
    (64, """max_position_embeddings n_positions max_target_positions max_source_positions n_ctx max_seq_len
        max_sequence_length sliding_window"""),
)  # fmt: skip
SMALL: dict[str, int] = {name: number for number, names in NUMBERS for name in names.split()} | {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
FILLED_IN = ("num_key_value_heads", "vocab_size")
"""Numbers that some configurations leave open, and their models need."""
DROPPED = ("layerdrop", "layer_drop", "drop_path")
"""Parts of the names of rates at which whole layers are left out, which would make every run another."""
TASKS = tuple(f"AutoModelFor{task}" for task in (
    "CausalLM", "Seq2SeqLM", "MaskedLM", "ImageClassification", "AudioClassification", "CTC", "SpeechSeq2Seq",
    "ZeroShotImageClassification", "ImageTextToText",
))  # fmt: skip


class UnfitError(Exception):
    """A family that is left out, with the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model type and the class of its task."""

    name: str
    task: str

    def config(self) -> Any:
        """Its configuration, with small numbers."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        config = _shrunk(CONFIG_MAPPING[self.name])
        config.architectures = config.architectures or []  # None stops the choice among several classes for a task
        return config

    def build(self, seed: int = 0, **options: Any) -> Any:
        """A model of random weights.

        Raises:
            UnfitError: it cannot be built, or is too large.
        """
        import transformers

        task = getattr(transformers, self.task)
        try:
            config = self.config()
            with torch.device("meta"):
                size = sum(value.numel() for value in task.from_config(config).parameters())
        except Exception as error:
            raise UnfitError(f"cannot be built: {_first(error)}") from error
        if size > PARAMETERS:
            raise UnfitError(f"{size:,} parameters")
        torch.manual_seed(seed)
        return task.from_config(self.config(), **options)


def families() -> Iterator[Family]:
    """Every model type with a task, in the order of their names."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    mappings = {task: getattr(modeling_auto, task)._model_mapping._model_mapping for task in TASKS}
    for name in sorted(CONFIG_MAPPING_NAMES):
        for task in TASKS:
            if name in mappings[task]:
                yield Family(name=name, task=task)
                break


def inputs_of(model: Any) -> dict[str, Tensor]:
    """A batch that the model takes, by the names of its forward's arguments.

    Raises:
        UnfitError: its input is none that is known.
    """
    torch.manual_seed(1)
    known: dict[str, Any] = {
        "input_ids": lambda: torch.randint(3, 90, (ROWS, LENGTH)),
        "pixel_values": lambda: torch.randn(ROWS, _channels(model.config), IMAGE, IMAGE),
        "input_values": lambda: torch.randn(ROWS, 4000),
        "input_features": lambda: torch.randn(ROWS, getattr(model.config, "num_mel_bins", 80), FRAMES),
    }
    main = model.main_input_name
    if main not in known:
        raise UnfitError(f"its input is {main}")
    taken = inspect.signature(model.forward).parameters
    batch = {main: known[main]()}
    if model.config.is_encoder_decoder and "decoder_input_ids" in taken:
        batch["decoder_input_ids"] = known["input_ids"]()
    if (
        main == "input_ids"
        and "pixel_values" in taken
        and not type(model).__name__.endswith("ForConditionalGeneration")
    ):
        batch["pixel_values"] = known["pixel_values"]()
    return batch


def logits_of(output: Any) -> Tensor:
    """The first output that depends on the weights."""
    for name in ("logits", "logits_per_image", "logits_per_text"):
        found = getattr(output, name, None)
        if torch.is_tensor(found):
            return found
    raise UnfitError("no logits")


def _channels(config: Any) -> int:
    return next(
        (one.num_channels for one in (config, getattr(config, "vision_config", None)) if hasattr(one, "num_channels")),
        3,
    )


def _shrunk(kind: Any) -> Any:
    """A configuration of this class with all known numbers small, in its parts as well."""
    whole = kind()
    names = {*whole.to_dict(), *getattr(kind, "attribute_map", {})}
    given: dict[str, Any] = {name: SMALL[name] for name in names if name in SMALL and _counts(whole, name)}
    given |= {name: 0.0 for name in names if any(part in name for part in DROPPED)}
    given = {name: value for name, value in given.items() if getattr(kind, "attribute_map", {}).get(name) not in given}
    for name in getattr(kind, "sub_configs", {}):
        part = getattr(whole, name, None)
        if part is not None:
            given[name] = _shrunk(type(part)).to_dict()
    return kind(**given)


def _counts(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    number = isinstance(value, int) and not isinstance(value, bool)
    return number or name.endswith("token_id") or (value is None and name in FILLED_IN)


def _first(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
