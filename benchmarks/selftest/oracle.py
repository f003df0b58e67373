"""Determines the truth about LoRA runs of small transformers models without the checks, and judges the checks by it.

As in transformers' own dispatch tests, torch refuses a scaled dot product that the allowed backends cannot run: a call
that succeeds under `sdpa_kernel(FLASH_ATTENTION)` runs on flash. A torch function mode counts the attention calls, both
scaled dot products and eager attention (a softmax over scores). Then:

- flash is active exactly if all attention calls are scaled dot products that flash accepts;
- math is active exactly if all attention calls are scaled dot products, and either flash refuses all of them or only
  math is allowed;
- eager is active exactly if all attention calls are eager;
- every other requirement of a healthy LoRA run is active: attached, exactly if PEFT adapts the requested layers and a
  step calls them; frozen, exactly if two steps leave the saved base unchanged; learning, exactly if a step changes
  every factor.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

import kernels_check

MAX_PARAMETERS = 5_000_000
"""Maximum number of parameters of a small model."""
ROWS, LENGTH, IMAGE, FRAMES = 2, 8, 32, 64
SMALL_NUMBERS = (
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
SMALL: dict[str, int] = {name: number for number, names in SMALL_NUMBERS for name in names.split()} | {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
REQUIRED_NUMBERS = ("num_key_value_heads", "vocab_size")
"""Numbers that are None in some configurations although their models need them."""
DROP_RATES = ("layerdrop", "layer_drop", "drop_path")
"""Parts of the names of layer-drop rates; a rate other than 0 would make every run different."""
TASKS = tuple(f"AutoModelFor{task}" for task in (
    "CausalLM", "Seq2SeqLM", "MaskedLM", "ImageClassification", "AudioClassification", "CTC", "SpeechSeq2Seq",
    "ZeroShotImageClassification", "ImageTextToText",
))  # fmt: skip
SOFTMAXES = (torch.softmax, torch.nn.functional.softmax, torch.Tensor.softmax)
HEALTHY: dict[str, Any] = {
    "base.bits": 32, "base.quant_type": "none", "base.frozen": True, "peft.attached": True, "peft.dtype": "float32",
    "peft.dropout": 0.05, "optimizer.class": "torch.optim.AdamW", "optimizer.fused": False, "checkpointing": False,
    "compile": False, "mode": "train", "peft.learning": True,
}  # fmt: skip


@cache
def families() -> dict[str, str]:
    """Return the name of the first suitable auto class of every model type that has one."""
    mappings = {task: getattr(modeling_auto, task)._model_mapping._model_mapping for task in TASKS}
    tasks = {name: [task for task in TASKS if name in mappings[task]] for name in sorted(CONFIG_MAPPING_NAMES)}
    return {name: found[0] for name, found in tasks.items() if found}


def build(name: str) -> Any:
    """Build a small model of a family with random weights.

    Raises:
        ValueError: the model is too large.
    """
    make, config = getattr(transformers, families()[name]).from_config, _shrink_config(CONFIG_MAPPING[name])
    # Where a task has several classes, transformers cannot choose one if this is None.
    config.architectures = config.architectures or []
    with torch.device("meta"):
        size = sum(value.numel() for value in make(copy.deepcopy(config)).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError("too large")
    torch.manual_seed(0)
    return make(config)


def make_inputs(model: Any) -> dict[str, Tensor]:
    """Make a batch for the model: tensors by the names of the arguments of its forward.

    Raises:
        ValueError: the model's main input is of an unknown kind.
    """
    torch.manual_seed(1)
    configs = [model.config, getattr(model.config, "vision_config", None)]
    channels = [one.num_channels for one in configs if hasattr(one, "num_channels")]
    known: dict[str, Any] = {
        "input_ids": lambda: torch.randint(3, 90, (ROWS, LENGTH)),
        "pixel_values": lambda: torch.randn(ROWS, (*channels, 3)[0], IMAGE, IMAGE),
        "input_values": lambda: torch.randn(ROWS, 4000),
        "input_features": lambda: torch.randn(ROWS, getattr(model.config, "num_mel_bins", 80), FRAMES),
    }
    main = model.main_input_name
    if main not in known:
        raise ValueError("its input is of another kind")
    parameters = inspect.signature(model.forward).parameters
    batch = {main: known[main]()}
    if model.config.is_encoder_decoder and "decoder_input_ids" in parameters:
        batch["decoder_input_ids"] = known["input_ids"]()
    conditional = type(model).__name__.endswith("ForConditionalGeneration")
    if main == "input_ids" and "pixel_values" in parameters and not conditional:
        batch["pixel_values"] = known["pixel_values"]()
    return batch


def _shrink_config(kind: Any) -> Any:
    """Return a configuration of this class with all known numbers small, including its sub-configurations."""
    default = kind()
    names = {*default.to_dict(), *getattr(kind, "attribute_map", {})}
    fields: dict[str, Any] = {name: SMALL[name] for name in names if name in SMALL and _is_number(default, name)}
    fields |= {name: 0.0 for name in names if any(part in name for part in DROP_RATES)}
    aliases = getattr(kind, "attribute_map", {})
    fields = {name: value for name, value in fields.items() if aliases.get(name) not in fields}
    for name in getattr(kind, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None:
            fields[name] = _shrink_config(type(part)).to_dict()
    return kind(**fields)


def _is_number(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    number = isinstance(value, int) and not isinstance(value, bool)
    return number or name.endswith("token_id") or (value is None and name in REQUIRED_NUMBERS)


class AttentionCounter(TorchFunctionMode):
    """Counts attention calls: scaled dot products, those of them that flash refuses, and softmaxes over scores."""

    def __init__(self) -> None:
        super().__init__()
        self.sdpa_calls = self.refused_calls = self.eager_calls = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the function if it is a call of attention, and call it."""
        kwargs = kwargs or {}
        # The mode does not see the scaled dot product inside torch's multi-head attention.
        multihead = function is multi_head_attention_forward
        if multihead and kwargs.get("need_weights", True):
            self.eager_calls += 1
        elif multihead or function is scaled_dot_product_attention:
            self.sdpa_calls += 1
            try:
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    return function(*args, **kwargs)
            except RuntimeError:
                self.refused_calls += 1
        elif function in SOFTMAXES:
            shape = (args[0] if args else kwargs["input"]).shape
            # Attention scores have a row for each query and a column for each key; the scores of a router do not.
            square = len(shape) > 3 or (len(shape) == 3 and shape[-1] == shape[-2])
            self.eager_calls += square and min(shape[-2:]) > 1
        return function(*args, **kwargs)


class FamilyRun:
    """A LoRA run of one family: adapters on every linear layer that its forward calls.

    Raises:
        ValueError: the model is too large, or its forward calls no linear layer.
    """

    def __init__(self, family: str) -> None:
        model = build(family).train()
        self.inputs, self.step_context = make_inputs(model), nullcontext
        names = _find_called_layers(model, self.inputs)
        torch.manual_seed(2)
        pattern = "|".join(name.replace(".", r"\.") for name in names)
        self.model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=0.05, target_modules=f"({pattern})"))
        self.model.train()
        self.trainable = [value for value in self.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-2, weight_decay=0.0)
        self.tuners = [one for one in self.model.modules() if isinstance(one, BaseTunerLayer)]
        has_experts = any(isinstance(one, ParamWrapper) for one in self.model.modules())
        layers = [self.model.base_model.model.get_submodule(name) for name in names]
        self.adapts_all = has_experts or all(layer in self.tuners for layer in layers)
        """Whether PEFT adapted every layer; in a model with experts it adapts their parameters instead of some
        layers."""

    def copy_base(self) -> dict[str, Tensor]:
        """Return a copy of the tensors of the model's state dict that do not train."""
        trainable = {value.data_ptr() for value in self.trainable}
        saved = {name: one for name, one in self.model.state_dict().items() if torch.is_tensor(one)}
        return {name: value.clone() for name, value in saved.items() if value.data_ptr() not in trainable}

    def step(self) -> None:
        """Run a forward and a backward pass and an update."""
        with self.step_context():
            self.optimizer.zero_grad()
            output = self.model(**self.inputs)
            values = [getattr(output, name, None) for name in ("logits", "logits_per_image", "logits_per_text")]
            logits = next((one for one in values if torch.is_tensor(one)), None)
            if logits is None:
                raise ValueError("no logits")
            logits.float().pow(2).mean().backward()
            self.optimizer.step()


def _record_calls(modules: Sequence[nn.Module], function: Any) -> list[nn.Module]:
    """Call a function and return the modules that it calls, in the order of their first call."""
    called = dict[nn.Module, None]()
    with ExitStack() as hooks:
        for one in modules:
            hooks.push(one.register_forward_hook(lambda module, *_: called.setdefault(module)))
        function()
    return list(called)


def _find_called_layers(model: nn.Module, inputs: dict[str, Any]) -> list[str]:
    """Return the names of the linear layers that a forward pass calls, without the head."""
    linears = {module: name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    with torch.no_grad():
        called = _record_calls(list(linears), lambda: model(**inputs))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = [linears[module] for module in called if module is not head]
    if not names:
        raise ValueError("no linear layer is called")
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyTruth:
    """The truth about the run of a family; None for what the oracle cannot decide."""

    backend: str | None
    has_math: bool
    """Whether attention runs on math if that is the only allowed backend."""
    attached: bool
    frozen: bool
    learning: bool | None


def find_truth(family: str) -> FamilyTruth:
    """Take steps of a run of the family and return the truth about it. Raises any exception of a family that cannot be
    built small or does not train."""
    run = FamilyRun(family)
    before = run.copy_base()
    with AttentionCounter() as counter:
        attached = len(_record_calls(run.tuners, run.step)) == len(run.tuners) and run.adapts_all
    factors = [value.detach().clone() for value in run.trainable]
    run.step()
    changed = all(not torch.equal(old, new) for old, new in zip(factors, run.trainable, strict=True))
    has_gradients = all(value.grad is not None and value.grad.any() for value in run.trainable)
    after = run.copy_base()
    frozen = before.keys() == after.keys() and all(_same(value, after[name]) for name, value in before.items())
    backend = "eager" if counter.eager_calls and not counter.sdpa_calls else None
    if counter.sdpa_calls and not counter.eager_calls and counter.refused_calls in (0, counter.sdpa_calls):
        backend = "math" if counter.refused_calls else "flash"
    return FamilyTruth(
        backend=backend, has_math=bool(counter.sdpa_calls and not counter.eager_calls), attached=attached,
        frozen=frozen,
        learning=True if changed else None if has_gradients else False,  # an update may be lost in rounding
    )  # fmt: skip


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are bit-equal, so that two NaN are equal."""
    left, right = (value.contiguous().flatten().view(torch.uint8) for value in (one, other))
    return one.shape == other.shape and torch.equal(left, right)


def find_contradictions(family: str, truth: FamilyTruth, *, only_math: bool) -> Iterator[str]:
    """Verify a run of the family; yield the checks that contradict the truth."""
    run = FamilyRun(family)
    if only_math:
        run.step_context = partial(sdpa_kernel, SDPBackend.MATH)
    backend = "math" if only_math and truth.has_math else truth.backend
    required = HEALTHY | {"attention.backend": backend or "flash"}
    checks = {one.path: one for one in kernels_check.verify(run.model, run.step, required)}
    truths = dict.fromkeys(required, True) | {
        "attention.backend": backend is not None, "base.frozen": truth.frozen, "peft.attached": truth.attached,
        "peft.dropout": truth.attached or None,
        "peft.learning": truth.learning if truth.attached else truth.learning and None,
    }  # fmt: skip
    for path, value in required.items():
        holds, check = truths[path], checks.get(path)
        active = check is not None and check.status == "active"
        if holds is not None and holds != active and (holds or check is not None):
            outcome = "has no check" if check is None else f"the check is {check.status}: {check.reason}"
            yield f"{path} {value!r} {'holds' if holds else 'does not hold'}, but {outcome}"


def find_family_faults(names: Sequence[str]) -> Iterator[str]:
    """Yield the faults of the named families, or of all; print the number of examined families by backend."""
    backends, unbuildable = Counter[str](), 0
    for family in families():
        if family not in names and "all" not in names:
            continue
        try:
            truth = find_truth(family)
        except Exception:
            unbuildable += 1
            continue
        backends[truth.backend or "none or several"] += 1
        for only_math in (False, True):
            where = f"family {family}{', only math' if only_math else ''}"
            try:
                faults = [*find_contradictions(family, truth, only_math=only_math)]
            except Exception as error:
                faults = [f"raised {error!r}"]
            yield from (f"{where}: {fault}" for fault in faults)
    counted = ", ".join(f"{count} {backend}" for backend, count in backends.most_common())
    print(f"{backends.total()} families: {counted}; {unbuildable} cannot be built small or do not train", flush=True)
